"""RealNVP's likelihood is right: inverse, Jacobian, total probability."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from models.data import DataSpec
from models.realnvp import RealNVP, RealNVPConfig

SMALL = RealNVPConfig(width=4, blocks=1, point_couplings=4, hidden=16)


def randomised(shape: tuple[int, ...], levels: int = 4, seed: int = 0) -> RealNVP:
    """Double precision, evaluation mode, every weight and statistic away from its start."""
    torch.manual_seed(seed)
    modality = "points" if len(shape) == 1 else "image"
    model = RealNVP(SMALL, DataSpec(shape=shape, levels=levels, modality=modality))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return model.double().eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 12), (1, 5, 7), (3, 4, 4), (2,)], ids=str)
def test_log_det_is_the_jacobians(shape: tuple[int, ...]) -> None:
    model = randomised(shape)
    y = torch.rand(2, *shape, dtype=torch.float64) * 0.98 + 0.01
    _, log_det = model(y)
    for i in range(len(y)):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0][0], y[i])
        square = jacobian.reshape(math.prod(shape), -1)
        expected = torch.linalg.slogdet(square).logabsdet
        assert torch.isclose(log_det[i].detach(), expected, rtol=1e-9, atol=1e-9)
        assert abs(float(expected)) > 1.0  # an identity would pass for the wrong reason
    assert not torch.isclose(log_det[0], log_det[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 12), (1, 28, 28), (1, 5, 7), (2,)], ids=str)
def test_inverse(shape: tuple[int, ...]) -> None:
    model = randomised(shape)
    y = torch.rand(3, *shape, dtype=torch.float64) * 0.98 + 0.01
    with torch.no_grad():
        assert torch.allclose(model.inverse(model(y)[0]), y, atol=1e-9)
        z = model(y)[0] + 0.1 * torch.randn(3, math.prod(shape), dtype=torch.float64)
        assert torch.allclose(model(model.inverse(z))[0], z, atol=1e-6)


def test_scales_follow_the_paper() -> None:
    """At 28x28: 3 checkerboard and 3 channel couplings at each of two scales, then 4."""
    model = RealNVP(RealNVPConfig(width=4), DataSpec(shape=(1, 28, 28), levels=256))
    assert [len(stage) for stage in (*model.before, *model.after, model.last)] == [3, 3, 3, 3, 4]
    assert model.last_shape == (4, 7, 7)


def test_probabilities_of_a_discrete_domain() -> None:
    """Sum over all images of a 1x2x2 space with 3 levels: <= 1, and within the known gap.

    For each image, log P(x) >= E_u[log p(x + u)] + c, so the sum of the exponentiated bounds
    is at most 1. With many draws of u the estimate of P(x) itself must sum to the mass that
    the flow has inside [0, 1)^D, which is found another way: by sampling. (Squashing by alpha
    leaves the flow some mass outside.)
    """
    torch.manual_seed(0)
    levels, shape = 3, (1, 2, 2)
    model = randomised(shape, levels, seed=1)
    every = torch.tensor(list(itertools.product(range(levels), repeat=4))).view(-1, *shape)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            single = torch.stack([model.log_prob(every) for _ in range(400)])
            bound = single.mean(0)  # E_u of the log: what a training loss averages
            tight = model.log_prob(every, samples=1500)
    finally:
        torch.set_default_dtype(torch.float32)
    total_bound, total = float(bound.exp().sum()), float(tight.exp().sum())
    inside = _mass_inside(model, 200_000)
    assert total_bound <= total + 0.01
    assert total <= 1.0 + 0.01
    assert total == pytest.approx(inside, abs=0.02)
    gap = float((tight - bound).max())
    assert gap > 0
    assert total_bound >= total * math.exp(-gap)


def _mass_inside(model: RealNVP, draws: int) -> float:
    """Share of the flow's samples whose y lies in [0, 1), by sampling."""
    torch.manual_seed(5)
    z = torch.randn(draws, model.data.dimensions, dtype=torch.float64)
    with torch.no_grad():
        y = model.inverse(z)
    return float(((y >= 0) & (y < 1)).flatten(1).all(1).double().mean())


def test_probabilities_of_the_plane() -> None:
    """P over all cells of a coarse grid sums to the mass that the flow has inside of it."""
    model = randomised((2,), levels=16)
    cells = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            probabilities = model.log_prob(cells, samples=200).exp()
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(probabilities.max()) > 2 * float(probabilities.mean())
    assert float(probabilities.sum()) == pytest.approx(_mass_inside(model, 100_000), abs=0.01)


def test_points_couple_both_coordinates() -> None:
    """Neither latent is a function of one coordinate alone."""
    model = randomised((2,))
    y = torch.rand(2, dtype=torch.float64) * 0.9 + 0.05
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0][0], y)
    assert (jacobian.abs() > 1e-3).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)], ids=str)
def test_reconstruction_is_exact(shape: tuple[int, ...]) -> None:
    model = randomised(shape, levels=17).float()
    x = torch.randint(0, 17, (32, *shape), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.reconstruct(x), x)
