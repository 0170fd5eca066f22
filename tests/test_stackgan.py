"""StackGAN: what the text encoder sees, the augmentation, the mismatch term, the two stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.data import Batch, DataSpec, from_signed, to_signed
from models.stackgan import StackGAN, StackGANConfig
from tests.conftest import tiny_images

DATA = DataSpec(shape=(1, 8, 8), levels=16, text_length=24)
SMALL = {"latent_dim": 4, "width": 4, "text_dim": 16, "condition_dim": 4}
WORDS = ["a handwritten seven", "the digit seven", "a three", "a three", "zéro", "one"]
PHASES = ["discriminator_1", "generator_1", "discriminator_2", "generator_2"]


def model(data: DataSpec = DATA, **changes: Any) -> StackGAN:
    torch.manual_seed(0)
    return StackGAN(StackGANConfig(**{**SMALL, **changes}), data)


def captions(words: list[str], length: int = 24) -> Tensor:
    rows = [word.encode().ljust(length, b"\0") for word in words]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


def batch(words: list[str]) -> Batch:
    return Batch(tiny_images(len(words), DATA), text=captions(words))


def seeded(net: StackGAN, rows: Batch, phase: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return net.losses(rows, phase)


def vivid(net: StackGAN) -> StackGAN:
    """In evaluation mode, with images that are not all but grey, as untrained ones are."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one batch's statistics are enough
    with torch.no_grad():
        for part in (net.generator_1.body, net.generator_2.decoder):
            part[-2].weight.mul_(10)
        net.sample(6, text=captions(WORDS))
    return net.eval()


@pytest.mark.parametrize("longer", [25, 40, 128])
def test_the_text_encoder_ignores_padding(longer: int) -> None:
    encoder = model().text_encoder
    with torch.no_grad():
        for conv in encoder.convolutions:
            conv.bias.fill_(0.5)  # what follows the end would not be zero by itself
        encoder.embed.weight[0] = 3.0
        short, long = encoder(captions(WORDS)), encoder(captions(WORDS, longer))
        cut = encoder(captions(WORDS[-1:], 3))
    assert torch.allclose(short, long, atol=1e-5)
    assert torch.allclose(short[-1:], cut, atol=1e-5)


def test_the_text_encoder_tells_captions_apart() -> None:
    """By their characters' order too, and an empty caption is a caption."""
    encoder = model().text_encoder
    with torch.no_grad():
        e = encoder(captions(["seven", "nevse", "", "seven"]))
    assert torch.isfinite(e).all()
    assert torch.equal(e[0], e[3])
    assert float((e[0] - e[1]).abs().max()) > 1e-2
    assert float((e[0] - e[2]).abs().max()) > 1e-2


def test_same_caption_same_mean_whatever_stands_beside_it() -> None:
    net = model()
    with torch.no_grad():
        for stage in (net.generator_1, net.generator_2):
            mean, _ = stage.augmentation.moments(net.text_encoder(captions(WORDS)))
            alone, _ = stage.augmentation.moments(net.text_encoder(captions(WORDS[2:3])))
            assert torch.equal(mean[2], mean[3])
            assert torch.allclose(mean[2], alone[0], atol=1e-6)
            assert not torch.allclose(mean[2], mean[1], atol=1e-3)


def test_augmentation_draws_from_its_normal_and_knows_its_kl() -> None:
    augmentation = model().generator_1.augmentation
    e = torch.randn(3, SMALL["text_dim"])
    with torch.no_grad():
        mean, log_var = augmentation.moments(e)
        posterior = torch.distributions.Normal(mean, torch.exp(0.5 * log_var))
        prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
        _, kl = augmentation(e, 1.0)
        draws = torch.stack([augmentation(e, 1.0)[0] for _ in range(4000)])
        cold, _ = augmentation(e, 0.0)
    assert torch.allclose(kl, torch.distributions.kl_divergence(posterior, prior).sum(1))
    assert torch.allclose(draws.mean(0), mean, atol=0.12)
    assert torch.allclose(draws.std(0), posterior.stddev, rtol=0.06)
    assert torch.equal(cold, mean)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_mismatch_term_is_of_rows_whose_captions_differ(stage: str) -> None:
    net, phase = model(), f"discriminator_{stage}"
    assert float(seeded(net, batch(["one"] * 6), phase)["mismatch_loss"]) == 0
    values = seeded(net, batch(WORDS), phase)
    before, weight = net._neighbour(captions(WORDS))
    assert torch.equal(before[0], captions(WORDS)[-1])
    assert torch.allclose(weight, torch.tensor([1, 1, 1, 0, 1, 1]) * 6 / 5)
    # by hand: the same real images, each with the text of the row before
    judge = getattr(net, phase)
    real = to_signed(batch(WORDS).x, DATA.levels)
    real = F.avg_pool2d(real, 2) if stage == "1" else real
    e = net.text_encoder(captions(WORDS))
    wrong = judge(judge.features(real), e.roll(1, 0))
    terms = F.softplus(wrong)[torch.tensor([0, 1, 2, 4, 5])]
    assert float(values["mismatch_loss"]) == pytest.approx(float(terms.mean()), rel=1e-4)


