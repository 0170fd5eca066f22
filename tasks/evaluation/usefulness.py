"""Are the samples of use: what a classifier learns from them, tested on real images.

The classification accuracy score (Ravuri & Vinyals 2019): train a classifier on labelled samples
alone, test it on real images, beside one that was trained on as many real images. And the gain:
train on a few real images of each class, with and without samples added.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, Positive
from tasks.data.shards import Split
from tasks.evaluation import classifier, conditions

WIDTH, FEATURES, LR = 32, 64, 2e-3  # of each classifier that is trained here


class UsefulnessConfig(Config):
    samples: int = Field(10_000, ge=0)  # to train on, at most as many as real ones; 0: not measured
    steps: Positive = 500  # of each of the four classifiers
    batch_size: Positive = 64
    per_class: Positive = 10  # real images of each class in the small set


def unsuited(model: GenerativeModel, train: Split, config: UsefulnessConfig) -> str | None:
    """Why it cannot be measured, or None."""
    if not model.conditions:
        return "the family takes no condition, so its samples have no labels to learn from"
    if "source" in model.conditions:
        return "the family translates images; it makes no new ones"
    if train.label is None or train.label.ndim != 1 or len(model.data.classes) < 2:
        return "the dataset has no classes"
    return "evaluation.usefulness.samples is 0" if config.samples == 0 else None


def measure(
    model: GenerativeModel, train: Split, test: Split, config: UsefulnessConfig, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics, and reasons for those that there are not.

    Returns:
        `cas`: accuracy on `test` of a classifier trained on samples asked for with the conditions
        of the first rows of `train`; `cas_real`: of one trained on those rows themselves.
        `small_set_accuracy`: of one trained on `per_class` real images of each class;
        `small_set_gain`: what samples add to it, the real ones repeated to half of the whole.
        Each with `_std_error`, of the finite test set.
    """
    reason = unsuited(model, train, config)
    if reason:
        return {}, {"cas": reason, "small_set_gain": reason}
    assert train.label is not None
    assert test.label is not None
    n = min(config.samples, len(train.x))
    real, label = torch.from_numpy(train.x[:n]), torch.from_numpy(train.label[:n])
    fake = conditions.draw(model, train, n, 500)
    rows = _few(train.label, config.per_class, len(model.data.classes), seed)
    few, few_label = torch.from_numpy(train.x[rows]), torch.from_numpy(train.label[rows])
    again = max(1, round(n / len(rows)))
    mixed = torch.cat([few.repeat(again, 1, 1, 1), fake])
    mixed_label = torch.cat([few_label.repeat(again), label])

    def accuracy(x: Tensor, y: Tensor) -> float:
        fitted = classifier.fit(
            model.data,
            x,
            y,
            width=WIDTH,
            features=FEATURES,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=LR,
            seed=seed,
        )
        return classifier.accuracy(fitted, *map(torch.from_numpy, (test.x, test.label)))

    with torch.enable_grad():  # the protocol around it computes without
        small, augmented = accuracy(few, few_label), accuracy(mixed, mixed_label)
        found = {"cas": accuracy(fake, label), "cas_real": accuracy(real, label)}
    found |= {"small_set_accuracy": small, "small_set_gain": augmented - small}
    errors = {f"{name}_std_error": _error(found[name], len(test.x)) for name in ("cas", "cas_real")}
    both = _error(small, len(test.x)), _error(augmented, len(test.x))
    errors |= {
        "small_set_accuracy_std_error": both[0],
        "small_set_gain_std_error": math.hypot(*both),
    }
    return {**found, **errors, "cas_samples": n, "small_set_images": len(rows)}, {}


def _few(label: np.ndarray, per_class: int, classes: int, seed: int) -> np.ndarray:
    """Rows of up to `per_class` images of each class."""
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(label == c))[:per_class] for c in range(classes)]
    return np.concatenate(rows)


def _error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)
