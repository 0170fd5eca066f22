"""Annealed importance sampling against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.evaluation import ais
from tasks.evaluation.decoder import AISConfig, annealed, kernel_density
from tests.conftest import tiny_images, tiny_model

SIGMA = 0.3


def linear_gaussian() -> tuple[Tensor, Tensor, Tensor]:
    """x = A z + b + sigma e with z ~ N(0, I): 6 observed values, 3 latents; 4 observations."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 3, generator=generator)
    b = torch.randn(6, generator=generator)
    noise = torch.randn(4, 9, generator=generator)
    return a, b, noise[:, :3] @ a.T + b + SIGMA * noise[:, 3:]


def closed_form(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    covariance = (a @ a.T + SIGMA**2 * torch.eye(len(b))).double()
    marginal = torch.distributions.MultivariateNormal(b.double(), covariance)
    return marginal.log_prob(x.double())


def test_a_linear_gaussian_decoder_has_its_closed_form_both_ways() -> None:
    a, b, x = linear_gaussian()
    chains = 64
    rows = x.repeat_interleave(chains, 0)

    def log_likelihood(z: Tensor) -> Tensor:
        apart = (rows - z @ a.T - b) / SIGMA
        return -0.5 * apart.square().sum(1) - 6 * math.log(SIGMA * math.sqrt(2 * math.pi))

    torch.manual_seed(1)
    schedule = ais.tuned(log_likelihood, torch.randn(len(rows), 3), 800)
    weights = ais.forward(log_likelihood, torch.randn(len(rows), 3), schedule)
    truth = closed_form(a, b, x)
    assert (ais.estimate(weights, chains) - truth).abs().max() < 0.1

    # draws of the true posterior, from which the reversed chains enclose it from above
    precision = a.T @ a / SIGMA**2 + torch.eye(3)
    mean = torch.linalg.solve(precision, a.T @ (rows - b).T / SIGMA**2).T
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    reverse = ais.backward(log_likelihood, posterior.sample(), schedule)
    assert (-ais.estimate(reverse, chains) - truth).abs().max() < 0.1


def test_short_chains_are_below_and_above_on_average() -> None:
    """With few temperatures both are biased, to the sides that they promise."""
    a, b, x = linear_gaussian()
    rows = x[:1].expand(4000, -1)

    def log_likelihood(z: Tensor) -> Tensor:
        apart = (rows - z @ a.T - b) / SIGMA
        return -0.5 * apart.square().sum(1) - 6 * math.log(SIGMA * math.sqrt(2 * math.pi))

    torch.manual_seed(2)
    schedule = ais.tuned(log_likelihood, torch.randn(4000, 3), 8, leapfrog=3)
    truth = float(closed_form(a, b, x)[0])
    assert float(ais.forward(log_likelihood, torch.randn(4000, 3), schedule).mean()) < truth - 0.3
    precision = a.T @ a / SIGMA**2 + torch.eye(3)
    mean = torch.linalg.solve(precision, a.T @ (rows[0] - b) / SIGMA**2)
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    start = posterior.sample(torch.Size([4000]))
    assert float(-ais.backward(log_likelihood, start, schedule).mean()) > truth + 0.3


def test_levels_under_gaussian_noise_sum_to_one_and_are_the_integral() -> None:
    levels = 5
    x = torch.arange(levels, dtype=torch.uint8).view(levels, 1, 1, 1)
    for mean in (-1.3, -0.2, 0.9):
        decode = lambda z, mean=mean: torch.full((len(z), 1, 1, 1), mean)  # noqa: E731
        log_mass = ais.gaussian(decode, x, levels, 0.2)(torch.zeros(levels, 1))
        assert float(log_mass.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    normal = torch.distributions.Normal(0.9, 0.2)
    edges = torch.tensor([0.25, 0.75])  # of level 3 of 0..4, at 0.5
    expected = normal.cdf(edges[1]) - normal.cdf(edges[0])
    assert float(log_mass[3].exp()) == pytest.approx(float(expected), rel=1e-4)


def test_a_gan_is_measured_and_its_own_images_are_likelier_than_noise() -> None:
    torch.manual_seed(0)
    model = tiny_model("gan").eval()
    config = AISConfig(images=6, chains=2, steps=20, leapfrog=3)
    with torch.no_grad():
        mine = model.sample(12).numpy()
    noise = np.random.default_rng(0).integers(0, 4, mine.shape, np.uint8)
    with torch.no_grad():
        good = annealed(model, mine[6:], mine[:6], config)
        bad = annealed(model, mine[6:], noise[:6], config)
    assert good["ais_nats"] < bad["ais_nats"] - 20
    assert math.isfinite(good["ais_gap_nats"])
    assert good["ais_bits_per_dim"] == pytest.approx(good["ais_nats"] / (64 * math.log(2)))


def test_kernel_density_is_the_formula() -> None:
    x = tiny_images(12).numpy()
    found = kernel_density(x[:4], x[4:8], x[8:], 4)
    deviation = found["kde_deviation"]
    scaled = x.reshape(12, -1) / 3.0
    logs = []
    for row in scaled[8:]:
        height = deviation * math.sqrt(2 * math.pi)
        densities = [
            np.prod(np.exp(-((row - c) ** 2) / (2 * deviation**2)) / height) for c in scaled[:4]
        ]
        logs.append(math.log(np.mean(densities)))
    assert found["kde_log_density"] == pytest.approx(np.mean(logs), rel=1e-4)
