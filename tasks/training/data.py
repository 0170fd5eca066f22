"""Training data that lives on the device: integer levels, indexed there, no loader.

What is too large for that streams: `tasks.training.stream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.data import Batch
from tasks.training.comm import Comm
from tasks.training.order import Order, place

# the order of another domain's rows must not be that of the images: it would pair them again
SOURCES = 0x5EED5EED


def check_batch(images: int, batch_size: int, world: int) -> None:
    """Raises ValueError where `world` workers cannot share such a batch of so many images."""
    if batch_size > images:
        raise ValueError(
            f"train.batch_size: {batch_size} is more than the {images} training images; "
            f"the largest possible is {images // world * world}"
        )
    if batch_size % world:
        nearest = max(world, batch_size // world * world)
        raise ValueError(
            f"train.batch_size: {batch_size} cannot be shared by {world} workers; "
            f"the nearest that can is {nearest}"
        )


def batch_on(batch: Batch, device: torch.device) -> Batch:
    """The batch on that device."""

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    return Batch(batch.x.to(device), *map(moved, batch[1:]))


class Data(Protocol):
    """What the loop asks of training data, wherever it lies."""

    def __len__(self) -> int: ...

    def batch(self, number: int, batch_size: int, seed: int, comm: Comm) -> Batch:
        """This worker's rows of global batch `number`: shuffled epochs, the remainder left out."""

    def whole(self) -> Batch:
        """Every row at once, for families that are fitted rather than descended."""


@dataclass
class TrainData:
    """One split on one device.

    Attributes:
        x: uint8 levels `[N, C, H, W]`.
        label: int64 `[N]` or `[N, A]`, or None.
        source: uint8 levels of the other image of each pair, or None.
        text: uint8 bytes of the captions `[N, T]`, or None.
        aligned: False where the sources are another domain `[M, ...]`: their rows are drawn in
            an order of their own, so that no batch holds a pair but by chance.
        orders: of the rows, and of the sources where they are another domain; None: the rows
            are one block.
    """

    x: Tensor
    label: Tensor | None = None
    source: Tensor | None = None
    text: Tensor | None = None
    aligned: bool = True
    orders: tuple[Order, ...] | None = None

    def __post_init__(self) -> None:
        if self.orders is None:
            others = () if self.source is None else (Order([len(self.source)], 1, SOURCES),)
            self.orders = (Order([len(self.x)], 1), *others)
        self._epochs: dict[Order, tuple[tuple[int, int], Tensor]] = {}

    def __len__(self) -> int:
        """Of the smaller domain, where there are two."""
        return len(self.x) if self.source is None else min(len(self.x), len(self.source))

    def to(self, device: torch.device) -> TrainData:
        whole = Batch(self.x, self.label, self.source, self.text)
        return TrainData(*batch_on(whole, device), self.aligned, self.orders)

    def batch(self, number: int, batch_size: int, seed: int, comm: Comm) -> Batch:
        assert self.orders is not None
        rows = self._rows(self.orders[0], number, batch_size, seed, comm)
        others = rows
        if self.source is not None and not self.aligned:
            others = self._rows(self.orders[1], number, batch_size, seed, comm)
        return Batch(
            self.x[rows],
            None if self.label is None else self.label[rows],
            None if self.source is None else self.source[others],
            None if self.text is None else self.text[rows],
        )

    def whole(self) -> Batch:
        return Batch(self.x, self.label, self.source if self.aligned else None, self.text)

    def _rows(self, order: Order, number: int, batch_size: int, seed: int, comm: Comm) -> Tensor:
        epoch, start, count = place(order.rows, number, batch_size, comm)
        known = self._epochs.get(order)
        if known is None or known[0] != (seed, epoch):
            rows = order.epoch(seed, epoch).rows().to(self.x.device)
            known = self._epochs[order] = (seed, epoch), rows
        return known[1][start : start + count]
