"""The VAE's bound: normalised, below the truth, tighter with K; and what its options mean."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import distributions

from models import vae
from models.data import Batch, DataSpec, to_signed
from models.nn import discretised_logistic_log_prob
from models.noise import noise_shard
from models.vae import VAE, VAEConfig
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tests.conftest import tiny_images

POINTS = DataSpec(shape=(2,), levels=256, modality="points")


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
        torch.logsumexp(model._log_likelihood(image[None], z[None])[0] + log_prior, 0)
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


def test_the_bernoulli_decoder_sums_to_one() -> None:
    torch.manual_seed(0)
    for body in ("conv", "mlp"):
        data = DataSpec(shape=(1, 2, 2), levels=2)
        model = VAE(VAEConfig(body=body, latent_dim=3, hidden=8, width=4), data)
        every = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
        z = 3 * torch.randn(1, 5, 3).expand(len(every), 5, 3)
        total = model._log_likelihood(every.to(torch.uint8), z).exp().sum(0)
        assert torch.allclose(total, torch.ones(5), atol=1e-5)


def test_the_bernoulli_decoder_survives_extreme_logits() -> None:
    model = VAE(VAEConfig(body="mlp", latent_dim=1), DataSpec(shape=(1, 1, 2), levels=2))
    logits = torch.tensor([90.0, -200.0], requires_grad=True)
    model.decoder = torch.nn.Sequential(torch.nn.Identity())
    model.decoder.forward = lambda z: logits.expand(len(z), 2)  # type: ignore[method-assign]
    x = torch.tensor([[1, 0], [0, 0], [0, 1]], dtype=torch.uint8).view(3, 1, 1, 2)
    found = model._log_likelihood(x, torch.zeros(3, 1, 1))[:, 0]
    assert found.tolist() == pytest.approx([0.0, -90.0, -290.0], abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-2.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("levels", [2, 5])
def test_many_samples_at_once_are_each_samples_own(levels: int) -> None:
    torch.manual_seed(0)
    data = DataSpec(shape=(2, 4, 4), levels=levels)
    model = VAE(VAEConfig(latent_dim=3, width=4, hidden=8), data)
    x, z = torch.randint(0, levels, (3, 2, 4, 4)).to(torch.uint8), torch.randn(3, 4, 3)
    together = model._log_likelihood(x, z)
    alone = [
        [model._log_likelihood(x[b, None], z[b, None, k, None]) for k in range(4)] for b in range(3)
    ]
    assert torch.allclose(together, torch.tensor(alone), atol=1e-4)


def test_log_prob_streams_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of bounded size, and yet it is the mean of exactly K."""
    model, every = small()
    x, sizes = every[:4], []
    model.decoder.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    with torch.no_grad():
        torch.manual_seed(0)
        whole = torch.stack([model.log_prob(x, samples=40) for _ in range(60)]).mean(0)
        assert set(sizes) == {160}
        sizes.clear()
        monkeypatch.setattr(vae, "AT_ONCE", 50)
        chunks = torch.stack([model.log_prob(x, samples=40) for _ in range(60)]).mean(0)
    assert sizes[:4] == [48, 48, 48, 16]
    assert torch.allclose(whole, chunks, atol=0.05)


def test_the_weight_of_the_kl_grows_with_the_steps() -> None:
    torch.manual_seed(0)
    model = VAE(VAEConfig(beta=2.0, kl_warmup_steps=4), DataSpec(shape=(1, 8, 8), levels=4))
    batch = Batch(torch.randint(0, 4, (4, 1, 8, 8)))
    weights = []
    for _ in range(6):
        found = model.losses(batch, "main")
        weights.append(float((found["loss"] - found["reconstruction_nats"]) / found["kl_nats"]))
        model.after_step("main")
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0], abs=1e-2)


