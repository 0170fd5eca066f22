"""Fixtures. Everything is small, made here, and runs on one or two CPU cores."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anything imports ray
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import FAMILIES
from models.base import GenerativeModel
from models.data import Batch, DataSpec, SourceSpec
from tasks.environment import prepare_environment
from tasks.training.data import TrainData

prepare_environment()

TINY = DataSpec(shape=(1, 8, 8), levels=4, classes=("a", "b"))
SMALL_CONFIGS = {
    "vae": {"latent_dim": 4, "width": 8, "hidden": 16, "mixture": 2},
    "dcgan": {"latent_dim": 4, "width": 8, "inversion_steps": 5},
    "realnvp": {"width": 8, "blocks": 1},
    "pixelrnn": {"layers": 1, "hidden": 8, "head": 8},
    "glow": {"width": 8, "steps": 2},
    "vqvae": {
        "codes": 8,
        "code_dim": 4,
        "width": 8,
        "residual_blocks": 1,
        "mixture": 2,
        "prior_width": 16,
        "prior_layers": 1,
        "prior_heads": 2,
    },
    "transformer": {"width": 16, "layers": 1, "heads": 2},
    "pixelcnn": {"width": 8, "layers": 2, "first_kernel": 3, "kernel": 3, "hidden": 8},
    "ddpm": {"width": 8, "timesteps": 20, "inversion_steps": 5},
    "flow_matching": {"width": 8, "pairing": "optimal_transport", "rtol": 0.1, "atol": 0.1},
    "gmm": {"components": 3},
    "naive_bayes": {},
    "rbm": {"hidden": 16, "chains": 8, "ais_chains": 20, "ais_steps": 20},
    "hmm": {"states": 4},
    "gan": {"latent_dim": 4, "hidden": 16, "inversion_steps": 5},
    "wgan": {"latent_dim": 4, "width": 8, "n_critic": 2, "inversion_steps": 5},
    "wgan_gp": {"latent_dim": 4, "width": 8, "n_critic": 2, "inversion_steps": 5},
    "cgan": {"latent_dim": 4, "embedding_dim": 4, "width": 8},
    "stackgan": {"latent_dim": 4, "width": 4, "text_dim": 16, "condition_dim": 4},
    "pix2pix": {"width": 8},
    "srgan": {"width": 4, "blocks": 1},
    "inpainting": {"width": 4},
    "cyclegan": {"width": 4, "residual_blocks": 1, "discriminator_width": 4, "pool": 6},
    "stylegan2": {
        "latent_dim": 4,
        "mapping_layers": 2,
        "width": 4,
        "style_mixing": 0.9,
        "inversion_steps": 5,
    },
}


def suited_data(
    family: str, shape: tuple[int, ...] = (1, 8, 8), *, levels: int = 4, classes: bool = True
) -> DataSpec:
    """Data of that shape which the family can learn from, with as few conditions as it needs."""
    channels, height, width = shape
    half = (channels, height // 2, width // 2)
    sources = (
        None,
        SourceSpec(kind="pair", shape=shape),
        SourceSpec(kind="low_resolution", shape=half),
        SourceSpec(kind="masked", shape=(channels + 1, height, width)),
        SourceSpec(kind="edges", shape=shape, aligned=False),
    )
    names = ("a", "b") if classes or "label" in FAMILIES[family].conditions else ()
    for text_length in (0, 6):
        for source in sources:
            data = DataSpec(
                shape=shape, levels=levels, classes=names, source=source, text_length=text_length
            )
            if FAMILIES[family].unsuited(data) is None:
                return data
    raise LookupError(f"{family} suits no data of shape {shape}")


def tiny_model(family: str, data: DataSpec | None = None, **changes: object) -> GenerativeModel:
    """A small model of the family, the same at every call."""
    cls = FAMILIES[family]
    torch.manual_seed(0)
    config = cls.Config(**{**SMALL_CONFIGS.get(family, {}), **changes})
    return cls(config, data or suited_data(family))


def tiny_images(n: int, data: DataSpec = TINY, seed: int = 0) -> torch.Tensor:
    """Blobs on a dark ground with a little noise: levels `[n, C, H, W]`, uint8."""
    generator = torch.Generator().manual_seed(seed)
    _, h, w = data.shape
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    centres = torch.rand(n, 2, generator=generator) * torch.tensor([h - 1, w - 1])
    distance = (rows - centres[:, :1, None]) ** 2 + (columns - centres[:, 1:, None]) ** 2
    blob = (data.levels - 1) * torch.exp(-distance / (h / 2))
    noise = torch.rand(n, h, w, generator=generator)
    levels = (blob + 0.4 * noise).round().clamp(0, data.levels - 1).to(torch.uint8)
    return levels[:, None].expand(n, *data.shape).contiguous()


def tiny_data(n: int, data: DataSpec) -> TrainData:
    """A split of `n` examples with every condition that `data` speaks of."""
    x = tiny_images(n, data)
    source = None
    if data.source is not None:
        size = data.source.shape[1:]
        small = F.interpolate(x.float(), size=size, mode="area").to(torch.uint8)
        source = small[:, :1].expand(n, *data.source.shape).contiguous()
        if data.source.kind == "masked":
            hole = torch.zeros(n, 1, *size, dtype=torch.uint8)
            hole[..., 2:5, 1:5] = 1
            source = torch.cat([x * (1 - hole), hole * (data.levels - 1)], 1)
        if not data.source.aligned:
            source = source.roll(n // 2, 0)
    text = None
    if data.text_length:
        words = [b"a blob", b"blobs\0"]
        text = torch.tensor([list(words[i % 2]) for i in range(n)], dtype=torch.uint8)
    label = torch.arange(n) % 2
    aligned = data.source is None or data.source.aligned
    return TrainData(x, label, source, text, aligned=aligned)


def tiny_batch(n: int, data: DataSpec) -> Batch:
    split = tiny_data(n, data)
    return Batch(split.x, split.label, split.source, split.text)


def conditions(model: GenerativeModel, n: int) -> dict[str, torch.Tensor]:
    """What `sample` is to be asked with: the model's conditions, `n` rows."""
    batch = tiny_batch(n, model.data)._asdict()
    return {name: batch[name] for name in model.conditions}


@pytest.fixture(autouse=True, scope="module")
def _one_thread_to_begin_with() -> None:
    """Before the module's own fixtures, whatever an earlier module has left."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Results must not depend on the machine's cores, nor on what a fixture has set (a
    classifier is trained with as many threads everywhere)."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _mlflow_of_its_own() -> Iterator[None]:
    """`mlflow.set_tracking_uri` also writes the environment, which later modules' processes of
    the same worker would inherit: their runs would land in a store of another module."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]
