"""Samples as PNG: grids of images, histograms of points, pages of text."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.util import montage
from torch import Tensor

from models.data import DataSpec

TARGET_SIDE = 32  # small images are enlarged to about this, pixel by pixel
TEXTS, LINE = 6, 100  # samples of text that are shown, and characters of a line


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


def show(path: Path, x: Tensor, data: DataSpec) -> None:
    """Write samples `[N, *shape]` of any modality as one picture; text also as `.txt` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data.modality == "image":
        save_grid(path, x, data.levels)
    elif data.modality == "points":
        save_plane(path, histogram(x, data.levels))
    else:
        page = "\n\n".join(f"--- {i + 1}\n{wrapped(row)}" for i, row in enumerate(x[:TEXTS]))
        path.with_suffix(".txt").write_text(page + "\n")
        _save_text(path, page)


def histogram(x: Tensor, cells: int) -> Tensor:
    """How many points `[N, 2]` lie in each cell, `[cells, cells]`, first coordinate first."""
    flat = x[:, 0].long().cpu() * cells + x[:, 1].long().cpu()
    return torch.bincount(flat, minlength=cells**2).view(cells, cells).float()


def save_plane(path: Path, density: Tensor) -> None:
    """Write numbers `[W, H]` over the plane as colours: first coordinate rightwards, second up."""
    import matplotlib.image
    from matplotlib import colormaps

    colours = colormaps["magma"](np.clip(density.numpy() / max(float(density.max()), 1e-30), 0, 1))
    matplotlib.image.imsave(path, colours.transpose(1, 0, 2)[::-1].repeat(2, 0).repeat(2, 1))


def wrapped(row: Tensor) -> str:
    """Bytes as text, long lines broken; what is no UTF-8 is shown as such."""
    text = bytes(row.to(torch.uint8).tolist()).split(b"\0")[0].decode(errors="replace")
    return "\n".join("\n".join(textwrap.wrap(line, LINE)) for line in text.splitlines())


def _save_text(path: Path, page: str) -> None:
    font = ImageFont.load_default(14)
    lines = page.splitlines() or [""]
    canvas = Image.new("RGB", (760, 20 * len(lines) + 16), "white")
    drawing = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        drawing.text((10, 8 + 20 * number), line, fill="black", font=font)
    canvas.save(path)


def to_eight_bit(x: Tensor, levels: int) -> Tensor:
    """Levels `0 .. levels - 1` to uint8 `0 .. 255`."""
    return (x.float() * (255 / (levels - 1))).round().to(torch.uint8)
