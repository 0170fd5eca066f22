"""Flow matching: solvers, the likelihood in closed form, Hutchinson's trace, optimal pairing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import flow_matching
from models.data import Batch, DataSpec
from models.flow_matching import FlowMatching, FlowMatchingConfig, transported
from models.flow_matching.divergence import exact_trace, hutchinson
from models.noise import noise_shard
from tests.conftest import TINY

POINTS = DataSpec(shape=(2,), levels=256, modality="points")
MEAN, SPREAD = 0.2, 0.3


def small(data: DataSpec = TINY, **changes: Any) -> FlowMatching:
    torch.manual_seed(0)
    model = FlowMatching(FlowMatchingConfig(width=8, hidden=16, **changes), data)
    with torch.no_grad():  # away from the zeros at which it starts
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gaussian(data: DataSpec, wobble: float = 0.0, **changes: Any) -> FlowMatching:
    """The velocity whose flow takes N(0, I) to N(MEAN, SPREAD^2) along the linear path, and a
    smooth disturbance of it."""
    model = small(data, **changes)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 + (t * SPREAD) ** 2
        straight = MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)
        return straight + wobble * torch.sin(2 * x.roll(1, -1) + 3 * t)

    model.velocity = velocity  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("data", [TINY, POINTS], ids=["hutchinson", "exact"])
def test_the_density_is_the_closed_form(data: DataSpec) -> None:
    """A Gaussian's Jacobian is a multiple of the identity: Rademacher probes are exact too."""
    model = gaussian(data, rtol=1e-6, atol=1e-7)
    y = torch.rand(5, *data.shape, dtype=torch.float64) * 2 - 1
    each = -0.5 * ((y - MEAN) / SPREAD).square() - math.log(SPREAD * math.sqrt(2 * math.pi))
    assert torch.allclose(model.log_density(y), each.flatten(1).sum(1), atol=1e-3)


@pytest.mark.parametrize("data", [TINY, POINTS], ids=["images", "points"])
def test_probabilities_are_those_of_the_bins(data: DataSpec) -> None:
    """log P(x) from `log_prob` against the Gaussian's integral: the volume is right."""
    torch.manual_seed(0)
    data = data.model_copy(update={"levels": 64})
    model = gaussian(data, likelihood_draws=8)
    x = torch.randint(8, 56, (3, *data.shape), dtype=torch.uint8)
    edges = [(x.double() + i) * (2 / 64) - 1 for i in (0, 1)]
    low, high = (0.5 * (1 + torch.erf((e - MEAN) / SPREAD / math.sqrt(2))) for e in edges)
    expected = (high - low).log().flatten(1).sum(1)
    found = model.log_prob(x, samples=40).double()
    assert torch.allclose(found, expected, atol=0.02 * data.dimensions)


def test_the_points_exact_trace_is_the_jacobians() -> None:
    model = small(POINTS).double()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.4, dtype=torch.float64)
    found = exact_trace(model.velocity(x, t), x)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: model.velocity(row[None], t)[0], x[i].detach()
        )
        assert float(found[i]) == pytest.approx(float(jacobian.trace()), rel=1e-9)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe: str) -> None:
    model = small(DataSpec(shape=(1, 4, 4), levels=4), probe=probe)
    x = torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        x = x.expand(4000, 1, 4, 4).clone()
    x.requires_grad_()
    v = model.velocity(x, torch.tensor(0.3))
    found = hutchinson(v, x, model._probe(x))
    one = x[:1].detach().requires_grad_()
    expected = float(exact_trace(model.velocity(one, torch.tensor(0.3)), one))
    error = float(found.std()) / math.sqrt(4000)
    assert abs(expected) > 10 * error  # else a zero would pass
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error)


