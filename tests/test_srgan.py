"""SRGAN: it enlarges by two and by four, and without the adversary it is SRResNet."""

from __future__ import annotations

import pytest
import torch

from models.data import Batch, DataSpec, SourceSpec, to_signed
from models.srgan import SRGAN, SRGANConfig
from tests.conftest import tiny_images


def data(scale: int, side: int = 16) -> DataSpec:
    small = SourceSpec(kind="low_resolution", shape=(1, side // scale, side // scale))
    return DataSpec(shape=(1, side, side), levels=16, source=small)


def small(spec: DataSpec, **changes: object) -> SRGAN:
    torch.manual_seed(0)
    return SRGAN(SRGANConfig(**{"width": 4, "blocks": 1, **changes}), spec)


def batch_of(spec: DataSpec, n: int = 4) -> Batch:
    x = tiny_images(n, spec)
    scale = spec.shape[1] // spec.source.shape[1]
    return Batch(x, source=x[..., ::scale, ::scale].contiguous())


@pytest.mark.parametrize(("scale", "doublings"), [(2, 1), (4, 2)])
def test_sub_pixel_upsampling(scale: int, doublings: int) -> None:
    model = small(data(scale)).eval()
    shuffles = [m for m in model.modules() if isinstance(m, torch.nn.PixelShuffle)]
    assert len(shuffles) == doublings
    source = batch_of(data(scale)).source
    with torch.no_grad():
        assert model.sample(4, source=source).shape == (4, 1, 16, 16)
        # a network of convolutions: larger images than it was made for come out larger
        wide = model.generator(to_signed(source.repeat(1, 1, 1, 2), 16))
        assert wide.shape == (4, 1, 16, 32)


def test_without_the_adversary_there_is_one_phase_and_no_discriminator() -> None:
    alone, both = small(data(2), adversarial_weight=0.0), small(data(2))
    assert [phase.name for phase in alone.phases()] == ["generator"]
    assert [phase.name for phase in both.phases()] == ["discriminator", "generator"]
    assert not [name for name, _ in alone.named_parameters() if "discriminator" in name]
    found = alone.losses(batch_of(data(2)), "generator")
    assert torch.equal(found["loss"], found["content"])


@pytest.mark.parametrize("content", ["mse", "l1"])
def test_the_losses_are_the_papers(content: str) -> None:
    model, batch = small(data(2), content=content, adversarial_weight=0.5), batch_of(data(2))
    model.eval()
    with torch.no_grad():
        fake = model.generator(to_signed(batch.source, 16))
        error = fake - to_signed(batch.x, 16)
        distance = error.square().mean() if content == "mse" else error.abs().mean()
        expected = distance - 0.5 * model.discriminator(fake).sigmoid().log().mean()
        found = model.losses(batch, "generator")["loss"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SourceSpec(kind="pair", shape=(1, 8, 8)), "low_resolution"),
        (SourceSpec(kind="low_resolution", shape=(1, 2, 2)), "exactly 2 or 4"),
        (SourceSpec(kind="low_resolution", shape=(1, 8, 4)), "exactly 2 or 4"),
        (SourceSpec(kind="low_resolution", shape=(1, 8, 8), aligned=False), "paired: true"),
    ],
)
def test_unsuited_sources_are_named(source: SourceSpec, words: str) -> None:
    assert words in str(SRGAN.unsuited(DataSpec(shape=(1, 16, 16), levels=16, source=source)))
