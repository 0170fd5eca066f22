"""The mixture of Gaussians: scikit-learn's density and iterations, its own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from models.data import Batch, DataSpec
from models.gmm import GMM, GMMConfig
from models.noise import dequantise
from tasks.training.worker import size
from tests.conftest import tiny_images

DATA = DataSpec(shape=(1, 4, 4), levels=8)
KINDS = ["full", "tied", "diag", "spherical"]


def fitted(kind: str, iterations: int, reg_covar: float = 1e-3) -> tuple[GMM, list[float]]:
    model = GMM(GMMConfig(components=3, covariance=kind, tol=0, reg_covar=reg_covar), DATA)
    x = Batch(tiny_images(80, DATA))
    losses, bounds = [], []
    for step in range(iterations):
        torch.manual_seed(step)
        losses.append(float(model.fit(x)["loss"]))
        bounds.append(float(model.bound))
    assert losses[-1] == pytest.approx(-bounds[-1] + DATA.dimensions * math.log(8), rel=1e-6)
    return model, bounds


def test_the_size_of_a_fitted_family_is_that_of_its_tables() -> None:
    assert size(GMM(GMMConfig(components=3, covariance="diag"), DATA)) == 3 + 3 * 16 + 3 * 16
    assert size(torch.nn.BatchNorm1d(5)) == 10  # buffers do not count where there are parameters


@pytest.mark.parametrize("kind", KINDS)
def test_density_and_iterations_are_scikit_learns(kind: str) -> None:
    model, bounds = fitted(kind, 6)
    y, _ = model._dequantised(tiny_images(80, DATA))
    reference = GaussianMixture(
        3,
        covariance_type=kind,
        max_iter=6,
        tol=0,
        reg_covar=1e-3 / 64,
        random_state=np.random.RandomState(int(model.seed)),
    ).fit(y.numpy())
    np.testing.assert_allclose(model.log_density(y), reference.score_samples(y.numpy()), rtol=1e-8)
    assert bounds[-1] == pytest.approx(reference.lower_bound_, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_em_never_lowers_the_likelihood(kind: str) -> None:
    _, bounds = fitted(kind, 12, reg_covar=1e-7)
    assert (np.diff(bounds) > -1e-6).all()
    assert bounds[-1] > bounds[0]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_mixtures_moments(kind: str) -> None:
    """Away from the edges, where nothing is clamped, and at 256 levels, so finely cut."""
    torch.manual_seed(1)
    model = GMM(GMMConfig(components=2, covariance=kind), DataSpec(shape=(2,), levels=256))
    factor = torch.tensor([[1.0, 0.6], [0.0, 0.8]]).double() / 0.08
    with torch.no_grad():
        model.weight.copy_(torch.tensor([0.3, 0.7]))
        model.mean.copy_(torch.tensor([[0.4, 0.6], [0.6, 0.4]]))
        model.whiten.copy_(
            factor
            if model.whiten.shape[-1] == 2 and model.kind in ("full", "tied")
            else torch.tensor(1 / 0.08)
        )
    covariance = torch.linalg.inv(factor @ factor.T)
    if model.kind in ("diag", "spherical"):
        covariance = 0.08**2 * torch.eye(2).double()
    apart = torch.tensor([0.2, -0.2]).double()
    expected = covariance + 0.3 * 0.7 * apart[:, None] * apart
    drawn = (model.sample(40_000).double() + 0.5) / 256
    assert torch.allclose(drawn.mean(0), torch.tensor([0.54, 0.46]).double(), atol=3e-3)
    assert torch.allclose(torch.cov(drawn.T), expected, atol=6e-4)
    cold = model.sample(5, temperature=0)
    assert (cold == torch.tensor([153, 102])).all()


def test_points_of_a_mixture_cost_its_entropy() -> None:
    """Two far Gaussians on the grid: the likelihood is that of the truth."""
    torch.manual_seed(0)
    data = DataSpec(shape=(2,), levels=256, modality="points")
    centre = torch.tensor([[80.0, 90.0], [180.0, 150.0]])[torch.arange(4000) % 2]
    x = (centre + 12 * torch.randn(4000, 2)).floor().clamp(0, 255).to(torch.uint8)
    entropy = math.log(2) + 1 + math.log(2 * math.pi * 144)
    model = GMM(GMMConfig(components=2), data)
    while not model.converged:
        model.fit(Batch(x[:2000]))
    assert model.kind == "full"
    assert float(-model.log_prob(x[2000:], samples=4).mean()) == pytest.approx(entropy, abs=0.04)


def test_resumed_from_the_state_is_straight() -> None:
    straight, _ = fitted("full", 6)
    first, _ = fitted("full", 3)
    resumed = GMM(first.config, DATA)
    resumed.load_state_dict(first.state_dict())
    for step in range(3, 6):
        torch.manual_seed(step)
        resumed.fit(Batch(tiny_images(80, DATA)))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_it_ends_when_nothing_is_gained_or_at_the_last_iteration() -> None:
    for changes, expected in (({"tol": 1e3}, 2), ({"tol": 0, "iterations": 4}, 4)):
        model = GMM(GMMConfig(components=3, covariance="spherical", **changes), DATA)
        while not model.converged:
            model.fit(Batch(tiny_images(80, DATA)))
        assert int(model.iteration) == expected


def test_a_part_of_too_much_data_is_the_same_at_every_iteration() -> None:
    model = GMM(GMMConfig(components=2, fit_values=16 * 30), DATA)
    parts = [model._dequantised(tiny_images(80, DATA))[0] for _ in range(2)]
    assert parts[0].shape == (30, 16)
    assert torch.equal(*parts)


def test_more_draws_are_tighter_and_wide_data_is_diagonal() -> None:
    model, _ = fitted("full", 4)
    x = tiny_images(40, DATA, seed=1)
    torch.manual_seed(0)
    one, many = model.log_prob(x).mean(), model.log_prob(x, samples=32).mean()
    assert float(many) > float(one)
    assert dequantise(x, 8)[1] == pytest.approx(-16 * math.log(8))
    assert GMM(GMMConfig(components=1), DataSpec(shape=(3, 16, 16), levels=4)).kind == "diag"
