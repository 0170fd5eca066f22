"""In-painting: what is known stays bit for bit, and the loss looks at the hole alone."""

from __future__ import annotations

import pytest
import torch

from models.data import Batch, DataSpec, SourceSpec, to_signed
from models.inpainting import ChannelwiseLinear, Inpainting, InpaintingConfig
from tests.conftest import tiny_images

DATA = DataSpec(shape=(3, 16, 16), levels=256, source=SourceSpec(kind="masked", shape=(4, 16, 16)))


def small(**changes: object) -> Inpainting:
    torch.manual_seed(0)
    return Inpainting(InpaintingConfig(**{"width": 4, **changes}), DATA)


def with_holes(n: int) -> Batch:
    """Images with a hole in another place each; the noise has every level there is."""
    x = (tiny_images(n, DATA).float() + 60 * torch.rand(n, *DATA.shape)).clamp(0, 255).byte()
    hole = torch.zeros(n, 1, 16, 16, dtype=torch.uint8)
    for i in range(n):
        hole[i, :, i % 9 : i % 9 + 8, 3:10] = 1
    return Batch(x, source=torch.cat([x * (1 - hole), hole * 255], 1))


@pytest.mark.parametrize("skips", [True, False])
def test_known_pixels_are_copied_and_the_hole_is_painted(skips: bool) -> None:
    model, batch = small(skips=skips).eval(), with_holes(9)
    with torch.no_grad():
        painted = model.sample(9, source=batch.source)
    hole = (batch.source[:, -1:] == 255).expand_as(painted)
    assert torch.equal(painted[~hole], batch.x[~hole])
    assert (painted[hole] != batch.source[:, :-1][hole]).float().mean() > 0.9


def test_the_loss_looks_at_the_hole_alone() -> None:
    model, batch = small(adversarial_weight=0.0, reconstruction_weight=2.0), with_holes(6)
    model.eval()
    hole = (batch.source[:, -1:] == 255).expand_as(batch.x)
    with torch.no_grad():
        found = model.losses(batch, "generator")
        outside = batch._replace(x=torch.where(hole, batch.x, 255 - batch.x))
        inside = batch._replace(x=torch.where(hole, 255 - batch.x, batch.x))
        painted = model.generator(to_signed(batch.source, 256))
        expected = (painted - to_signed(batch.x, 256))[hole].square().mean()
        assert float(found["loss"]) == pytest.approx(2 * float(expected), rel=1e-5)
        assert torch.equal(found["loss"], model.losses(outside, "generator")["loss"])
        assert not torch.equal(found["loss"], model.losses(inside, "generator")["loss"])


def test_the_discriminator_sees_the_completed_image() -> None:
    model, batch, seen = small(), with_holes(5), []
    model.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for phase in ("discriminator", "generator"):
        model.losses(batch, phase)
    hole = (batch.source[:, -1:] == 255).expand_as(batch.x)
    real = to_signed(batch.x, 256)
    assert torch.equal(seen[0], real)
    for completed in seen[1:]:
        assert torch.equal(completed[~hole], real[~hole])
        assert not torch.equal(completed[hole], real[hole])


def test_the_middle_mixes_positions_within_a_channel_and_nothing_else() -> None:
    layer = ChannelwiseLinear(3, 12)
    x = torch.randn(2, 3, 3, 4)
    other = x.clone()
    other[0, 1, 2, 3] += 1
    changed = layer(x) != layer(other)
    assert changed[0, 1].all()
    assert int(changed.sum()) == 12


def test_other_pairs_are_refused_in_words() -> None:
    pair = DataSpec(shape=(1, 8, 8), levels=4, source=SourceSpec(kind="pair", shape=(2, 8, 8)))
    assert "dataset.derive: masked" in str(Inpainting.unsuited(pair))
