"""Pairs made of single images: edges, low resolution, masks; and captions made of class names.

Integer arithmetic throughout, so that the same images give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.data import SourceSpec
from tasks.data.config import DatasetConfig
from tasks.data.sources import Raw
from tasks.errors import BadInput

Images = NDArray[np.uint8]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST_CAPTION = 128


def derive(raw: Raw, config: DatasetConfig) -> Raw:
    """`raw` with the sources that `config.derive` asks for, and with captions."""
    raw = _with_captions(raw, config)
    if config.derive == "none":
        return raw
    if config.derive == "edges":
        source = edges(raw.x, raw.levels)
    elif config.derive == "low_resolution":
        source = low_resolution(raw.x, config.scale)
    else:
        source = masked(raw.x, raw.levels, config.mask)
    spec = SourceSpec(kind=config.derive, shape=source.shape[1:], aligned=config.paired)
    return replace(raw, source=source, source_spec=spec)


def edges(x: Images, levels: int) -> Images:
    """Edge maps `[N, 1, H, W]` of 0 and `levels - 1`: Sobel's gradient, thinned.

    An edge is where the squared gradient of the channels' sum reaches that of a step of a
    quarter of the range, and is not smaller than at its two neighbours along the gradient
    (Canny 1986, without blur and hysteresis).
    """
    grey = np.pad(x.astype(np.int64).sum(1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    columns = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    dy, dx = rows[:, 2:] - rows[:, :-2], columns[:, :, 2:] - columns[:, :, :-2]
    strength = dx**2 + dy**2
    around = np.pad(strength, ((0, 0), (1, 1), (1, 1)))
    h, w = strength.shape[1:]

    def neighbour(down: int, right: int) -> NDArray[np.int64]:
        return around[:, 1 + down : 1 + down + h, 1 + right : 1 + right + w]

    flat, steep = 5 * abs(dy) <= 2 * abs(dx), 5 * abs(dx) <= 2 * abs(dy)  # tan 22.5° ~ 2/5
    same = (dx > 0) == (dy > 0)
    largest = np.ones_like(flat)
    for chosen, (down, right) in (
        (flat, (0, 1)),
        (steep, (1, 0)),
        (~flat & ~steep & same, (1, 1)),
        (~flat & ~steep & ~same, (1, -1)),
    ):
        # > on one side, >= on the other: of two equal neighbours one stays
        peak = (strength > neighbour(-down, -right)) & (strength >= neighbour(down, right))
        largest &= ~chosen | peak
    step = (levels - 1) * x.shape[1]  # a quarter of the range, times Sobel's weight of 4
    found = largest & (strength >= step**2)
    return (found[:, None] * (levels - 1)).astype(np.uint8)


def low_resolution(x: Images, scale: int) -> Images:
    """`[N, C, H / scale, W / scale]`, bicubic with antialiasing, as super-resolution has it."""
    h, w = x.shape[2:]
    if h % scale or w % scale:
        raise BadInput(
            f"dataset.scale: {w}x{h} images cannot be made {scale} times smaller; "
            f"dataset.image_size {max(h, w) // scale * scale} would do"
        )
    return resized(x, (h // scale, w // scale))


def resized(x: Images, size: tuple[int, int]) -> Images:
    """Bicubic resizing of each channel to (height, width), in the same levels."""
    n, channels = x.shape[:2]
    planes = [
        np.asarray(Image.fromarray(plane).resize(size[::-1], Image.Resampling.BICUBIC))
        for plane in x.reshape(-1, *x.shape[2:])
    ]
    top = x.max(initial=0)  # the filter overshoots, in sets of fewer than 256 levels as well
    return np.stack(planes).reshape(n, channels, *size).clip(0, top)


def masked(x: Images, levels: int, where: str) -> Images:
    """`[N, C + 1, H, W]`: the image with a hole of half its sides, and the hole itself."""
    n, _, h, w = x.shape
    hole = np.zeros((n, 1, h, w), np.uint8)
    tall, wide = max(h // 2, 1), max(w // 2, 1)
    for i, image in enumerate(x):
        top, left = (h - tall) // 2, (w - wide) // 2
        if where == "random":
            draw = int.from_bytes(hashlib.sha256(b"hole" + image.tobytes()).digest()[:8], "big")
            top, left = draw % (h - tall + 1), draw // (h - tall + 1) % (w - wide + 1)
        hole[i, :, top : top + tall, left : left + wide] = 1
    return np.concatenate([x * (1 - hole), hole * (levels - 1)], 1).astype(np.uint8)


def _with_captions(raw: Raw, config: DatasetConfig) -> Raw:
    """Captions from the templates, each image's template chosen by its content."""
    if config.captions and raw.text is None:
        if not raw.classes or raw.label is None:
            raise BadInput("dataset.captions: the templates need class names, and there are none")
        names = [WORDS[int(c)] if c in set("0123456789") else c for c in raw.classes]
        raw = replace(
            raw,
            text=[
                chosen(config.captions, image).replace("{name}", names[int(label)])
                for image, label in zip(raw.x, raw.label, strict=True)
            ],
        )
    for text in raw.text or ():
        if not 0 < len(text.encode()) <= LONGEST_CAPTION:
            raise BadInput(
                f"captions: {text[:40]!r} has {len(text.encode())} bytes; "
                f"1 to {LONGEST_CAPTION} are possible"
            )
    return raw


def chosen(candidates: tuple[str, ...] | list[str], image: NDArray[Any]) -> str:
    """One of the candidates, by the hash of the image's content."""
    digest = hashlib.sha256(b"caption" + image.tobytes()).digest()
    return candidates[int.from_bytes(digest[:8], "big") % len(candidates)]
