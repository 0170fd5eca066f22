"""Digits for the benchmarks: MNIST where it is, else images of its size and number of levels.

torchvision's own dataset reads them for the peers, so they lie as it wants them.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TESTS = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def mnist_folder(given: Path | None) -> Path | None:
    """Where MNIST's files are: the one given, or `GENARENA_DATA`/mnist; None: nowhere."""
    home = os.environ.get("GENARENA_DATA")
    folder = given or (Path(home) / "mnist" if home else None)
    return folder.expanduser() if folder else None


def lay_out(root: Path, given: Path | None) -> str:
    """Make `root` what `torchvision.datasets.MNIST(root)` reads; says what it holds."""
    raw, source = root / "MNIST" / "raw", mnist_folder(given)
    raw.mkdir(parents=True)
    for name in FILES + TESTS:
        if source is None:
            continue
        packed, plain = source / f"{name}.gz", source / name
        if packed.exists():
            with gzip.open(packed) as file, (raw / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        else:
            shutil.copy(plain, raw / name)
    if source is not None:
        return "MNIST"
    rng = np.random.default_rng(0)
    for (images, labels), count in ((FILES, 60_000), (TESTS, 10_000)):
        strokes = rng.integers(0, 256, (count, 7, 7), np.uint8) * rng.integers(0, 2, (count, 7, 7))
        pixels = strokes.astype(np.uint8).repeat(4, 1).repeat(4, 2)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / images).write_bytes(head + pixels.tobytes())
        classes = rng.integers(0, 10, count, np.uint8)
        (raw / labels).write_bytes(struct.pack(">II", 0x801, count) + classes.tobytes())
    return "synthetic digits of MNIST's size (GENARENA_DATA is not set)"


def levels(root: Path, *, binary: bool = False) -> tuple[Tensor, Tensor]:
    """The train split as our shards have it: uint8 `[N, 1, 28, 28]`, labels `[N]`."""
    from torchvision.datasets import MNIST

    split = MNIST(root, train=True)
    x = split.data[:, None]
    return (x > 127).to(torch.uint8) if binary else x, split.targets