def test_warm_up_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(folder: str, steps: int) -> VAE:
        torch.manual_seed(0)
        config = VAEConfig(body="mlp", hidden=8, latent_dim=2, kl_warmup_steps=20)
        model = VAE(config, DataSpec(shape=(1, 8, 8), levels=4))
        settings = TrainConfig(
            batch_size=8, budget=Budget(steps=steps), log_every=3, checkpoint_every=3
        )
        train(model, TrainData(tiny_images(16)), settings, tmp_path / folder)
        return model

    straight = run("straight", 9)
    run("resumed", 5)
    resumed = run("resumed", 9)
    assert int(resumed.steps) == 9
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_points_are_modelled_by_the_fully_connected_body() -> None:
    assert VAE(VAEConfig(hidden=8), POINTS).encode(torch.zeros(2, 2))[0].shape == (2, 32)  # auto
    with pytest.raises(ValueError, match="body: mlp"):
        VAE(VAEConfig(body="conv"), POINTS)
    torch.manual_seed(0)
    model = VAE(VAEConfig(body="mlp", hidden=32, latent_dim=2, mixture=1), POINTS)
    t = torch.arange(40, 216, dtype=torch.uint8)
    line = torch.stack([t, 255 - t], 1)  # one coordinate tells the other: the latent must
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model.losses(Batch(line), "main")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        axis = torch.arange(256, dtype=torch.uint8)
        cells = torch.cartesian_prod(axis, axis)
        z = torch.randn(1, 1, 2).expand(len(cells), 1, 2)
        total = model._log_likelihood(cells, z).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-3)
        independent = -2 * math.log(len(line))  # of the best model that knows no correlation
        assert float(model.log_prob(line, samples=50).mean()) > independent + 0.5
        drawn = model.sample(256).float()
        assert float(torch.corrcoef(drawn.T)[0, 1]) < -0.9
        mean = model.sample(256, z=torch.zeros(256, 2))
        assert len(mean.unique(dim=0)) == 1
        assert len(model.sample(5, temperature=0.0).unique(dim=0)) == 1
        noisy = model._draw(torch.zeros(256, 2), 1.0)  # what `sample` adds without given latents
        assert len(noisy.unique(dim=0)) > 20


def test_the_vamp_prior_is_the_mixture_of_posteriors() -> None:
    torch.manual_seed(0)
    data = DataSpec(shape=(1, 4, 4), levels=2)
    model = VAE(VAEConfig(body="mlp", hidden=8, latent_dim=3, pseudo_inputs=5), data).eval()
    x = torch.randint(0, 2, (6, 1, 4, 4)).to(torch.uint8)
    with torch.no_grad():
        mean, log_var = model.encode(x)
        z, log_ratio = model._latents(mean, log_var, model._prior(), 4)
        centres, log_vars = model._posterior(model.pseudo.clamp(-1, 1))
    parts = distributions.Independent(distributions.Normal(centres, (0.5 * log_vars).exp()), 1)
    prior = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(5)), parts)
    posterior = distributions.Normal(mean[:, None], (0.5 * log_var).exp()[:, None])
    expected = prior.log_prob(z) - posterior.log_prob(z).sum(2)
    assert torch.allclose(log_ratio, expected, atol=1e-4)
    model.losses(Batch(x), "main")["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_dropout_and_samples_do_not_depend_on_the_number_of_workers() -> None:
    """The pseudo-inputs are no rows of the batch: all workers drop the same of their units."""
    torch.manual_seed(0)
    config = VAEConfig(body="mlp", hidden=8, dropout=0.3, pseudo_inputs=5, train_samples=3)
    model = VAE(config, DataSpec(shape=(1, 4, 4), levels=2))
    x = torch.randint(0, 2, (6, 1, 4, 4)).to(torch.uint8)

    def loss(rank: int, world: int) -> float:
        torch.manual_seed(1)
        mine = x.chunk(world)[rank]
        with noise_shard(rank, world):
            return float(model.losses(Batch(mine), "main")["loss"].detach())

    assert (loss(0, 2) + loss(1, 2)) / 2 == pytest.approx(loss(0, 1), rel=1e-5)
