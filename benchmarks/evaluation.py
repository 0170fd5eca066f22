"""Fidelity metrics against torchmetrics', side by side: times, memory, and that they agree.

    .venv/bin/python -m benchmarks.evaluation --json evaluation.json
    .venv/bin/python -m benchmarks.evaluation --samples 2000 --real 1000 --rounds 1

Random images of 28x28 and the classifier's architecture at its default size (time does not depend
on what it has learnt); Fréchet distance, KID (100 subsets of 1,000) and inception score, which is
what torchmetrics has of ours. Ours also has KID's standard error, and KID in float64; KID's random
subsets are drawn in another order, so its values agree within their error.

From the images, every torchmetrics metric runs the network for itself; with its `FeatureShare` two
of the three share it. Ours runs once over the samples and once over the real images, whose
features the pipeline has stored: a row counts it so. Ours has its batch norms fused, as the
pipeline loads it; torchmetrics is given the network as it was trained, and batches of `--batch`.
From the features alone there is no goal: the times are printed and stand in the JSON. `--all`: then
all of our fidelity and memorisation metrics once, with their peak memory.
"""

from __future__ import annotations

import copy
import math
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.wrappers import FeatureShare

from benchmarks.pairs import Row, alternate, arguments, report, versions
from models.data import DataSpec
from tasks.data.shards import Split
from tasks.evaluation import classes, fidelity, kernel_distance, memorisation, quality, real
from tasks.evaluation.classifier import Classifier, fused
from tasks.evaluation.features import Extractor

DATA = DataSpec(shape=(1, 28, 28), levels=256, classes=tuple("0123456789"))
Result = dict[str, float]
# relative differences that are no surprise: rounding; another shuffle
APART = {"frechet_distance": 1e-4, "inception_score": 1e-3}
ERRORS = 6  # of KID, in deviations that the choice of its random subsets gives its mean,
ROUNDING = 2e-6  # and torchmetrics' means of a kernel near 1, in float32


class Through(nn.Module):
    """A network as torchmetrics takes one; it is first tried on an image of three channels."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function, self.num_features = function, width

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def theirs(
    fake: Tensor,
    genuine: Tensor,
    features: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    batch: int,
    *,
    shared: bool = False,
) -> Result:
    """torchmetrics, fed in batches as its documentation does."""
    net = Through(features, 64)
    fid = FrechetInceptionDistance(net)
    size = min(kernel_distance.SUBSET_SIZE, len(genuine))
    kid = KernelInceptionDistance(net, subsets=kernel_distance.SUBSETS, subset_size=size)
    score = InceptionScore(Through(logits, 10), splits=fidelity.SPLITS)
    distances: Any = FeatureShare([fid, kid]) if shared else (fid, kid)
    for images, is_real in ((genuine, True), (fake, False)):
        for part in images.split(batch):
            if shared:
                distances.update(part, real=is_real)
            else:
                for metric in distances:
                    metric.update(part, real=is_real)
            if not is_real:
                score.update(part)
    if shared:
        found = distances.compute()
        distance, kernel = found["FrechetInceptionDistance"], found["KernelInceptionDistance"]
    else:
        distance, kernel = fid.compute(), kid.compute()
    return {
        "frechet_distance": float(distance),
        "kid": float(kernel[0]),
        "inception_score": float(score.compute()[0]),
    }


def ours(fake: np.ndarray, genuine: np.ndarray, logits: np.ndarray) -> Result:
    kernel = kernel_distance.kid(fake, genuine)
    return {
        "kid_deviation": kernel.std / math.sqrt(kernel_distance.SUBSETS),
        "frechet_distance": fidelity.frechet_distance(fake, genuine),
        "kid": kernel.mean,
        "inception_score": fidelity.inception_score(logits)[0],
    }


def compare(
    contenders: dict[str, Callable[[], Result]], rounds: int, label: str
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each, round by round, and how far the others' last values are from the first's.

    Raises SystemExit where that is further than `APART` allows: times of other things are no ratio.
    """
    values: dict[str, Result] = {}

    def seconds(name: str) -> float:
        begun = time.perf_counter()
        values[name] = contenders[name]()
        return time.perf_counter() - begun

    turns = {name: partial(seconds, name) for name in contenders}
    found = alternate(turns, rounds, label)
    names = list(values)
    mine = values[names[0]]
    apart = {
        name: {k: abs(value / mine[k] - 1) for k, value in values[name].items()}
        for name in names[1:]
    }
    allowed = {**APART, "kid": (ERRORS * mine["kid_deviation"] + ROUNDING) / abs(mine["kid"])}
    for name, differences in apart.items():
        wrong = {k: v for k, v in differences.items() if v > allowed.get(k, 0)}
        if wrong:
            raise SystemExit(f"{label}: {name} differs from ours, {mine}, by {wrong} of it")
    return found, apart


