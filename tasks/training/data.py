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


@dataclass
class TrainData:
    """One split on one device.

    Attributes:
        x: uint8 levels `[N, C, H, W]`.
        label: int64 `[N]`, or None.
        source: uint8 levels of the other image of each pair, or None.
    """

    x: Tensor
    label: Tensor | None = None
    source: Tensor | None = None

    def __post_init__(self) -> None:
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> TrainData:
        label, source = self.label, self.source
        return TrainData(
            self.x.to(device),
            None if label is None else label.to(device),
            None if source is None else source.to(device),
        )

    def batch(self, number: int, batch_size: int, seed: int, comm: Comm) -> Batch:
        """This worker's rows of global batch `number`: shuffled epochs, the remainder left out."""
        per_epoch = len(self) // batch_size
        epoch, position = divmod(number, per_epoch)
        mine = batch_size // comm.world
        start = position * batch_size + comm.rank * mine
        rows = self._order(seed, epoch)[start : start + mine]
        label, source = self.label, self.source
        return Batch(
            self.x[rows],
            None if label is None else label[rows],
            None if source is None else source[rows],
        )

    def _order(self, seed: int, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(self), generator=generator).to(self.x.device)
            self._epoch = (seed, epoch), order
        return self._epoch[1]
