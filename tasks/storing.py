"""Generated samples as files: Parquet parts, pictures, and a note of where they came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHEET = 10  # images in each direction of a sheet, and of grid.png
SINGLE = 1000  # up to so many images, each has a PNG file of its own; above, sheets

Samples = np.ndarray[Any, Any]


class Store:
    """Writes the parts of one job in their order; the same samples make the same bytes."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.single = folder, total <= SINGLE
        self.parts, self.written = 0, 0
        self.waiting: list[Samples] = []  # images for the next sheet
        self.first: list[Samples] = []  # and for grid.png
        (folder / "samples").mkdir(parents=True)

    def add(self, samples: Samples, conditions: dict[str, str]) -> None:
        """One slice: uint8 images `[n, H, W, C]`, strings `[n]` or cells `[n, 2]`."""
        columns = {**_columns(samples), **{c: [v] * len(samples) for c, v in conditions.items()}}
        file = self.folder / "samples" / f"part-{self.parts:05d}.parquet"
        pq.write_table(pa.table(columns), file)
        if samples.dtype != object and samples.ndim == 4:
            self._pictures(samples)
        self.parts += 1
        self.written += len(samples)

    def _pictures(self, images: Samples) -> None:
        folder = self.folder / "png"
        folder.mkdir(exist_ok=True)
        self.first.extend(images[: SHEET**2 - len(self.first)])
        if self.single:
            for number, image in enumerate(images, self.written):
                save(folder / f"{number:05d}.png", image)
            return
        self.waiting.extend(images)
        while len(self.waiting) >= SHEET**2:
            self._sheet()

    def _sheet(self) -> None:
        number = len(list((self.folder / "png").iterdir()))
        images, self.waiting = self.waiting[: SHEET**2], self.waiting[SHEET**2 :]
        save(self.folder / "png" / f"sheet-{number:05d}.png", sheet(np.stack(images)))

    def close(self) -> None:
        """Write the last sheet, which need not be full, and `grid.png`."""
        if self.first:
            save(self.folder / "grid.png", sheet(np.stack(self.first)))
        if self.waiting:
            self._sheet()


def _columns(samples: Samples) -> dict[str, Any]:
    """Text as `text`; points as `x`, `y`; images as bytes `x`, row by row, beside their sides."""
    if samples.dtype == object:
        return {"text": pa.array([str(text) for text in samples], pa.string())}
    if samples.ndim == 2:
        return {"x": pa.array(samples[:, 0]), "y": pa.array(samples[:, 1])}
    sides = dict(zip(("height", "width", "channels"), samples.shape[1:], strict=True))
    x = pa.array([image.tobytes() for image in samples], pa.binary())
    return {"x": x, **{k: pa.array([v] * len(samples), pa.int32()) for k, v in sides.items()}}


def sheet(images: Samples) -> Samples:
    """Images `[n, H, W, C]` in rows of ten, black where there are none."""
    n, height, width, channels = images.shape
    rows = math.ceil(n / SHEET)
    full = np.zeros((rows * SHEET, height, width, channels), np.uint8)
    full[:n] = images
    grid = full.reshape(rows, SHEET, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, SHEET * width, channels)


def save(path: Path, image: Samples) -> None:
    """An image `[H, W, C]` as PNG."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
