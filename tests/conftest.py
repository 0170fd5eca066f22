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

from models import FAMILIES
from models.base import DataSpec, GenerativeModel
from tasks.environment import prepare_environment

prepare_environment()

TINY = DataSpec(shape=(1, 8, 8), levels=4, classes=("a", "b"))
SMALL_CONFIGS = {
    "vae": {"latent_dim": 4, "width": 8, "hidden": 16, "mixture": 2},
    "dcgan": {"latent_dim": 4, "width": 8, "inversion_steps": 5},
    "realnvp": {"width": 8, "blocks": 1},
}


def tiny_model(family: str, data: DataSpec = TINY, **changes: object) -> GenerativeModel:
    """A small model of the family, the same at every call."""
    cls = FAMILIES[family]
    torch.manual_seed(0)
    return cls(cls.Config(**{**SMALL_CONFIGS.get(family, {}), **changes}), data)


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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Results must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]