def test_discriminators_learn_to_match() -> None:
    """The mismatch term is what tells a real image with the wrong text from the right one."""
    words = ["seven", "three"] * 8
    dark = torch.arange(16).view(-1, 1, 1, 1) % 2 * 15
    rows = Batch(dark.expand(16, 1, 8, 8).to(torch.uint8).contiguous(), text=captions(words))
    for stage in ("1", "2"):
        net = model()
        phase = next(p for p in net.phases() if p.name == f"discriminator_{stage}")
        parameters = [p for module in phase.modules for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=2e-3)
        for _ in range(60):
            values = net.losses(rows, phase.name)
            optimizer.zero_grad()
            values["loss"].backward()
            optimizer.step()
        assert float(values["real_probability"].detach()) > 0.8
        assert float(values["mismatch_loss"].detach()) < 0.3


@pytest.mark.parametrize("phase", ["discriminator_2", "generator_2"])
def test_stage_two_sees_stage_one_but_never_moves_it(phase: str) -> None:
    net, rows = model(), batch(WORDS)
    values = seeded(net, rows, phase)
    values["loss"].backward()
    for part in (net.generator_1, net.discriminator_1, net.text_encoder):
        assert all(p.grad is None for p in part.parameters())
    with torch.no_grad():
        net.generator_1.body[-2].weight.mul_(-40)
    assert not torch.equal(values["loss"], seeded(net, rows, phase)["loss"])


def test_the_generator_moves_the_text_encoder_through_c_alone() -> None:
    """What it changed in the discriminator's view of the text would only serve to fool it."""
    for blind in (False, True):
        net = model()
        if blind:
            torch.nn.init.zeros_(net.generator_1.augmentation.linear.weight)
        seeded(net, batch(WORDS), "generator_1")["loss"].backward()
        gradients = [p.grad for p in net.text_encoder.parameters()]
        assert blind == all(not g.any() for g in gradients)


@pytest.mark.parametrize("phase", PHASES)
def test_bfloat16_gives_nearly_the_same_loss(phase: str) -> None:
    net, rows = model(), batch(WORDS)
    exact = seeded(net, rows, phase)
    with torch.autocast("cpu", torch.bfloat16):
        rough = seeded(net, rows, phase)
    rough["loss"].backward()
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert float(rough[name]) == pytest.approx(float(value), abs=0.1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28)], ids=str)
def test_stage_one_is_what_sample_builds_upon(shape: tuple[int, ...]) -> None:
    net = vivid(model(DataSpec(shape=shape, levels=16, text_length=24)))
    text, seen = captions(WORDS), []
    with torch.no_grad():
        net.generator_2.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
        torch.manual_seed(7)
        whole = net.sample(6, text=text)
        torch.manual_seed(7)
        first = net.stage_one(6, text=text)
    half = tuple((side + 1) // 2 for side in shape[1:])
    assert seen[0].shape == (6, shape[0], *half)
    assert first.shape == whole.shape == (6, *shape)
    assert first.dtype == torch.uint8
    assert int(first.max()) < 16
    large = F.interpolate(seen[0], shape[1:], mode="bilinear")
    assert torch.equal(first, from_signed(large, 16))
    assert len(first.unique()) > 1


def test_without_noise_the_caption_decides() -> None:
    net, text = vivid(model()), captions(WORDS)
    with torch.no_grad():
        for draw in (net.sample, net.stage_one):
            assert torch.equal(
                draw(6, text=text, temperature=0.0), draw(6, text=text, temperature=0.0)
            )
            assert not torch.equal(draw(6, text=text), draw(6, text=text))
            z = torch.randn(6, 4)
            assert torch.equal(draw(6, text=text, z=z), draw(6, text=text, z=z))
        with pytest.raises(ValueError, match="text"):
            net.sample(2)
