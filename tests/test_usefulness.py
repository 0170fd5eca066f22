"""A classifier learns from samples what they hold, and nothing from what they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config
from models.data import DataSpec
from tasks.data.shards import Split
from tasks.evaluation.usefulness import UsefulnessConfig, measure

DATA = DataSpec(shape=(1, 8, 8), levels=4, classes=("left", "right"))
QUICK = UsefulnessConfig(samples=400, steps=60, per_class=2)


def images(label: Tensor, seed: int) -> Tensor:
    """A brighter half, under much noise: `[N, 1, 8, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (len(label), 1, 8, 8), generator=generator)
    for side in (0, 1):
        x[label == side, :, :, 4 * side : 4 * side + 4] += torch.bernoulli(
            torch.full((int((label == side).sum()), 1, 8, 4), 0.35), generator=generator
        ).long()
    return x.to(torch.uint8)


def split(n: int, seed: int) -> Split:
    label = torch.arange(n) % 2
    return Split(images(label, seed).numpy(), label.numpy(), None, None)


class Sampler(GenerativeModel):
    """Perfect samples of the class `answer(label)`."""

    Config = Config
    conditions = frozenset({"label"})
    likelihood = "none"

    def __init__(self, answer: Any) -> None:
        super().__init__(Config(), DATA)
        self.answer, self.calls = answer, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def losses(self, batch: Any, phase: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def sample(self, n: int, *, label: Tensor | None = None, **_: Any) -> Tensor:
        assert label is not None
        self.calls += 1
        return images(self.answer(label), 100 + self.calls)


@torch.no_grad()
def measured(answer: Any) -> dict[str, Any]:
    return measure(Sampler(answer), split(400, 1), split(500, 2), QUICK, 0)[0]


def test_good_samples_teach_as_much_as_real_images() -> None:
    found = measured(lambda label: label)
    assert found["cas_real"] > 0.9
    assert found["cas"] == pytest.approx(found["cas_real"], abs=0.05)
    assert found["small_set_accuracy"] < found["cas_real"] - 0.05
    assert found["small_set_gain"] > 0.05
    assert found["cas_std_error"] == pytest.approx(np.sqrt(found["cas"] * (1 - found["cas"]) / 500))
    assert (found["cas_samples"], found["small_set_images"]) == (400, 4)


def test_samples_of_the_wrong_class_teach_the_wrong_thing() -> None:
    assert measured(lambda label: 1 - label)["cas"] < 0.1


def test_it_is_said_why_it_is_not_measured() -> None:
    model = Sampler(lambda label: label)
    labelled = split(20, 1)
    for change, words in (
        ({"conditions": frozenset()}, "no condition"),
        ({"conditions": frozenset({"source"})}, "translates"),
    ):
        for name, value in change.items():
            setattr(model, name, value)
        metrics, reasons = measure(model, labelled, labelled, QUICK, 0)
        assert metrics == {}
        assert words in reasons["cas"]
    model.conditions = frozenset({"label"})  # type: ignore[misc]
    bare = labelled._replace(label=None)
    assert "no classes" in measure(model, bare, bare, QUICK, 0)[1]["cas"]
    nothing = UsefulnessConfig(samples=0)
    assert "samples is 0" in measure(model, labelled, labelled, nothing, 0)[1]["cas"]