def everything(
    judge: Classifier, extract: Extractor, fake: Tensor, train: Tensor, test: Tensor
) -> dict[str, Any]:
    """All of the protocol's numbers about samples, from their images; seconds by group."""

    def split(x: Tensor) -> Split:
        return Split(x.numpy(), np.arange(len(x)) % 10, None, None)

    few = test[:100].numpy()
    splits = {"train": train.numpy(), "validation": few, "test": test.numpy()}
    stored = real.compute(extract, judge, splits, len(fake))
    yardstick = quality.Yardstick(split(train), few, split(test), extract, stored, judge)
    found, begun = {}, time.perf_counter()
    seen = quality.look(fake.numpy(), yardstick)
    for name, group in (
        ("features", lambda: None),
        ("distances and manifolds", lambda: quality.measure(seen, None, yardstick)),
        ("classes", lambda: classes.measure(seen, yardstick, None)),
        ("memorisation", lambda: memorisation.measure(seen, yardstick, finite=True)),
    ):
        group()
        found[name], begun = time.perf_counter() - begun, time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    told = ", ".join(f"{name} {value:.1f} s" for name, value in found.items())
    print(f"all of ours: {sum(found.values()):.1f} s ({told}), peak memory {memory:.2f} GB")
    return {"seconds": found, "peak_memory_gb": memory}


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=50_000, help="and training images")
    parser.add_argument("--real", type=int, default=10_000, help="test images")
    parser.add_argument("--batch", type=int, default=100, help="images that torchmetrics is fed")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = Classifier(DATA, width=32, features=64).eval()
    judge = fused(copy.deepcopy(plain))  # as the pipeline loads it
    extract = Extractor("classifier", "", judge.features, torch.device("cpu"), judge.head)

    def images(n: int) -> Tensor:
        coarse = torch.randint(0, 256, (n, 1, 7, 7), dtype=torch.uint8)
        return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)

    fake, genuine = images(options.samples) // 2, images(options.real)
    fake_features, real_features = extract(fake), extract(genuine)
    logits = judge.head(torch.from_numpy(fake_features)).numpy()

    def from_images(stored: bool) -> Result:
        mine = extract(fake)
        others = real_features if stored else extract(genuine)
        return ours(mine, others, judge.head(torch.from_numpy(mine)).numpy())

    raw = partial(theirs, fake, genuine, plain.features, plain, options.batch)
    known = torch.from_numpy(fake_features), torch.from_numpy(real_features)
    seen, apart = compare(
        {
            "ours": partial(from_images, stored=False),
            "stored": partial(from_images, stored=True),
            "torchmetrics": raw,
            "FeatureShare": partial(raw, shared=True),
        },
        options.rounds,
        "from images",
    )
    bare, apart["features"] = compare(
        {
            "ours": partial(ours, fake_features, real_features, logits),
            "torchmetrics": partial(theirs, *known, lambda x: x, judge.head, options.batch),
        },
        options.rounds,
        "from features",
    )
    told = ", ".join(f"{k} {v:.0e}" for k, v in apart["torchmetrics"].items())
    against = seen["torchmetrics"], 5, "torchmetrics"
    rows = [
        Row(name, "s", mine, other, goal, peer, more_is_better=False, note=note)
        for name, mine, other, goal, peer, note in (
            ("from the images", seen["ours"], *against, f"apart: {told}"),
            ("the real images' features stored", seen["stored"], *against, ""),
            ("from the images", seen["ours"], seen["FeatureShare"], 1, "FeatureShare", ""),
        )
    ]
    more: dict[str, Any] = {
        "features_s": bare,
        "apart": apart,
        "versions": versions("torch", "torchmetrics"),
    }
    if options.all:
        train = images(options.samples)
        more["all"] = everything(judge, extract, fake, train, genuine)
    title = f"Fréchet distance, KID, inception score of {options.samples:,} samples"
    report(title, rows, options, **more)


if __name__ == "__main__":
    main()
