"""Noise that does not depend on the number of workers, and what is drawn of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from models.data import DataSpec

_shard: ContextVar[tuple[int, int]] = ContextVar("shard", default=(0, 1))


@contextmanager
def noise_shard(rank: int, world: int) -> Iterator[None]:
    """Inside, `randn` and `rand` draw the global batch's noise and keep this rank's rows.

    Every worker seeds alike, so two workers with batch B see the noise that one worker with
    batch 2B sees. Drawing the other rows too costs little beside a network.
    Blocks that look across the batch (`models.nn`) take the number of workers from here as well.
    """
    token = _shard.set((rank, world))
    try:
        yield
    finally:
        _shard.reset(token)


def randn(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise; the first dimension of `shape` is the batch."""
    return _rows(torch.randn, shape, device)


def rand(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform noise in [0, 1); the first dimension of `shape` is the batch."""
    return _rows(torch.rand, shape, device)


def _rows(draw: Any, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    rank, world = _shard.get()
    rows = shape[0]
    return draw(rows * world, *shape[1:], device=device)[rank * rows : (rank + 1) * rows]


def shard() -> tuple[int, int]:
    """(rank, world) inside `noise_shard`; (0, 1) outside."""
    return _shard.get()


def dequantise(x: Tensor, levels: int) -> tuple[Tensor, float]:
    """Uniform dequantisation: levels to reals in [0, 1), with the log-volume of the map.

    Returns `y = (x + u) / levels`, u ~ U[0, 1), and `c` such that for a density p over y
    `log P(x) >= E_u[log p(y)] + c` (Theis et al. 2016, section 3.1); c is in nats for one
    whole example.
    """
    u = rand(x.shape, x.device)
    return (x.to(u.dtype) + u) / levels, -math.prod(x.shape[1:]) * math.log(levels)


def random_labels(n: int, data: DataSpec, device: torch.device) -> Tensor:
    """Labels for samples that nobody asked a label of: uniform over classes, or fair attributes."""
    if data.attributes:
        return (rand((n, len(data.attributes)), device) < 0.5).long()
    return (rand((n,), device) * len(data.classes)).long()
