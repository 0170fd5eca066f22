"""Training data that lives on the device: integer levels, indexed there, no loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Batch
from tasks.training.comm import Comm


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
    """

    x: Tensor
    label: Tensor | None = None
    source: Tensor | None = None
    text: Tensor | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        self._epochs: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def __len__(self) -> int:
        """Of the smaller domain, where there are two."""
        return len(self.x) if self.source is None else min(len(self.x), len(self.source))

    def to(self, device: torch.device) -> TrainData:
        whole = Batch(self.x, self.label, self.source, self.text)
        return TrainData(*batch_on(whole, device), self.aligned)

    def batch(self, number: int, batch_size: int, seed: int, comm: Comm) -> Batch:
        """This worker's rows of global batch `number`: shuffled epochs, the remainder left out."""
        rows = self._rows("x", len(self.x), number, batch_size, seed, comm)
        others = rows
        if self.source is not None and not self.aligned:
            others = self._rows("source", len(self.source), number, batch_size, seed, comm)
        return Batch(
            self.x[rows],
            None if self.label is None else self.label[rows],
            None if self.source is None else self.source[others],
            None if self.text is None else self.text[rows],
        )

    def whole(self) -> Batch:
        """Every row at once, for families that are fitted rather than descended."""
        return Batch(self.x, self.label, self.source if self.aligned else None, self.text)

    def _rows(
        self, what: str, size: int, number: int, batch_size: int, seed: int, comm: Comm
    ) -> Tensor:
        epoch, position = divmod(number, size // batch_size)
        mine = batch_size // comm.world
        start = position * batch_size + comm.rank * mine
        return self._order(what, size, seed, epoch)[start : start + mine]

    def _order(self, what: str, size: int, seed: int, epoch: int) -> Tensor:
        known = self._epochs.get(what)
        if known is None or known[0] != (seed, epoch):
            # the two domains must not be shuffled alike: that would pair them again (torch's
            # generator looks at the lower 32 bits alone)
            start = seed * 1_000_003 + epoch ^ (0x5EED5EED if what == "source" else 0)
            generator = torch.Generator().manual_seed(start)
            order = torch.randperm(size, generator=generator).to(self.x.device)
            known = self._epochs[what] = (seed, epoch), order
        return known[1]
