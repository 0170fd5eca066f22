"""The restricted Boltzmann machine: free energy, log Z, Gibbs chains."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models.data import Batch, DataSpec
from models.rbm import RBM, RBMConfig


def randomised(levels: int, **changes: int) -> tuple[RBM, Tensor]:
    """Random weights of a size that matters, and all states of the visible units."""
    torch.manual_seed(0)
    data = DataSpec(shape=(1, 2, 2), levels=levels)
    model = RBM(RBMConfig(**{"hidden": 3, "chains": 6, "ais_steps": 300, **changes}), data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.counts.copy_(torch.randint(0, 20, model.counts.shape))
    every = torch.tensor(list(itertools.product(range(levels), repeat=4)))
    return model.eval(), every.view(-1, 1, 2, 2)


@pytest.mark.parametrize("levels", [2, 3])
def test_free_energy_sums_out_the_hidden_units(levels: int) -> None:
    model, every = randomised(levels)
    v = every.flatten(1)
    ones = v.float() if levels == 2 else torch.eye(levels)[v].flatten(1)
    total = torch.zeros(len(v))
    for bits in itertools.product([0.0, 1.0], repeat=3):
        h = torch.tensor(bits)
        energy = -ones @ model.visible_bias - model.hidden_bias @ h - ones @ model.weight @ h
        total = total + torch.exp(-energy)
    assert torch.allclose(-model.free_energy(v), total.log(), atol=1e-4)


@pytest.mark.parametrize("levels", [2, 3])
def test_log_z_is_that_of_enumeration(levels: int) -> None:
    model, every = randomised(levels, ais_chains=400)
    with torch.no_grad():
        exact = float(torch.logsumexp(-model.free_energy(every.flatten(1)), 0))
        log_z, error = model.log_partition()
        assert log_z == pytest.approx(exact, abs=0.05)
        assert 0 < error < 0.05
        assert float(model.log_prob(every).exp().sum()) == pytest.approx(1, abs=0.05)
    assert model.likelihood_note.startswith("ais: 400 chains, 300 steps, log Z +- 0.0")


def test_log_z_is_kept_until_the_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = randomised(2)
    calls: list[int] = []
    anneal = model._anneal
    monkeypatch.setattr(model, "_anneal", lambda: (calls.append(1), anneal())[1])
    before = model.log_partition()
    torch.manual_seed(9)
    assert model.log_partition() == before
    assert len(calls) == 1
    with torch.no_grad():
        model.visible_bias.add_(1.0)
    assert model.log_partition()[0] > before[0]
    assert len(calls) == 2


@pytest.mark.parametrize("levels", [2, 3])
def test_gibbs_chains_reach_the_models_distribution(levels: int) -> None:
    model, every = randomised(levels)
    with torch.no_grad():
        model.weight.mul_(0.5)  # so that chains mix
        expected = (-model.free_energy(every.flatten(1))).softmax(0)
        torch.manual_seed(1)
        drawn = model.sample(20_000, gibbs_steps=30).flatten(1).long()
    place = drawn @ torch.tensor([levels**3, levels**2, levels, 1])
    found = torch.bincount(place, minlength=len(every)) / len(drawn)
    assert float((found - expected).abs().sum()) < 0.1
    cold = model.sample(3, temperature=0, gibbs_steps=5)
    assert (cold == cold[0]).all()


def test_the_gradient_is_data_minus_fantasy() -> None:
    model, every = randomised(3)
    x = every[::7].to(torch.uint8)
    model.losses(Batch(x), "main")["loss"].backward()
    with torch.no_grad():
        statistics = []
        for v in (x.flatten(1), model.chain):
            ones = torch.eye(3)[v.long()].flatten(1)
            share = (ones @ model.weight + model.hidden_bias).sigmoid()
            statistics.append(ones.T @ share / len(v))
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, statistics[1] - statistics[0], atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3])
def test_the_losss_value_is_the_pseudo_likelihood(levels: int) -> None:
    model, every = randomised(levels)
    v = every[5:6].flatten(1)
    expected = 0.0
    with torch.no_grad():
        for site in range(4):
            others = v.repeat(levels, 1)
            others[:, site] = torch.arange(levels)
            expected -= float((-model.free_energy(others)).log_softmax(0)[v[0, site]])
        found = model._pseudo_nats(v.expand(20_000, -1))
    assert float(found) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("levels", [2, 3])
def test_training_finds_a_correlation(levels: int) -> None:
    """Two halves that are always equal: with independent values, log 2 more nats each."""
    torch.manual_seed(0)
    half = torch.randint(0, 2, (64, 1, 1, 2))
    x = torch.cat([half, half], 2).to(torch.uint8) * (levels - 1)
    model = RBM(
        RBMConfig(hidden=8, chains=256, ais_steps=200), DataSpec(shape=(1, 2, 2), levels=levels)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(300):
        torch.manual_seed(step)
        model.losses(Batch(x), "main")["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nats = -float(model.log_prob(x).mean())
        rendered = model.reconstruct(x)
    assert nats < 2.2  # independent: 4 log 2 = 2.77; the data's entropy: 2 log 2 = 1.39
    assert torch.equal(rendered, x)


def test_biases_start_at_the_first_batchs_frequencies() -> None:
    data = DataSpec(shape=(1, 1, 2), levels=2)
    model = RBM(RBMConfig(hidden=2), data)
    x = torch.tensor([[0, 1]] * 6 + [[1, 1]] * 2, dtype=torch.uint8).view(-1, 1, 1, 2)
    model.losses(Batch(x), "main")
    assert torch.allclose(model.visible_bias.sigmoid(), torch.tensor([0.3, 0.9]))
    model.losses(Batch(1 - x), "main")
    assert torch.allclose(model.visible_bias.sigmoid(), torch.tensor([0.3, 0.9]))


def test_too_many_units_are_refused_in_words() -> None:
    reason = RBM.unsuited(DataSpec(shape=(1, 28, 28), levels=256))
    assert reason is not None
    assert "binarized_mnist" in reason
    assert RBM.unsuited(DataSpec(shape=(1, 28, 28), levels=2)) is None
