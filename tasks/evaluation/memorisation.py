"""Whether samples are new: how near they are to the training images, and exact copies."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.floors import NEW
from tasks.evaluation.manifold import nearest
from tasks.evaluation.quality import Found, Seen, Yardstick

Images = NDArray[np.uint8]
SHOWN = 16  # samples in the picture


def measure(seen: Seen, yardstick: Yardstick, *, finite: bool) -> Found:
    """`nearest_train_ratio`: median distance, in the features, from a sample to its nearest
    training image, over the same of test images; 1 for new images of the same kind, 0 for copies.
    Left out where features are not `finite`.

    `train_duplicates`: samples that equal a training image in every pixel, and their share; the
    same of test images as floors. `distinct_samples`: how many different ones there are.
    """
    train, real = yardstick.train.x, yardstick.real
    assert real is not None
    known = set(_digests(train))
    metrics: dict[str, Any] = {}
    for ending, images in (("", seen.images), ("_floor", yardstick.test.x)):
        digests = _digests(images)
        copies = sum(digest in known for digest in digests)
        metrics[f"train_duplicates{ending}"] = copies
        metrics[f"train_duplicate_share{ending}"] = copies / len(images)
        if not ending:
            metrics["distinct_samples"] = len(set(digests))
    if not finite:
        return metrics, {}
    usual = real.floors_of(len(seen.features))[NEW]
    if usual == 0:
        reason = "half of the test images have the features of a training image"
        return metrics, {"nearest_train_ratio": reason}
    apart = float(np.median(nearest(seen.features, real.features["train"])[0]))
    metrics["nearest_train_ratio"] = apart / usual
    return metrics, {}


def neighbours(seen: Seen, yardstick: Yardstick) -> tuple[Images, Images]:
    """The first samples, and the training image nearest to each in the features."""
    real = yardstick.real
    assert real is not None
    places = nearest(seen.features[:SHOWN], real.features["train"])[1]
    return seen.images[:SHOWN], yardstick.train.x[places]


def _digests(images: Images) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
