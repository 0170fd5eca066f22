"""Glow's likelihood is right (inverse, Jacobian, total probability), and so is its start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from models.data import Batch, DataSpec
from models.glow import Glow, GlowConfig
from models.glow.steps import ActNorm, InvertibleConv
from tests.conftest import tiny_images

SHAPES = [(1, 8, 8), (2, 8, 12), (3, 5, 7), (2, 4, 4)]


def fresh(shape: tuple[int, int, int], levels: int = 4, seed: int = 0) -> Glow:
    torch.manual_seed(seed)
    return Glow(GlowConfig(width=4, steps=2), DataSpec(shape=shape, levels=levels))


def randomised(shape: tuple[int, int, int], levels: int = 4, seed: int = 0) -> Glow:
    """Double precision, evaluation mode, every weight away from its start."""
    model = fresh(shape, levels, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_det_is_the_jacobians(shape: tuple[int, int, int]) -> None:
    model = randomised(shape)
    y = torch.rand(2, *shape, dtype=torch.float64)
    _, log_det = model(y)
    for i in range(len(y)):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0][0], y[i])
        square = jacobian.reshape(math.prod(shape), -1)
        expected = torch.linalg.slogdet(square).logabsdet
        assert torch.isclose(log_det[i].detach(), expected, rtol=1e-9, atol=1e-9)
        assert abs(float(expected)) > 1.0  # an identity would pass for the wrong reason
    assert not torch.isclose(log_det[0], log_det[1])  # the couplings have their say


@pytest.mark.parametrize("shape", [*SHAPES, (1, 28, 28)], ids=str)
def test_inverse(shape: tuple[int, int, int]) -> None:
    model = randomised(shape)
    y = torch.rand(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model.inverse(model(y)[0]), y, atol=1e-8)
        z = model(y)[0] + 0.1 * torch.randn(3, math.prod(shape), dtype=torch.float64)
        assert torch.allclose(model(model.inverse(z))[0], z, atol=1e-8)


def test_levels_follow_the_image() -> None:
    """28x28: 4 channels of 14x14, half of them leave, 8 channels of 7x7 are the rest."""
    model = fresh((1, 28, 28))
    assert [len(steps) for steps in model.levels] == [2, 2]  # type: ignore[arg-type]
    assert len(model.splits) == 1
    assert model.last_shape == (8, 7, 7)
    assert fresh((3, 5, 7)).last_shape == (3, 5, 7)
    reason = Glow.unsuited(DataSpec(shape=(1, 5, 8), levels=4))
    assert reason is not None
    assert "one channel" in reason


def test_first_batch_sets_every_actnorm() -> None:
    """Zero mean and unit variance of each channel after each actnorm; and only once."""
    model = fresh((1, 8, 8), levels=256)
    x = tiny_images(32, model.data)
    outputs: dict[str, torch.Tensor] = {}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, ActNorm)}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    assert not model.initialised
    torch.manual_seed(1)
    first = model.losses(Batch(x), "main")["loss"]
    assert model.initialised
    torch.manual_seed(1)
    model._initialise(x)  # the same batch, with the noise that the first time had
    for name, out in outputs.items():
        std, mean = torch.std_mean(out, (0, 2, 3), correction=0)
        assert float(mean.abs().max()) < 1e-3, name
        assert torch.allclose(std, torch.ones_like(std), atol=0.05), name
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.losses(Batch(x // 2), "main")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = fresh((1, 8, 8), levels=256).eval()
    assert float(first.detach()) < float(plain.losses(Batch(x), "main")["loss"].detach()) - 0.5


def test_evaluation_initialises_nothing() -> None:
    model = fresh((1, 8, 8)).eval()
    model.losses(Batch(tiny_images(4, model.data)), "main")
    assert not model.initialised


def test_invertible_convolution_starts_as_a_rotation() -> None:
    torch.manual_seed(0)
    mix = InvertibleConv(6)
    weight = mix(torch.eye(6)[:, :, None, None])[:, :, 0, 0].T.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(6), atol=1e-5)
    assert not torch.allclose(weight.abs(), torch.eye(6), atol=0.1)
    assert float(mix.log_s.sum().detach()) == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for parameter in mix.parameters():
            parameter.add_(torch.randn_like(parameter))
    weight = mix(torch.eye(6)[:, :, None, None])[:, :, 0, 0].T.detach()
    expected = float(torch.linalg.slogdet(weight).logabsdet)
    assert float(mix.log_s.sum().detach()) == pytest.approx(expected, abs=1e-3)


def test_couplings_start_alike_everywhere() -> None:
    """The zero convolutions leave every step a linear map: one log-det for all inputs."""
    for step in fresh((1, 8, 8)).levels[0].children():
        log_det = step(torch.randn(5, 4, 4, 4))[1]
        assert torch.allclose(log_det, log_det[:1].expand(5), atol=1e-4)


def test_probabilities_of_a_discrete_domain() -> None:
    """P over all images of 2 values with 3 levels sums to the mass inside [0, 1)^2, which is
    found another way: by sampling."""
    model = randomised((2, 1, 1), levels=3, seed=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 2, 1, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            total = float(model.log_prob(every, samples=2000).exp().sum())
            y = model.inverse(torch.randn(200_000, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    inside = float(((y >= 0) & (y < 1)).flatten(1).all(1).double().mean())
    assert 0.5 < inside <= 1  # squashing by alpha leaves little outside
    assert total == pytest.approx(inside, abs=0.02)


def test_reconstruction_is_exact() -> None:
    model = randomised((1, 8, 8), levels=17).float()
    x = torch.randint(0, 17, (32, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.reconstruct(x), x)


def test_no_latent_is_inverted_into_an_overflow() -> None:
    """Couplings that shrink much by weights are, backwards, divisions by almost nothing."""
    model = fresh((1, 8, 8), levels=17).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("net.6.weight", "prior.weight")):
                parameter.copy_(3 * torch.randn_like(parameter))
        y = model.inverse(3 * torch.randn(500, 64))
    assert y.isfinite().all()
