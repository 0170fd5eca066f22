"""The protocol's likelihood and anomaly numbers, on a model whose probabilities are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig
from models.data import DataSpec
from tasks.evaluation import anomaly, likelihood
from tasks.evaluation.pictures import density, interpolations, latent_plane

DRAWS = {"exact": 3, "bound": 7, "ode": 1, "ais": 1}


class Brightness(GenerativeModel):
    """Independent values, each level with its own probability; `asked` draws are recorded."""

    Config = Config
    paper = "none"
    likelihood = "exact"
    modalities = frozenset({"image", "text", "points"})

    def __init__(self, data: DataSpec, weights: list[float]) -> None:
        super().__init__(None, data)
        self.register_buffer("logs", (torch.tensor(weights) / sum(weights)).log())
        self.asked: list[int] = []

    def sample(self, n: int, **options: Any) -> Tensor:
        raise NotImplementedError

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        self.asked.append(samples)
        return self.logs[x.long()].flatten(1).sum(1)


def test_a_long_likelihood_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Brightness(DataSpec(shape=(5,), levels=256, modality="text"), [1.0] * 256)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(likelihood.time, "monotonic", lambda: next(clock))
    told: list[str] = []
    likelihood.measure(model, np.zeros((300, 5), np.uint8), DRAWS, None, told.append)
    assert told == ["likelihood 128/300", "likelihood 256/300", "likelihood 300/300"]


def test_nats_bits_and_perplexity_are_of_the_discrete_data() -> None:
    model = Brightness(DataSpec(shape=(5,), levels=256, modality="text"), [1.0] * 256)
    x = np.random.default_rng(0).integers(0, 256, (300, 5), np.uint8)
    found, reasons = likelihood.measure(model, x, DRAWS, entropy=None)
    assert found["nats"] == pytest.approx(5 * math.log(256), rel=1e-6)
    assert found["bits_per_dim"] == found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert found["perplexity"] == pytest.approx(256, rel=1e-5)
    assert found["likelihood_draws"] == 3
    assert set(model.asked) == {3}
    assert reasons == {}
    points = Brightness(DataSpec(shape=(2,), levels=256, modality="points"), [1.0] * 256)
    known, _ = likelihood.measure(points, x[:, :2], DRAWS, entropy=5.0)
    assert known["nats_above_entropy"] == pytest.approx(2 * math.log(256) - 5)
    assert "perplexity" not in known


def test_the_draws_that_are_told_are_those_that_were_taken() -> None:
    model = Brightness(DataSpec(shape=(1, 2, 2), levels=2), [1.0, 1.0])
    model.most_draws = 2
    x = np.zeros((4, 1, 2, 2), np.uint8)
    found, _ = likelihood.measure(model, x, DRAWS, None)
    assert found["likelihood_draws"] == 2
    assert set(model.asked) == {2}


def test_an_impossible_example_is_a_reason_and_no_number() -> None:
    model = Brightness(DataSpec(shape=(1, 2, 2), levels=2), [1.0, 0.0])
    x = np.zeros((4, 1, 2, 2), np.uint8)
    x[1] = 1
    found, reasons = likelihood.measure(model, x, DRAWS, None)
    assert found == {}
    assert reasons["nats"] == "1 of 4 test examples have none finite"


def test_letters_are_told_from_data_by_likelihood_and_by_typicality() -> None:
    """A model that likes dark: letters are brighter than near-black data, darker than white data;
    white data are unlikely, and that is typical of them."""
    data = DataSpec(shape=(1, 8, 8), levels=4)
    model = Brightness(data, [8.0, 4.0, 2.0, 1.0])
    random = np.random.default_rng(0)
    black = (random.random((200, 1, 8, 8)) < 0.02).astype(np.uint8)
    found = anomaly.measure(model, black[:100], black[100:], DRAWS)
    assert found["anomaly_auroc"] > 0.99
    assert found["anomaly_auroc_typicality"] > 0.99
    white = 3 - black
    found = anomaly.measure(model, white[:100], white[100:], DRAWS)
    assert found["anomaly_auroc"] < 0.01
    assert found["anomaly_auroc_typicality"] > 0.99


def test_letters_are_of_the_datas_shape_and_differ() -> None:
    for shape, levels in (((1, 8, 8), 17), ((3, 28, 20), 256), ((1, 28, 28), 2)):
        x = anomaly.letters(44, DataSpec(shape=shape, levels=levels))
        assert x.shape == (44, *shape)
        assert x.max() == levels - 1
        assert (x == 0).mean() > 0.3
        assert len({bytes(row) for row in x}) == 44
    assert (anomaly.letters(3, DataSpec(shape=shape, levels=2)) == x[:3]).all()


def test_the_density_sums_to_one_and_lies_where_it_is() -> None:
    data = DataSpec(shape=(2,), levels=16, modality="points")
    weights = [1.0] * 15 + [3.0]
    picture = density(Brightness(data, weights))
    assert picture.shape == (16, 16)
    assert float(picture.sum()) == pytest.approx(1, abs=1e-5)
    assert float(picture[15, 15]) == pytest.approx((3 / 18) ** 2, rel=1e-5)


class Plane(GenerativeModel):
    """Shows its latents: the first in the upper half, the second in the lower."""

    Config = Config
    paper = "none"
    latent_dim = 2  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(), DataSpec(shape=(1, 2, 1), levels=201))
        self.register_buffer("nothing", torch.zeros(1))

    def sample(self, n: int, *, z: Tensor | None = None, **options: Any) -> Tensor:
        assert z is not None
        return (100 + 30 * z).round().clamp(0, 200).to(torch.uint8).view(n, 1, 2, 1)


def test_latents_are_shown_in_order() -> None:
    plane = latent_plane(Plane()).view(16, 16, 2).int()
    assert (plane[:, 1:, 0] >= plane[:, :-1, 0]).all()  # the first grows to the right
    assert (plane[1:, :, 1] <= plane[:-1, :, 1]).all()  # the second grows upwards
    assert plane[0, 0].tolist() == [100 - 56, 100 + 56]  # the quantile of 1/32 is 1.863
    strips = interpolations(Plane()).view(6, 10, 2)
    radius = ((strips.double() - 100) / 30).norm(dim=2)
    assert (radius[:, 5] > 0.9 * radius[:, [0, 9]].min(1).values - 0.1).all()  # not through 0
