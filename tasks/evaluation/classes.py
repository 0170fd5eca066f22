"""What the dataset's classifier says of samples, and how far they are from the data, by class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation import classifier, fidelity
from tasks.evaluation.quality import Found, Seen, Yardstick, too_few

DISTANCES = "class_frechet_distances"


def measure(seen: Seen, yardstick: Yardstick, asked: NDArray[np.int64] | None) -> Found:
    """Class shares, inception score, distances by class, and whether samples are as asked.

    Args:
        asked: the labels that the samples were asked for, `[N]` or `[N, A]`; None where nobody
            asked, or where it is not known what was asked.

    Returns:
        `class_share_min`, `class_shares`; `inception_score` of the classifier's probabilities;
        `class_frechet_distances` by class name, of the samples asked for it, or else judged to
        be of it; `condition_accuracy`: share that the judge finds to be as asked (with
        attributes: share of attributes), and `frechet_distance_within_class`, the mean over the
        classes asked for. Floors beside them. And the reasons for what there is not.
    """
    judge, test = yardstick.judge, yardstick.test
    metrics: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    assert judge is not None
    if seen.answers is not None and asked is not None:
        metrics["condition_accuracy"] = float((seen.answers == asked).mean())
    if seen.answers is None or seen.logits is None or test.label is None:
        reason = "the dataset has no classes"
        if judge.task == "attributes":
            reason = "the dataset has attributes, not classes"
        return metrics, dict.fromkeys(("class_share_min", "inception_score", DISTANCES), reason)
    found = _shares(seen, yardstick), _score(seen, yardstick), _distances(seen, yardstick, asked)
    for more, why in found:
        metrics |= more
        reasons |= why
    return metrics, reasons


def _shares(seen: Seen, yardstick: Yardstick) -> Found:
    """How often each class comes; the rarest of those that the test split has."""
    judge, test, real = yardstick.judge, yardstick.test, yardstick.real
    assert judge is not None
    assert real is not None
    assert seen.answers is not None
    names = judge.spec.classes
    there = np.bincount(test.label, minlength=len(names)) > 0  # type: ignore[arg-type]
    shares = classifier.shares(seen.answers, len(names))
    real_answers = classifier.decide(judge, real.logits["test"].copy())
    floor = classifier.shares(real_answers, len(names))
    reasons = {}
    if not there.all():
        absent = ", ".join(name for name, has in zip(names, there, strict=True) if not has)
        reasons["class_share_min"] = f"of {absent}: the test split has none"
    return {
        "class_share_min": float(shares[there].min()),
        "class_share_min_floor": float(floor[there].min()),
        "class_shares": [round(float(share), 4) for share in shares],
    }, reasons


def _score(seen: Seen, yardstick: Yardstick) -> Found:
    real = yardstick.real
    assert real is not None
    assert seen.logits is not None
    if len(seen.logits) < fidelity.SPLITS:
        reason = f"{len(seen.logits)} samples are too few for {fidelity.SPLITS} splits"
        return {}, {"inception_score": reason}
    score, std = fidelity.inception_score(seen.logits)
    found = {"inception_score": score, "inception_score_std": std}
    alike = real.logits["train"][: len(seen.logits)]
    if len(alike) >= fidelity.SPLITS:
        found["inception_score_floor"] = fidelity.inception_score(alike)[0]
    return found, {}


def _distances(seen: Seen, yardstick: Yardstick, asked: NDArray[np.int64] | None) -> Found:
    """Fréchet distance to the test images of each class; reasons for the classes without."""
    judge, test, real = yardstick.judge, yardstick.test, yardstick.real
    assert judge is not None
    assert real is not None
    group = seen.answers if asked is None else asked
    distances, floors, missing = {}, {}, []
    for label, name in enumerate(judge.spec.classes):
        mine = seen.features[group == label]
        theirs = real.features["test"][test.label == label]
        for what, rows in (("test images", theirs), ("samples", mine)):
            if too_few(mine.shape[1], rows=len(rows)):
                missing.append(f"{name} ({len(rows) or 'no'} {what})")
                break
        else:
            distances[name], floors[name] = _distance(mine, theirs, label, yardstick)
    least = f"{seen.features.shape[1]} features take more of either: {', '.join(missing)}"
    reasons = {DISTANCES: least} if missing else {}
    if not distances:
        return {}, reasons
    worst = max(distances, key=lambda name: distances[name])
    found: dict[str, Any] = {
        DISTANCES: distances,
        f"{DISTANCES}_floor": {name: floor for name, floor in floors.items() if floor is not None},
        f"{DISTANCES}_by": "the judge's class" if asked is None else "the asked class",
        "class_frechet_distance_max": distances[worst],
        "class_frechet_distance_max_of": worst,
    }
    if asked is not None:
        found["frechet_distance_within_class"] = float(np.mean(list(distances.values())))
    return found, reasons


def _distance(
    mine: NDArray[np.float32], theirs: NDArray[np.float32], label: int, yardstick: Yardstick
) -> tuple[float, float | None]:
    """Of the features of a class's samples to its test images; the floor of training images."""
    real, train = yardstick.real, yardstick.train
    assert real is not None
    against = fidelity.moments(theirs)
    alike = real.features["train"][train.label == label][: len(mine)]
    few = too_few(mine.shape[1], rows=len(alike))
    floor = None if few else fidelity.frechet_distance(alike, against)
    return fidelity.frechet_distance(mine, against), floor
