"""CycleGAN: it never sees a pair, its pool keeps a history, and its losses are the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import store
from models.cyclegan import CycleGAN, CycleGANConfig
from models.cyclegan.pool import ImagePool
from models.data import Batch, DataSpec, SourceSpec, to_signed
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tests.conftest import tiny_batch, tiny_images, tiny_model


def data(channels: int = 1) -> DataSpec:
    other = SourceSpec(kind="edges", shape=(channels, 8, 8), aligned=False)
    return DataSpec(shape=(1, 8, 8), levels=256, source=other)


def small(spec: DataSpec, **changes: object) -> CycleGAN:
    torch.manual_seed(0)
    sizes = {"width": 4, "residual_blocks": 1, "discriminator_width": 4, "pool": 6}
    return CycleGAN(CycleGANConfig(**{**sizes, **changes}), spec)


def test_it_never_sees_a_pair(tmp_path: Path) -> None:
    """Each pixel tells its image's number; the domains' numbers are disjoint in training."""
    model, rows = small(data()), []
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 8, 8).contiguous()

    class Recorded(CycleGAN):
        def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
            if len(batch.x) == 8:  # not the few rows on which the cost of a step is counted
                rows.append(torch.stack([batch.x[:, 0, 0, 0], batch.source[:, 0, 0, 0]]))
            return super().losses(batch, phase)

    model.__class__ = Recorded
    split = TrainData(x, source=x + 100, aligned=False)
    settings = TrainConfig(batch_size=8, budget=Budget(steps=10), precision="fp32")
    train(model, split, settings, tmp_path)
    images, sources = torch.cat(rows[::2], 1).int()  # both phases of a step have one batch
    assert len(images) == 80
    for domain, start in ((images, 0), (sources, 100)):  # both shuffled, twice through
        assert sorted(domain.tolist()) == sorted(2 * list(range(start, start + 40)))
    # shuffled independently: about 2 of 80 stand beside their own by chance
    assert int((images == sources - 100).sum()) < 10


def test_the_pool_fills_and_then_swaps_about_half() -> None:
    torch.manual_seed(0)
    pool = ImagePool(50, (1,))
    shown = torch.cat([pool(torch.arange(i, i + 10.0)[:, None]) for i in range(0, 2050, 10)])
    assert torch.equal(shown[:50, 0], torch.arange(50.0))  # while it fills, all pass through
    later, own = shown[50:, 0], torch.arange(50.0, 2050)
    fresh = float((later == own).float().mean())
    assert fresh == pytest.approx(0.5, abs=0.05)
    # nothing is lost and nothing shown twice: an old image goes, the new one takes its place
    assert sorted(later.tolist() + pool.images[:, 0].tolist()) == list(range(2050))
    # kept for 2 * size images on average: half of the arrivals replace one of 50
    age = (own - later)[later != own]
    assert float(age.mean()) == pytest.approx(100, rel=0.2)
    assert int(pool.count) == 50


def test_no_pool_shows_what_arrives() -> None:
    fakes = torch.randn(8, 1)
    assert torch.equal(ImagePool(0, (1,))(fakes), fakes)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_losses_are_the_papers(channels: int) -> None:
    """With as many channels there is an identity loss; with others there cannot be one."""
    model = small(data(channels))
    batch = tiny_batch(5, model.data)
    x, s = to_signed(batch.x, 256), to_signed(batch.source, 256)
    g, f = model.to_image, model.to_source
    d_x, d_s = model.judge_image, model.judge_source
    with torch.no_grad():
        paint = ((d_x(g(s)) - 1) ** 2).mean() + ((d_s(f(x)) - 1) ** 2).mean()
        paint += 10 * ((f(g(s)) - s).abs().mean() + (g(f(x)) - x).abs().mean())
        if channels == 1:
            paint += 5 * ((g(x) - x).abs().mean() + (f(s) - s).abs().mean())
        judge = ((d_x(x) - 1) ** 2).mean() / 2 + (d_x(g(s)) ** 2).mean() / 2
        judge += ((d_s(s) - 1) ** 2).mean() / 2 + (d_s(f(x)) ** 2).mean() / 2
        generators = model.losses(batch, "generators")
        discriminators = model.losses(batch, "discriminators")  # the pool is still filling
    assert float(generators["loss"]) == pytest.approx(float(paint), rel=1e-5)
    assert float(discriminators["loss"]) == pytest.approx(float(judge), rel=1e-5)
    assert ("identity_image" in generators) == (channels == 1)


def test_the_discriminators_see_the_pool() -> None:
    model, seen = small(data(), pool=1), []
    model.judge_image.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batch = Batch(tiny_images(16, model.data), source=tiny_batch(16, model.data).source)
    with torch.no_grad():
        fresh = model.to_image(to_signed(batch.source, 256))
        model.losses(batch, "discriminators")
    same = (seen[1] == fresh).flatten(1).all(1)
    assert same[0]  # it fills the pool
    assert 0 < int(same.sum()) < 16


def test_the_cycle_is_there_and_back() -> None:
    model = small(data(2)).eval()
    x = tiny_images(3, model.data)
    with torch.no_grad():
        back = model.sample(3, source=tiny_batch(3, model.data).source), model.reconstruct(x)
    assert [part.shape for part in back] == [x.shape, x.shape]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SourceSpec(kind="edges", shape=(1, 8, 8)), "set dataset.paired: false"),
        (SourceSpec(kind="pair", shape=(1, 4, 4), aligned=False), "same height and width"),
    ],
)
def test_unsuited_sources_are_named(source: SourceSpec, words: str) -> None:
    assert words in str(CycleGAN.unsuited(DataSpec(shape=(1, 8, 8), levels=4, source=source)))


def test_the_pool_is_no_part_of_the_saved_model(tmp_path: Path) -> None:
    model = tiny_model("cyclegan")
    for phase in model.phases():
        model.losses(tiny_batch(4, model.data), phase.name)
    assert model.image_pool.images.any()
    store.save(tmp_path, model, "cyclegan", model.state_dict())
    assert not [name for name in load_file(tmp_path / store.WEIGHTS) if "pool" in name]
    assert not store.load(tmp_path).image_pool.images.any()
