"""StyleGAN2's parts against their definitions, and its schedule in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from models.data import Batch, DataSpec, from_signed
from models.noise import noise_shard
from models.stylegan2 import StyleGAN2, StyleGAN2Config, mix
from models.stylegan2.augmentation import augment
from models.stylegan2.networks import FIR, Deviation, modulated_conv
from models.stylegan2.regularisers import path_lengths, r1_penalty
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tasks.training.turns import make_turns
from tests.conftest import TINY, tiny_batch, tiny_images

TAPS = np.array([1, 3, 3, 1]) / 8


def small(shape: tuple[int, ...] = (1, 8, 8), **changes: object) -> StyleGAN2:
    torch.manual_seed(0)
    config = {"latent_dim": 3, "mapping_layers": 2, "width": 2, "inversion_steps": 5, **changes}
    return StyleGAN2(StyleGAN2Config(**config), DataSpec(shape=shape, levels=256))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("up", [False, True])
def test_demodulated_convolution_is_the_papers_formula(kernel: int, up: bool) -> None:
    """w'' = s w / sqrt(sum (s w)^2 + eps), the weights of each example by themselves."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    weight = torch.randn(2, 4, kernel, kernel, dtype=torch.float64)
    style = torch.randn(3, 4, dtype=torch.float64)
    expected = []
    for one, s in zip(x, style, strict=True):
        modulated = s[None, :, None, None] * weight
        own = modulated / (modulated.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            expected.append(F.conv_transpose2d(one[None], own.transpose(0, 1), stride=2))
        else:
            expected.append(F.conv2d(one[None], own, padding=kernel // 2))
    found = modulated_conv(x, weight, style, up=up)
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)
    plain = modulated_conv(x, weight, style, up=up, demodulate=False)
    assert not torch.allclose(found, plain, atol=0.1)


def filtered(x: np.ndarray, up: int, down: int, pad: int, outputs: tuple[int, int]) -> np.ndarray:
    """By scipy, one axis after the other: `upfirdn` begins 3 places before input 0."""
    for axis, out in enumerate(outputs):
        full = upfirdn(TAPS * up, x, up, 1, axis=axis)
        places = np.arange(out) * down + 3 - pad
        padded = np.concatenate([full, np.zeros_like(full), np.zeros_like(full)], axis)
        x = np.take(padded, places, axis)
    return x


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)], ids=str)
def test_resampling_is_the_fir_filters(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=size)
    half = (-(-size[0] // 2), -(-size[1] // 2))
    for outputs in [(2 * size[0], 2 * size[1]), (2 * size[0] - 1, 2 * size[1] - 1)]:
        found = FIR(size, outputs, pad=2, up=2, gain=2).double()(torch.from_numpy(x))
        assert np.allclose(found, filtered(x, 2, 1, 2, outputs), atol=1e-12)
    found = FIR(size, half, pad=1, down=2).double()(torch.from_numpy(x))
    assert np.allclose(found, filtered(x, 1, 2, 1, half), atol=1e-12)
    longer = (2 * half[0] + 1, 2 * half[1] + 1)
    found = FIR(size, longer, pad=2).double()(torch.from_numpy(x))
    assert np.allclose(found, filtered(x, 1, 1, 2, longer), atol=1e-12)


def test_upsampling_keeps_a_flat_image_flat_and_in_place() -> None:
    flat = FIR((6, 6), (12, 12), pad=2, up=2, gain=2)(torch.ones(6, 6))
    assert torch.allclose(flat[1:-1, 1:-1], torch.ones(10, 10))
    ramp = FIR((6, 6), (12, 12), pad=2, up=2, gain=2)(torch.arange(6.0).expand(6, 6))
    assert torch.allclose(ramp[4, 2:-2], torch.arange(12)[2:-2] / 2 - 0.25)  # pixel centres


def away_from_zero(module: nn.Module) -> None:
    """Biases and noise strengths begin at 0, where their derivatives could hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def checked(module: nn.Module, penalty: Callable[[Callable[..., Tensor]], Tensor]) -> None:
    """`penalty` of the module, as a function of its parameters, has the right gradients, twice."""
    penalty(module).backward()
    # a slope does not depend on the biases of a piecewise linear network
    used = [n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()]
    assert {"weight"} <= {name.rpartition(".")[2] for name in used}
    assert len(used) >= len([n for n, _ in module.named_parameters() if n.endswith("weight")])
    values = [module.get_parameter(name).detach().clone().requires_grad_() for name in used]

    def of(*values: Tensor) -> Tensor:
        state = dict(zip(used, values, strict=True))
        return penalty(lambda *args: functional_call(module, state, args))

    assert gradcheck(of, values, fast_mode=True, atol=1e-6)
    assert gradgradcheck(of, values, fast_mode=True, atol=1e-6)


def test_gradients_of_the_r1_penalty() -> None:
    model = small().double()
    away_from_zero(model)
    real = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    checked(model.discriminator, lambda discriminate: r1_penalty(discriminate, real)[0])
    # and its value: |dD/dx|^2 by differences, in a batch of one, where examples do not interact
    one = real[:1]
    with torch.no_grad():
        steps = 1e-5 * torch.eye(64, dtype=torch.float64).view(64, 1, 1, 8, 8)
        rise = [model.discriminator(one + s) - model.discriminator(one - s) for s in steps]
    expected = float((torch.cat(rise) / 2e-5).square().sum())
    assert float(r1_penalty(model.discriminator, one)[0]) == pytest.approx(expected, rel=1e-5)


def test_gradients_of_the_path_length_penalty() -> None:
    model = small().double()
    away_from_zero(model)
    ws = model.mapping(torch.randn(3, 3, dtype=torch.float64))[:, None].repeat(1, 4, 1).detach()
    y = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def penalty(synthesise: Callable[..., Tensor]) -> Tensor:
        styles = ws.clone().requires_grad_()
        return (path_lengths(lambda w: synthesise(w, 0.0), styles, y)[0] - 0.1).square().mean()

    checked(model.synthesis, penalty)
    lengths, _ = path_lengths(lambda w: model.synthesis(w, 0.0), ws.clone().requires_grad_(), y)
    jacobian = torch.autograd.functional.jacobian(lambda w: model.synthesis(w, 0.0), ws[:1])
    product = (jacobian.reshape(64, 4, 3) * y[0].reshape(64, 1, 1)).sum(0) / 8  # sqrt(H W)
    expected = product.square().sum(1).mean().sqrt()
    assert torch.isclose(lengths[0], expected, rtol=1e-9)


def test_equalised_weights_keep_signals_at_unit_size() -> None:
    model = small(latent_dim=256, width=64, mapping_layers=4)
    with torch.no_grad():
        w = model.mapping(5 * torch.randn(500, 256))  # of any length: normalised first
        x = model.synthesis.constant.expand(500, -1, -1, -1)
        features = model.synthesis.layers[0](x, w, 0.0)
    for signal in (w, features):
        assert float(signal.square().mean()) == pytest.approx(1.0, abs=0.25)
    slow, usual = model.mapping[1], model.discriminator[-2]
    assert float(slow.weight.std()) == pytest.approx(100, rel=0.05)
    assert float(usual.weight.std()) == pytest.approx(1, rel=0.05)
    zeros = torch.zeros(1, 256)
    nn.init.ones_(slow.bias)
    assert torch.allclose(slow(zeros), torch.tensor(0.01 * math.sqrt(2)))


@pytest.mark.parametrize("phase", ["generator", "path_length", "discriminator", "r1"])
def test_reduced_precision_gives_nearly_the_same_gradients(phase: str) -> None:
    model = small(augment="ada", augment_mirror=True, latent_dim=8, width=8)
    model.augment_p.fill_(0.3)
    part = model.discriminator if phase in ("discriminator", "r1") else model.synthesis
    found = []
    for reduced in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model.path_length_mean.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            loss = model.losses(tiny_batch(8, TINY), phase)["loss"]
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in part.parameters()]))
    assert float(found[0].norm()) > 0
    # the regularisers are in float32; bf16 alone costs the main phases 0.01 to 0.15 on a batch of 8
    tolerance = 1e-5 if phase in ("path_length", "r1") else 0.25
    assert float((found[1] - found[0]).norm()) < tolerance * float(found[0].norm())


def test_truncation_collapses_to_the_mean_image() -> None:
    model = small(latent_dim=8, width=8).eval()
    away_from_zero(model.synthesis)
    model.w_mean.copy_(torch.randn(8))
    with torch.no_grad():
        mean = from_signed(model.synthesis(model.w_mean.expand(1, 4, 8), 0.0), 256)
        spreads = []
        for psi in (0.0, 0.3, 1.0):
            torch.manual_seed(0)
            samples = model.sample(64, temperature=psi).float()
            spreads.append(float((samples - mean.float()).square().mean()))
        z = torch.randn(64, 8)
        full, cut = (model.sample(64, z=z, temperature=psi).float() for psi in (1.0, 0.3))
    assert spreads[0] == 0
    assert 0 < 2 * spreads[1] < spreads[2]
    assert (cut - mean.float()).square().mean() < 0.5 * (full - mean.float()).square().mean()


def test_the_mean_of_w_is_tracked() -> None:
    model = small(latent_dim=8)
    for _ in range(400):
        with torch.no_grad():
            model._styles(16, track=True)
    expected = model.mapping(torch.randn(20_000, 8)).mean(0)
    assert torch.allclose(model.w_mean, expected * (1 - 0.995**400), atol=0.05)
    assert expected.abs().max() > 0.15


def test_mixing_changes_only_the_layers_after_the_crossover() -> None:
    torch.manual_seed(0)
    w, other, u = torch.randn(4000, 3), torch.randn(4000, 3), torch.rand(4000, 2)
    ws = mix(w, other, u, 0.9, 6)
    from_other = (ws == other[:, None]).all(2)
    assert torch.equal(ws, torch.where(from_other[..., None], other[:, None], w[:, None]))
    assert (from_other.long().diff(dim=1) >= 0).all()  # once changed, to the end
    crossover = 6 - from_other.sum(1)
    assert not from_other[:, 0].any()
    share = torch.bincount(crossover, minlength=7) / 4000
    assert torch.allclose(share, torch.tensor([0, *[0.18] * 5, 0.1]), atol=0.03)
    model = small((1, 16, 16), width=4)
    early, late = [], []
    hook = model.synthesis.layers[2].register_forward_hook(lambda *io: early.append(io[2]))
    model.synthesis(w[:2, None].expand(-1, 6, -1), 0.0)
    mixed = torch.cat([w[:2, None].expand(-1, 3, -1), other[:2, None].expand(-1, 3, -1)], 1)
    late = [model.synthesis(mixed, 0.0), model.synthesis(w[:2, None].expand(-1, 6, -1), 0.0)]
    hook.remove()
    assert torch.equal(early[0], early[1])  # 8x8 and below: as before
    assert not torch.allclose(*late, atol=1e-3)


def test_regularisers_run_when_they_should_and_share_adam(tmp_path: Path) -> None:
    model = small(path_length_every=3, r1_every=5)
    turns = {turn.phase.name: turn for turn in make_turns(TrainConfig(), model)}
    assert turns["generator"].optimizer is turns["path_length"].optimizer
    assert turns["discriminator"].optimizer is turns["r1"].optimizer
    assert turns["generator"].optimizer is not turns["r1"].optimizer
    for name, every in (("generator", 3), ("discriminator", 5)):
        c = every / (every + 1)
        group = turns[name].optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(8e-3 * c)
        assert group["betas"] == pytest.approx((0.0, 0.99**c))

    class Recorded(type(model)):  # type: ignore[misc]
        def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:
            self.seen.append(phase)
            return super().losses(batch, phase)

    model.__class__ = Recorded
    model.seen = []
    settings = TrainConfig(batch_size=4, budget=Budget(steps=16), precision="fp32")
    train(model, TrainData(tiny_images(16)), settings, tmp_path)
    expected: list[str] = []
    for step in range(16):
        expected += ["generator", *["path_length"] * (step % 3 == 0)]
        expected += ["discriminator", *["r1"] * (step % 5 == 0)]
    assert model.seen == expected


def test_a_penalty_weighs_as_much_as_its_rarity() -> None:
    model = small(r1_every=7, r1_gamma=3.0, path_length_every=5, path_length_weight=2.0)
    batch = tiny_batch(4, TINY)
    r1, lengths = model.losses(batch, "r1"), model.losses(batch, "path_length")
    assert float(r1["loss"] / r1["penalty"]) == pytest.approx(7 * 3.0 / 2)
    assert float(lengths["loss"] / lengths["penalty"]) == pytest.approx(5 * 2.0)
    assert float(model.path_length_mean) == pytest.approx(float(lengths["length"]))
    later = model.losses(batch, "path_length")["length"]
    expected = 0.99 * lengths["length"] + 0.01 * later
    assert float(model.path_length_mean) == pytest.approx(float(expected))
    assert float(later) != pytest.approx(float(lengths["length"]))


def test_groups_of_the_deviation_are_neighbours_on_any_number_of_workers() -> None:
    x = torch.randn(8, 2, 3, 3)
    found = Deviation()(x)
    expected = x[:4].std(0, correction=0).mean()
    assert torch.allclose(found[:4, 2], expected.expand(4, 3, 3), atol=1e-5)
    assert torch.equal(found, torch.cat([Deviation()(half) for half in x.chunk(2)]))
    assert float(Deviation()(x[:1].expand(4, 2, 3, 3))[:, 2].max()) < 1e-3


def test_p_follows_the_discriminators_certainty() -> None:
    model = small(augment="ada", augment_images=100)
    batch = tiny_batch(8, TINY)
    trace = []
    for bias in (100.0, 100.0, 100.0, -100.0):  # certain of the reals, then of the opposite
        nn.init.constant_(model.discriminator[-1].bias, bias)
        model.losses(batch, "discriminator")
        trace.append(float(model.augment_p))
    assert trace == pytest.approx([0.08, 0.16, 0.24, 0.16])
    nn.init.constant_(model.discriminator[-1].bias, 100.0)
    with noise_shard(1, 2):  # the other worker's images count as well
        model.losses(batch, "discriminator")
    assert float(model.augment_p) == pytest.approx(0.32)
    untouched = small()
    nn.init.constant_(untouched.discriminator[-1].bias, 100.0)
    untouched.losses(batch, "discriminator")
    assert float(untouched.augment_p) == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13)], ids=str)
def test_augmentation_has_two_derivatives_and_rests_at_zero(shape: tuple[int, ...]) -> None:
    x = torch.rand(64, *shape) * 2 - 1
    assert torch.equal(augment(x, torch.zeros(()), mirror=True), x)
    changed = augment(x, torch.tensor(0.5), mirror=True)
    moved = (changed - x).flatten(1).abs().amax(1) > 1e-6
    assert 0.75 < float(moved.float().mean()) <= 1.0
    assert changed.flatten(1).std(0).min() > 0

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return augment(x, torch.tensor(0.5), mirror=True).square()  # curved, for the second

    y = x[:3].double().requires_grad_()
    assert gradcheck(seeded, [y], fast_mode=True)
    assert gradgradcheck(seeded, [y], fast_mode=True)


def test_projection_finds_an_image_of_its_own() -> None:
    model = small(latent_dim=8, width=8, inversion_steps=200).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        x = model.sample(4, z=torch.randn(4, 8))
        start = model.sample(1, temperature=0.0)
        found = model.reconstruct(x)
    error = [(x.float() - other.float()).square().mean() for other in (found, start)]
    assert error[0] < 0.1 * error[1]
    assert not math.isclose(float(error[1]), 0.0)
