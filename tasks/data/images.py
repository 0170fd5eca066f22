"""Reading a folder of images, and naming every file that cannot be used."""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.data.config import DatasetConfig
from tasks.data.sources import Raw
from tasks.errors import BadInput

MAX_PIXELS = 64_000_000
MIN_SIDE = 4  # the smallest image that the families can halve
SHOWN = 20


def read_folder(config: DatasetConfig) -> Raw:
    """All images under `config.path`; the first folder level below it names the class.

    Raises:
        BadInput: the folder is missing or holds bad files; every one is named with its reason
            (first 20). With `skip_bad` they are listed in the result instead.
    """
    fs, root = url_to_fs(config.path)
    if not fs.isdir(root):
        raise BadInput(f"dataset.path: {config.path} is not a folder")
    names = sorted(p[len(root.rstrip("/")) + 1 :] for p in fs.find(root))
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    folders = sorted(
        entry["name"].rstrip("/").rsplit("/", 1)[-1]
        for entry in fs.ls(root, detail=True)
        if entry["type"] == "directory"
    )
    folders = [f for f in folders if not f.startswith(".")]
    bad: dict[str, str] = {}
    for folder in folders:
        if not any(n.startswith(folder + "/") for n in names):
            bad[folder + "/"] = "empty class folder"
    if folders:
        bad |= {n: "outside the class folders" for n in names if "/" not in n}
    if not names:
        raise BadInput(f"dataset.path: {config.path} holds no files")

    def read(name: str) -> np.ndarray[Any, Any] | str:
        return _read_image(fs, f"{root.rstrip('/')}/{name}", config.image_size)

    usable = [n for n in names if n not in bad]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, usable))
    images = {n: r for n, r in zip(usable, results, strict=True) if not isinstance(r, str)}
    bad |= {n: r for n, r in zip(usable, results, strict=True) if isinstance(r, str)}
    bad |= _odd_sizes(images)
    if bad and not config.skip_bad:
        raise BadInput(_complaint(config.path, bad))
    images = {n: image for n, image in images.items() if n not in bad}
    if not images:
        raise BadInput(f"dataset.path: {config.path} holds no usable image")
    for name, reason in sorted(bad.items()):
        print(f"skipped {name}: {reason}", flush=True)

    grey = all(image.ndim == 2 for image in images.values())
    stacked = np.stack([_channels(image, grey) for image in images.values()])
    classes = tuple(f for f in folders if any(n.startswith(f + "/") for n in images))
    label = np.array([classes.index(n.split("/")[0]) for n in images]) if classes else None
    return Raw(
        x=stacked,
        levels=256,
        label=label,
        classes=classes,
        provenance={"source": "image_folder", "files": str(len(images))},
        skipped=[{"file": n, "reason": r} for n, r in sorted(bad.items())],
    )


def _read_image(
    fs: fsspec.AbstractFileSystem, path: str, size: int | None
) -> np.ndarray[Any, Any] | str:
    """uint8 `[H, W]` or `[H, W, 3]`, or the reason why not."""
    try:
        with Image.open(io.BytesIO(fs.cat_file(path))) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} is over {MAX_PIXELS:,} pixels"
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                return f"mode {image.mode} is not 8-bit"
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                raised = upright.convert("RGBA")
                white = Image.new("RGBA", raised.size, "white")
                upright = Image.alpha_composite(white, raised).convert("RGB")
            plain = upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
            if size is not None:
                plain = ImageOps.fit(plain, (size, size), Image.Resampling.LANCZOS)
            if min(plain.size) < MIN_SIDE:
                return f"{plain.width}x{plain.height} is under {MIN_SIDE} pixels a side"
            return np.asarray(plain)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        return f"cannot be read: {error}"


def _odd_sizes(images: dict[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """The files whose size is not the most frequent one (the larger, where two tie)."""
    sizes = Counter(image.shape[:2] for image in images.values())
    if len(sizes) < 2:
        return {}
    common = max(sizes, key=lambda s: (sizes[s], s))
    wanted = f"{common[1]}x{common[0]}"
    return {
        n: f"is {i.shape[1]}x{i.shape[0]}, most are {wanted} (dataset.image_size makes them equal)"
        for n, i in images.items()
        if i.shape[:2] != common
    }


def _complaint(path: str, bad: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in sorted(bad.items())]
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    files = "; ".join(shown[:SHOWN])
    return f"{path}: {len(bad)} bad: {files}{more}. Mend them or set dataset.skip_bad: true"


def _channels(image: np.ndarray[Any, Any], grey: bool) -> np.ndarray[Any, Any]:
    """`[C, H, W]`."""
    if grey:
        return image[None]
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, 2)
    return image.transpose(2, 0, 1)
