"""Sample grids as PNG."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

TARGET_SIDE = 32  # small images are enlarged to about this, pixel by pixel


def save_grid(path: Path, x: Tensor, levels: int, *, columns: int | None = None) -> None:
    """Write levels `[N, C, H, W]` as one picture, roughly square unless `columns` is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = to_eight_bit(x, levels).float() / 255
    factor = max(1, TARGET_SIDE // min(images.shape[-2:]))
    images = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    columns = columns or math.ceil(math.sqrt(len(images)))
    save_image(make_grid(images, nrow=columns, padding=2, pad_value=0.5), path)


def to_eight_bit(x: Tensor, levels: int) -> Tensor:
    """Levels `0 .. levels - 1` to uint8 `0 .. 255`."""
    return (x.float() * (255 / (levels - 1))).round().to(torch.uint8)
