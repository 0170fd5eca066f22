"""Adaptive augmentation: what is done to the images that the discriminator sees."""

from __future__ import annotations

import torch
from torch import Tensor

from models.noise import rand, randn


def augment(x: Tensor, p: Tensor, *, mirror: bool = False) -> Tensor:
    """Images in [-1, 1], each changed in each way with probability `p`; twice differentiable."""
    n, _, *sides = x.shape
    u, v = rand((n, 10, 1), x.device), randn((n, 2, 1, 1), x.device)
    on = u[:, :5] < p
    places, holes = [], []
    for axis, side in enumerate(sides):
        i = torch.arange(side, device=x.device)
        if mirror and axis == 1:
            i = torch.where(on[:, 4] & (u[:, 9] < 0.5), side - 1 - i, i)
        moved = (i - on[:, 0] * ((2 * u[:, 5 + axis] - 1) * side / 8).round().long()).abs()
        places.append(torch.where(moved < side, moved, 2 * (side - 1) - moved))  # reflected
        holes.append(on[:, 3] & (((i + 0.5) / side - u[:, 7 + axis]).abs() < 0.25))
    example = torch.arange(n, device=x.device)[:, None, None]
    x = x.movedim(1, 3)[example, places[0][:, :, None], places[1][:, None]].movedim(3, 1)
    x = x + 0.2 * on[:, 1, None, None] * v[:, :1]
    x = x * torch.exp2(0.5 * on[:, 2, None, None] * v[:, 1:])
    return x.masked_fill((holes[0][:, :, None] & holes[1][:, None])[:, None], 0.0)
