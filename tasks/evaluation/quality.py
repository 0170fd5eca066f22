"""The fidelity group: features of samples against those of the real splits, floors beside them.

A number that cannot be had is absent, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data import PLURALS
from tasks.data.shards import Split
from tasks.evaluation import classifier, fidelity, kernel_distance
from tasks.evaluation.features import Extractor, logits
from tasks.evaluation.manifold import manifold_metrics
from tasks.evaluation.real import RealFeatures

Images = NDArray[np.uint8]
Found = tuple[dict[str, Any], dict[str, str]]  # metrics, and reasons for those that there are not
NAMES = (
    "frechet_distance",
    "frechet_distance_train",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "nearest_train_ratio",
)


@dataclass
class Yardstick:
    """What every family is held against: real data, and the networks that look at them."""

    train: Split
    validation: Images
    test: Split
    extractor: Extractor | None  # None: not images, which is where features are known
    real: RealFeatures | None  # by that extractor
    judge: classifier.Classifier | None  # sorts samples into the dataset's classes
    entropy: float | None = None  # of the density that the data were drawn from, nats


@dataclass
class Seen:
    """Images as the networks see them."""

    images: Images
    features: NDArray[np.float32]  # [N, D]
    answers: NDArray[np.int64] | None  # of the judge, [N] or [N, A]; None: it knows no classes
    logits: NDArray[np.float32] | None  # [N, C], where it knows classes


def look(images: Images, yardstick: Yardstick) -> Seen:
    """Features and the judge's answers of levels `[N, C, H, W]`."""
    extractor, judge = yardstick.extractor, yardstick.judge
    assert extractor is not None
    assert judge is not None
    features = extractor(images)
    if judge.task == "rotations":
        return Seen(images, features, None, None)
    found = logits(extractor, features, judge, images)
    answers = classifier.decide(judge, found)
    return Seen(images, features, answers, found if judge.task == "classes" else None)


def none(modality: str) -> dict[str, str]:
    """The reasons where there are no images."""
    return dict.fromkeys(NAMES, f"there are no features of {PLURALS[modality]}")


def spoilt(seen: Seen) -> dict[str, str]:
    """The reasons where the extractor gave values that are not finite, else nothing."""
    bad = int((~np.isfinite(seen.features).all(1)).sum())
    reason = f"the features of {bad:,} of {len(seen.features):,} samples are not finite"
    return dict.fromkeys(NAMES, reason) if bad else {}


def too_few(dimensions: int, **rows: int) -> str | None:
    """Why sets have no Fréchet distance: a covariance of D features takes more than D rows."""
    for what, count in rows.items():
        if count <= dimensions:
            images = what.replace("_", " ")
            return f"{count:,} {images} are too few for the covariance of {dimensions:,} features"
    return None


def measure(seen: Seen, before: NDArray[np.float32] | None, yardstick: Yardstick) -> Found:
    """All of it for finite features; `before` are features of the untrained network's samples."""
    extractor, real = yardstick.extractor, yardstick.real
    assert extractor is not None
    assert real is not None
    fake, train, test = seen.features, real.features["train"], real.features["test"]
    alike = min(len(fake), len(train))  # a floor has no more rows than that, nor may the samples
    metrics: dict[str, Any] = {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "feature_dimensions": fake.shape[1],
        "manifold_samples": alike,
    }
    found, reasons = _frechet(fake, before, train, test)
    metrics |= found
    value = kernel_distance.kid(fake, test)
    metrics["kid"], metrics["kid_std"], metrics["kid_std_error"] = value
    metrics |= manifold_metrics(test, fake[:alike])
    floors = real.floors_of(len(fake))
    metrics |= {f"{k}_floor": floors[k] for k in NAMES if k in floors and k in metrics}
    return metrics, reasons


def _frechet(
    fake: NDArray[np.float32],
    before: NDArray[np.float32] | None,
    train: NDArray[np.float32],
    test: NDArray[np.float32],
) -> Found:
    found: dict[str, Any] = {}
    reasons, dimensions = {}, fake.shape[1]
    if reason := too_few(dimensions, samples=len(fake), test_images=len(test)):
        reasons["frechet_distance"] = reason
    else:
        against = fidelity.moments(test)
        found["frechet_distance"] = fidelity.frechet_distance(fake, against)
        found["frechet_distance_std"] = fidelity.frechet_distance_spread(fake, test)
        if before is not None and not too_few(dimensions, rows=len(before)):
            found["frechet_distance_untrained"] = fidelity.frechet_distance(before, against)
    if reason := too_few(dimensions, samples=len(fake), training_images=len(train)):
        reasons["frechet_distance_train"] = reason
    else:
        found["frechet_distance_train"] = fidelity.frechet_distance(fake, train)
    return found, reasons
