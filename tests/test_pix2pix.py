"""pix2pix: aligned pairs reach the discriminator, and dropout is the only noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.data import Batch, DataSpec, SourceSpec, from_signed, to_signed
from models.pix2pix import Pix2Pix, Pix2PixConfig
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tests.conftest import tiny_batch, tiny_images

DATA = DataSpec(shape=(1, 16, 16), levels=16, source=SourceSpec(kind="pair", shape=(2, 16, 16)))


def small(data: DataSpec = DATA, **changes: object) -> Pix2Pix:
    torch.manual_seed(0)
    return Pix2Pix(Pix2PixConfig(**{"width": 8, **changes}), data)


def test_the_discriminator_sees_each_image_beside_its_own_source(tmp_path: Path) -> None:
    """The sources are the images upside down and inverted; only their pairs fit."""
    model, seen = small(), []
    x = tiny_images(24, DATA)
    source = torch.cat([x.flip(2), 15 - x], 1)

    def look(_: object, given: tuple[Tensor]) -> None:
        if len(given[0]) == 8:  # not the few rows on which the cost of a step is counted
            seen.append(given[0])

    spy = model.discriminator.register_forward_pre_hook(look)
    settings = TrainConfig(batch_size=8, budget=Budget(steps=2), precision="fp32")
    train(model, TrainData(x, source=source), settings, tmp_path)
    spy.remove()
    assert len(seen) == 6  # a step: real and fake, then fake
    real = [pair for pair in seen if torch.allclose(pair[:, 2:], -pair[:, 1:2], atol=1e-6)]
    assert len(real) == 2
    assert all(torch.equal(pair[:, :1], pair[:, 2:].flip(2)) for pair in real)
    # the fakes of the discriminator's phase stand beside the sources of its real images
    for turn in (seen[:3], seen[3:]):
        assert torch.equal(turn[0][:, :2], turn[1][:, :2])
        assert torch.equal(turn[0][:, :2], turn[2][:, :2])
        assert not torch.equal(turn[0][:, 2:], turn[1][:, 2:])


def test_dropout_is_noise_when_sampling_and_temperature_scales_it() -> None:
    model = small()
    with torch.no_grad():  # so that batch norm has statistics to sample with
        for _ in range(30):
            model.losses(tiny_batch(8, DATA), "generator")
    model.eval()
    source = to_signed(tiny_batch(4, DATA).source, 16)

    @torch.no_grad()
    def draws(temperature: float) -> Tensor:
        return torch.stack([model.generator(source, temperature) for _ in range(40)])

    none, half, full = (float(draws(t).std(0).mean()) for t in (0.0, 0.5, 1.0))
    assert none == 0
    assert half == pytest.approx(full / 2, rel=0.2)
    assert full > 0.01
    with torch.no_grad():
        asked = tiny_batch(4, DATA).source
        warm = [model.sample(4, source=asked) for _ in range(2)]
        cold = [model.sample(4, source=asked, temperature=0.0) for _ in range(2)]
        assert not torch.equal(*warm)
        assert torch.equal(*cold)
        assert torch.equal(cold[0], from_signed(model.generator(source, 0.0), 16))


def test_the_losses_are_the_papers() -> None:
    model = small(dropout=0.0).eval()
    batch = Batch(tiny_images(6, DATA), source=tiny_batch(6, DATA).source)
    source, real = to_signed(batch.source, 16), to_signed(batch.x, 16)
    with torch.no_grad():
        fake = model.generator(source)
        on_real = model.discriminator(torch.cat([source, real], 1)).sigmoid()
        on_fake = model.discriminator(torch.cat([source, fake], 1)).sigmoid()
        found = {name: model.losses(batch, name)["loss"] for name in ("discriminator", "generator")}
    judge = -(on_real.log().mean() + (1 - on_fake).log().mean()) / 2
    paint = -on_fake.log().mean() + 100 * (real - fake).abs().mean()
    assert float(found["discriminator"]) == pytest.approx(float(judge), rel=1e-5)
    assert float(found["generator"]) == pytest.approx(float(paint), rel=1e-5)


def test_every_scale_is_handed_across() -> None:
    """Two sources still give two images where all that comes from deeper scales is cut."""
    model = small().eval()
    source = to_signed(tiny_batch(2, DATA).source, 16)
    for layer in model.generator.decoder[1:]:

        def without_depth(_: torch.nn.Module, given: tuple[Tensor]) -> Tensor:
            deep, skip = given[0].chunk(2, 1)
            return torch.cat([torch.zeros_like(deep), skip], 1)

        hook = layer.register_forward_pre_hook(without_depth)
        with torch.no_grad():
            one, other = model.generator(source, 0.0)
        hook.remove()
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SourceSpec(kind="edges", shape=(1, 16, 16), aligned=False), "dataset.paired: true"),
        (SourceSpec(kind="low_resolution", shape=(1, 8, 8)), "same height and width"),
    ],
)
def test_unsuited_sources_are_named(source: SourceSpec, words: str) -> None:
    reason = Pix2Pix.unsuited(DataSpec(shape=(1, 16, 16), levels=16, source=source))
    assert reason is not None
    assert words in reason
