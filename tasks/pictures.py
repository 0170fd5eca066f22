"""Sample grids as PNG."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.util import montage
from torch import Tensor

TARGET_SIDE = 32  # small images are enlarged to about this, pixel by pixel


def save_grid(path: Path, x: Tensor, levels: int, *, columns: int | None = None) -> None:
    """Write levels `[N, C, H, W]` as one picture, roughly square unless `columns` is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or math.ceil(math.sqrt(len(x)))
    images = to_eight_bit(x, levels).permute(0, 2, 3, 1).numpy()
    images = np.repeat(images, 3, 3) if images.shape[3] == 1 else images
    factor = max(1, TARGET_SIDE // min(images.shape[1:3]))
    large = images.repeat(factor, 1).repeat(factor, 2)
    shape = (math.ceil(len(x) / columns), columns)
    grid = montage(large, fill=[128] * 3, grid_shape=shape, padding_width=2, channel_axis=3)
    Image.fromarray(grid.astype(np.uint8)).save(path)


def to_eight_bit(x: Tensor, levels: int) -> Tensor:
    """Levels `0 .. levels - 1` to uint8 `0 .. 255`."""
    return (x.float() * (255 / (levels - 1))).round().to(torch.uint8)
