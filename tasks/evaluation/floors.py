"""The floors: what real images score in the samples' place, computed once and stored.

Training images stand for samples, as many of them as there are samples, since what a set scores
depends on its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation import fidelity, kernel_distance
from tasks.evaluation.manifold import K_COVERAGE, manifold_metrics, nearest

Rows = NDArray[np.float32]
NEW = "nearest_test_distance"  # median distance from a test image to its nearest training image
SIZE = "rows"  # of training and of test images in the samples' place


def size(features: Mapping[str, Rows], samples: int) -> list[int]:
    """How many training and test images stand for that many samples."""
    return [len(features[name][:samples]) for name in ("train", "test")]


def compute(features: Mapping[str, Rows], samples: int) -> dict[str, Any]:
    """Each floor by the metric's name, of features `[N, D]` of `train` and `test`; without those
    that take more images than there are. And `NEW`, and what they hold for under `SIZE`."""
    train, test = features["train"], features["test"]
    alike, dimensions = train[:samples], train.shape[1]
    found: dict[str, Any] = {SIZE: size(features, samples)}
    if min(len(alike), len(test)) > dimensions:
        found["frechet_distance"] = fidelity.frechet_distance(alike, test)
    if min(len(train), len(test[:samples])) > dimensions:
        found["frechet_distance_train"] = fidelity.frechet_distance(test[:samples], train)
    if min(len(alike), len(test)) > K_COVERAGE:
        found["kid"] = kernel_distance.kid(alike, test).mean
        found |= manifold_metrics(test, alike)
    found[NEW] = float(np.median(nearest(test, train)[0]))
    return found
