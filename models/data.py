"""What data is, to a family: its description, a batch of it, and levels as real numbers.

Data are integer levels in `0 .. levels - 1` wherever they cross the interface: images
`[B, C, H, W]`, text `[B, T]` (bytes), points of the plane `[B, 2]` (cells of a grid). What a
family does inside (scaling, dequantisation) is its own business. Labels are class numbers `[B]`,
or `[B, A]` of 0 and 1 where the data has attributes. Captions are UTF-8 bytes `[B, T]`, zeros
after the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from models.config import Config, Positive

Modality = Literal["image", "text", "points"]
PLURALS = {"image": "images", "text": "text", "points": "points"}


class SourceSpec(Config):
    """The other image of a pair, or the other domain: what translation starts from.

    A `masked` source has one channel more than the image, the last: `levels - 1` where pixels
    are missing (they are 0 in the others), 0 where they are known.
    """

    kind: Literal["pair", "edges", "low_resolution", "masked"]
    shape: tuple[Positive, ...]  # (C, H, W)
    aligned: bool = True  # False: training never sees a pair, its rows are drawn independently
    truth: bool = True  # whether the rows of validation and test are true pairs


class DataSpec(Config):
    """What a family must know of the data to size itself."""

    shape: tuple[Positive, ...]  # one example: image (C, H, W), text (T,), points (2,)
    levels: int = Field(ge=2)  # integer levels of one channel, 256 for 8-bit images and bytes
    classes: tuple[str, ...] = ()  # names; empty when there are no labels
    attributes: tuple[str, ...] = ()  # names of yes/no attributes; then there are no classes
    source: SourceSpec | None = None
    text_length: int = Field(0, ge=0)  # bytes of the longest caption; 0: no captions
    modality: Modality = "image"

    @property
    def dimensions(self) -> int:
        """Discrete values in one example; the D of bits per dimension."""
        return math.prod(self.shape)


class Batch(NamedTuple):
    """What the data layer hands every family."""

    x: Tensor  # integer levels, [B, *shape], uint8
    label: Tensor | None = None  # [B] class numbers, or [B, A] attributes; int64
    source: Tensor | None = None  # levels of the other image of each pair, or of the other domain
    text: Tensor | None = None  # [B, T] bytes of the captions, uint8, zeros after the end


def to_signed(x: Tensor, levels: int) -> Tensor:
    """Levels `0 .. levels - 1` to floats in [-1, 1]."""
    return x.to(torch.get_default_dtype()) * (2.0 / (levels - 1)) - 1.0


def from_signed(y: Tensor, levels: int) -> Tensor:
    """Floats in [-1, 1] to the nearest level, as uint8; what lies outside is clamped."""
    _note_nans(y)
    scaled = (y.float() + 1.0) * ((levels - 1) / 2.0)
    return scaled.round().clamp(0, levels - 1).to(torch.uint8)


def from_unit(y: Tensor, levels: int) -> Tensor:
    """Reals in [0, 1) to the level in whose cell they lie, as uint8, which undoes `dequantise`;
    what lies outside is clamped."""
    _note_nans(y)
    return (y * levels).floor().clamp(0, levels - 1).to(torch.uint8)


_nans: ContextVar[list[int] | None] = ContextVar("nans", default=None)


@contextmanager
def counting_nans() -> Iterator[list[int]]:
    """Inside, `from_signed` and `from_unit` note how many of the examples that they are given hold
    a value that is not a number: as a level, nothing would tell it from the others. Yields the list
    of the counts, one for each call."""
    counts: list[int] = []
    token = _nans.set(counts)
    try:
        yield counts
    finally:
        _nans.reset(token)


def _note_nans(y: Tensor) -> None:
    counts = _nans.get()
    if counts is not None:
        counts.append(int(y.isnan().flatten(1).any(1).sum()))
