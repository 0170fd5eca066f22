"""Fidelity metrics against torchmetrics', side by side: times, memory, and that they agree.

    .venv/bin/python benchmarks/evaluation.py
    .venv/bin/python benchmarks/evaluation.py --samples 2000 --real 1000 --pairs 1

Random images of 28x28 and the classifier's architecture at its default size (time does not depend
on what it has learnt); FID, KID (100 subsets of 1,000) and inception score, which is what
torchmetrics has of ours (KID's random subsets are drawn in another order: its values agree within
their error). Two comparisons, each in alternating pairs, medians:

- `features`: both are given the same features and logits.
- `images`: both start from the uint8 images. Every torchmetrics metric runs the network for
  itself; ours runs once over the samples and once over the real images, though in the pipeline the
  latter are stored. `--real-stored` counts it so. Ours has its batch norms fused, as the pipeline
  loads it; torchmetrics is given the network as it was trained.

Then all of our fidelity and memorisation metrics once, with their peak memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from models.data import DataSpec
from tasks.data.shards import Split
from tasks.evaluation import classes, fidelity, memorisation, quality, real
from tasks.evaluation.classifier import Classifier, fused
from tasks.evaluation.features import Extractor

DATA = DataSpec(shape=(1, 28, 28), levels=256, classes=tuple("0123456789"))
BATCH = 500
Result = dict[str, float]


class Through(nn.Module):
    """A network as torchmetrics takes one; it is first tried on an image of three channels."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function, self.num_features = function, width

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def theirs(fake: Tensor, genuine: Tensor, features: nn.Module, logits: nn.Module) -> Result:
    """torchmetrics, fed in batches as its documentation does."""
    fid = FrechetInceptionDistance(features)
    kid = KernelInceptionDistance(features, subsets=fidelity.SUBSETS, subset_size=subset(genuine))
    score = InceptionScore(logits, splits=fidelity.SPLITS)
    for images, is_real in ((genuine, True), (fake, False)):
        for part in images.split(BATCH):
            fid.update(part, real=is_real)
            kid.update(part, real=is_real)
            if not is_real:
                score.update(part)
    return {
        "frechet_distance": float(fid.compute()),
        "kid": float(kid.compute()[0]),
        "inception_score": float(score.compute()[0]),
    }


def subset(genuine: Tensor) -> int:
    return min(fidelity.SUBSET_SIZE, len(genuine))


def ours(fake: np.ndarray, genuine: np.ndarray, logits: np.ndarray) -> Result:
    return {
        "frechet_distance": fidelity.frechet_distance(fake, genuine),
        "kid": fidelity.kid(fake, genuine).mean,
        "inception_score": fidelity.inception_score(logits)[0],
    }


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    begun = time.perf_counter()
    found = function()
    return time.perf_counter() - begun, found


def compare(name: str, pairs: int, mine: Callable[[], Result], other: Callable[[], Result]) -> Any:
    """Alternating pairs; the medians, the ratio, its spread, and how far the values are apart."""
    seconds: list[tuple[float, float]] = []
    for number in range(pairs):
        (fast, a), (slow, b) = timed(mine), timed(other)
        seconds.append((fast, slow))
        print(
            f"{name}, pair {number + 1}: ours {fast:.2f} s, torchmetrics {slow:.2f} s", flush=True
        )
    apart = {key: abs(a[key] / b[key] - 1) for key in a}
    ratios = [slow / fast for fast, slow in seconds]
    fast, slow = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(
        f"{name}: ours {fast:.2f} s, torchmetrics {slow:.2f} s (medians); "
        f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
    )
    print("  relative differences: " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()))
    return {"ours_s": fast, "torchmetrics_s": slow, "ratios": ratios, "apart": apart}


def everything(
    judge: Classifier, extract: Extractor, fake: Tensor, train: Tensor, test: Tensor
) -> Any:
    """All of the protocol's numbers about samples, from their images; seconds by group."""

    def split(x: Tensor) -> Split:
        return Split(x.numpy(), np.arange(len(x)) % 10, None, None)

    few = test[:100].numpy()
    stored = real.compute(
        extract,
        judge,
        {"train": train.numpy(), "validation": few, "test": test.numpy()},
        len(fake),
    )
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=10_000, help="test images")
    parser.add_argument("--train", type=int, help="training images; as many as samples")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--real-stored", action="store_true")
    parser.add_argument("--json", type=Path)
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
    known = Through(lambda x: x, 64)
    known_logits = Through(judge.head, 10)
    net, net_logits = Through(plain.features, 64), Through(plain, 10)

    def from_images() -> Result:
        mine = extract(fake)
        others = real_features if options.real_stored else extract(genuine)
        return ours(mine, others, judge.head(torch.from_numpy(mine)).numpy())

    logits = judge.head(torch.from_numpy(fake_features)).numpy()
    a, b = torch.from_numpy(fake_features), torch.from_numpy(real_features)
    found = {
        "features": compare(
            "features",
            options.pairs,
            lambda: ours(fake_features, real_features, logits),
            lambda: theirs(a, b, known, known_logits),
        ),
        "images": compare(
            "images", options.pairs, from_images, lambda: theirs(fake, genuine, net, net_logits)
        ),
        "all": everything(judge, extract, fake, images(options.train or options.samples), genuine),
        "settings": {**vars(options), "json": None},
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
