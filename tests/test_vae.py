"""The VAE's bound: normalised, below the truth, and tighter with K."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from models.base import Batch, DataSpec, to_signed
from models.nn import discretised_logistic_log_prob
from models.vae import VAE, VAEConfig


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_the_levels_probabilities_sum_to_one(levels: int) -> None:
    torch.manual_seed(0)
    x = torch.arange(levels, dtype=torch.float64).view(-1, 1, 1, 1)
    parts = (torch.randn(1, 1, 4, 1, 1, dtype=torch.float64) * s for s in (1.0, 0.7, 2.0))
    log_mass = discretised_logistic_log_prob(x, *parts, levels)
    assert float(log_mass.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_discretised_logistic_is_the_integral() -> None:
    """Against the definition, sigmoid(b) - sigmoid(a), where that is well conditioned."""
    x = torch.tensor([3.0], dtype=torch.float64).view(1, 1, 1, 1)
    mean, log_scale, levels = 0.1, -1.3, 9
    arguments = (
        torch.tensor([v], dtype=torch.float64).view(1, 1, 1, 1, 1) for v in (0.0, mean, log_scale)
    )
    centre = float(to_signed(x, levels))
    sigmoid = [
        1 / (1 + math.exp(-(centre + d / (levels - 1) - mean) / math.exp(log_scale)))
        for d in (-1, 1)
    ]
    expected = math.log(sigmoid[1] - sigmoid[0])
    assert float(discretised_logistic_log_prob(x, *arguments, levels)) == pytest.approx(expected)


def small() -> tuple[VAE, torch.Tensor]:
    """A VAE trained to need its latent, on flat images; and all 81 images of 1x2x2, 3 levels."""
    torch.manual_seed(0)
    data = DataSpec(shape=(1, 2, 2), levels=3)
    model = VAE(VAEConfig(latent_dim=1, width=4, hidden=16, mixture=1), data)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    flat = every[every.flatten(1).amin(1) == every.flatten(1).amax(1)]
    x = flat.repeat(16, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model.losses(Batch(x), "main")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), every


def exact_log_prob(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """log of the integral of p(x|z) p(z) dz over the one latent, on a fine grid."""
    z = torch.linspace(-8, 8, 4001)[:, None]
    log_prior = -0.5 * (z[:, 0] ** 2 + math.log(2 * math.pi))
    weight = math.log(16 / 4000)
    parts = [
        torch.logsumexp(model._log_likelihood(image.expand(len(z), -1, -1, -1), z) + log_prior, 0)
        for image in x
    ]
    return torch.stack(parts) + weight


def test_the_bound_tightens_with_k_and_stays_below_the_truth() -> None:
    model, every = small()
    with torch.no_grad():
        exact = exact_log_prob(model, every)
        assert float(exact.exp().sum()) == pytest.approx(1.0, abs=1e-3)
        torch.manual_seed(1)
        gaps = []
        for k in (1, 4, 16, 256):
            bounds = torch.stack([model.log_prob(every, samples=k) for _ in range(40)]).mean(0)
            gaps.append(float((exact - bounds).mean()))
    assert all(earlier > later for earlier, later in itertools.pairwise(gaps))
    assert gaps[0] > 0.1
    assert -0.01 < gaps[-1] < 0.1 * gaps[0]


def test_one_importance_sample_is_the_elbo() -> None:
    model, every = small()
    with torch.no_grad():
        torch.manual_seed(0)
        weighted = torch.stack([model.log_prob(every) for _ in range(300)]).mean()
        losses = [model.losses(Batch(every), "main") for _ in range(300)]
    elbo = -torch.stack([found["loss"] for found in losses]).mean()
    assert float(weighted) == pytest.approx(float(elbo), rel=0.01)
    parts = losses[0]["reconstruction_nats"] + losses[0]["kl_nats"]
    assert torch.isclose(parts, losses[0]["loss"])


def test_beta_weighs_the_kl() -> None:
    data = DataSpec(shape=(1, 8, 8), levels=4)
    torch.manual_seed(0)
    model = VAE(VAEConfig(beta=3.0), data)
    found = model.losses(Batch(torch.randint(0, 4, (4, 1, 8, 8))), "main")
    assert torch.isclose(found["loss"], found["reconstruction_nats"] + 3 * found["kl_nats"])


def test_iwae_objective_is_tighter_than_the_elbo() -> None:
    model, every = small()
    iwae = VAE(model.config.model_copy(update={"train_samples": 16}), model.data)
    iwae.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.manual_seed(0)
        elbo = torch.stack([model.losses(Batch(every), "main")["loss"] for _ in range(50)]).mean()
        tight = torch.stack([iwae.losses(Batch(every), "main")["loss"] for _ in range(50)]).mean()
    assert float(tight) < float(elbo)


def test_beta_with_iwae_is_refused() -> None:
    with pytest.raises(ValueError, match="train_samples: 1"):
        VAEConfig(beta=2.0, train_samples=4)