def test_the_solvers_agree_in_the_limit() -> None:
    torch.manual_seed(0)
    model = gaussian(TINY, wobble=1.0, rtol=1e-6, atol=1e-6)
    z = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        truth = model.flow(z, (0.0, 1.0), steps=1, solver="dopri5")
        errors = {
            (solver, steps): float(
                (model.flow(z, (0.0, 1.0), steps=steps, solver=solver) - truth).abs().max()
            )
            for solver in ("euler", "heun")
            for steps in (16, 64)
        }
    assert float((truth - z).abs().max()) > 0.5
    assert errors["euler", 64] < 0.5 * errors["euler", 16]  # first order
    assert errors["heun", 64] < 0.15 * errors["heun", 16]  # second order
    assert errors["heun", 64] < errors["euler", 64] < 0.1
    with pytest.raises(ValueError, match="euler, heun or dopri5"):
        model.sample(1, solver="rk4")


def test_samples_reconstructions_and_latents_belong_together() -> None:
    torch.manual_seed(0)
    model = gaussian(TINY, wobble=1.0, rtol=1e-5, atol=1e-5)
    x = torch.randint(0, 4, (16, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.reconstruct(x), x)
        y = (x.float() + 0.5) / 2 - 1
        z = model.flow(y, (1.0, 0.0), steps=1, solver="dopri5")
        assert torch.equal(model.sample(16, z=z.flatten(1), solver="dopri5"), x)
        assert not torch.equal(model._levels(z), x)


def test_pairing_minimises_the_squared_distance() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 5, 1, 4, 4)
    paired = transported(start, end)
    costs = {
        order: float((start[list(order)] - end).square().sum())
        for order in itertools.permutations(range(5))
    }
    best = min(costs, key=lambda order: costs[order])
    assert best != tuple(range(5))
    assert torch.equal(paired, start[list(best)])


def test_each_worker_takes_its_rows_of_the_whole_batchs_pairing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two real workers take one step together in test_loop.py; here is what each computes."""
    torch.manual_seed(0)
    start, end = torch.randn(2, 16, 1, 4, 4)
    expected = transported(start, end)
    whole = {start[i].sum().item(): start for i in (0, 8)} | {
        end[i].sum().item(): end for i in (0, 8)
    }
    monkeypatch.setattr(flow_matching, "gather_batch", lambda part: whole[part[0].sum().item()])
    for rank, rows in enumerate((slice(0, 8), slice(8, 16))):
        with noise_shard(rank, 2):
            assert torch.equal(transported(start[rows], end[rows]), expected[rows])
    monkeypatch.undo()
    own = torch.cat([transported(start[i : i + 8], end[i : i + 8]) for i in (0, 8)])
    assert not torch.equal(own, expected)  # pairing inside each worker would be another


def test_optimal_pairs_make_straighter_targets() -> None:
    """The same loss, on shorter displacements."""
    x = torch.randint(0, 4, (64, 1, 8, 8), dtype=torch.uint8)
    found = []
    for pairing in ("independent", "optimal_transport"):
        model = FlowMatching(FlowMatchingConfig(width=8, pairing=pairing), TINY)
        torch.manual_seed(1)
        found.append(float(model.losses(Batch(x), "main")["loss"].detach()))  # v is 0 at first
    assert found[1] < 0.97 * found[0]


def test_points_are_learned() -> None:
    torch.manual_seed(0)
    model = FlowMatching(FlowMatchingConfig(hidden=32, layers=2), POINTS)
    centre = torch.tensor([160.0, 60.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        x = (centre + 12 * torch.randn(256, 2)).round().clamp(0, 255).to(torch.uint8)
        loss = model.losses(Batch(x), "main")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = model.eval().sample(1000).float()
        log_prob = model.log_prob(x, samples=2)
    assert drawn.shape == (1000, 2)
    assert torch.allclose(drawn.mean(0), centre, atol=3)
    assert torch.allclose(drawn.std(0), torch.full((2,), 12.0), atol=3)
    entropy = 2 * math.log(12 * math.sqrt(2 * math.pi * math.e))
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=0.15)


def test_the_note_says_how() -> None:
    assert "dopri5, rtol 0.001, atol 0.001, 1 rademacher probe" in small().likelihood_note
    assert "exact trace" in small(POINTS).likelihood_note
