"""Reading a folder of images, and naming every file that cannot be used."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.data import tables
from tasks.data.archives import is_archive, open_archive, refuse_nested
from tasks.data.config import DatasetConfig
from tasks.data.derive import chosen
from tasks.data.sources import Raw
from tasks.errors import BadInput

Pixels = NDArray[np.uint8]
MAX_PIXELS = 64_000_000
# Pillow's readers of pixels; it has others, of drawings, that start a PostScript interpreter
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000"]
FORMATS += ["ICO", "PCX", "SGI", "TGA"]
# Pillow warns above its limit and raises above twice that, for images within images too
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
MIN_SIDE = 4  # the smallest image that the families can halve
SHOWN = 20


def read_folder(config: DatasetConfig) -> Raw:
    """All images under `config.path`.

    `attributes.csv` beside them gives labels; without it the first folder level below names the
    class. `captions.csv` gives captions.

    Raises:
        BadInput: the folder is missing or holds bad files; every one is named with its reason
            (first 20). With `skip_bad` they are listed in the result instead.
    """
    fs, root, names = list_files(config.path)
    captions = tables.read_captions(fs, root) if tables.CAPTIONS in names else None
    attributes: tuple[str, ...] = ()
    values: dict[str, list[int]] = {}
    if tables.ATTRIBUTES in names:
        attributes, values = tables.read_attributes(fs, root)
    names = [n for n in names if n not in (tables.CAPTIONS, tables.ATTRIBUTES)]
    folders = [] if attributes else _folders(fs, root)
    bad = {f"{f}/": "empty class folder" for f in folders if not any(_in(n, f) for n in names)}
    if folders:
        bad |= {n: "outside the class folders" for n in names if "/" not in n}
    if captions is not None:
        bad |= {n: f"not in {tables.CAPTIONS}" for n in names if n not in captions}
    if attributes:
        bad |= {n: f"not in {tables.ATTRIBUTES}" for n in names if n not in values}
    for table in (captions, values):
        bad |= {n: "named in a table, but no such file" for n in table or () if n not in names}
    images, worse = read_images(fs, root, [n for n in names if n not in bad], config.image_size)
    bad |= worse
    images, skipped = refuse(config, images, bad)

    classes = tuple(f for f in folders if any(_in(n, f) for n in images))
    label = np.array([classes.index(n.split("/")[0]) for n in images]) if classes else None
    if attributes:
        label = np.array([values[n] for n in images])
    return Raw(
        x=stack(list(images.values())),
        levels=256,
        label=label,
        classes=classes,
        attributes=attributes,
        text=None if captions is None else [chosen(captions[n], i) for n, i in images.items()],
        provenance={"source": "image_folder", "files": str(len(images))},
        skipped=skipped,
    )


def list_files(path: str) -> tuple[fsspec.AbstractFileSystem, str, list[str]]:
    """The file system, the folder's path in it, and the names of all files below it.

    A zip file is a folder too.
    """
    refuse_nested(path)
    if is_archive(path):
        fs = open_archive(path)
        root = fs.root
    else:
        fs, root = url_to_fs(path)
    if not fs.isdir(root):
        raise BadInput(f"dataset.path: {path} is not a folder or a zip file")
    names = sorted(p[len(root.rstrip("/")) + 1 :] for p in fs.find(root))
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    if not names:
        raise BadInput(f"dataset.path: {path} holds no files")
    return fs, root, names


def read_images(
    fs: fsspec.AbstractFileSystem,
    root: str,
    names: list[str],
    size: int | None,
    *,
    one_size: bool = True,
) -> tuple[dict[str, Pixels], dict[str, str]]:
    """The images by name, and what is wrong with the others (or is of another size), by name."""

    def read(name: str) -> Pixels | str:
        return _read_image(fs, f"{root.rstrip('/')}/{name}", size)

    with ThreadPoolExecutor() as pool:
        results = dict(zip(names, pool.map(read, names), strict=True))
    images = {n: r for n, r in results.items() if not isinstance(r, str)}
    bad = {n: r for n, r in results.items() if isinstance(r, str)}
    return images, bad | (_odd_sizes(images) if one_size else {})


def refuse(
    config: DatasetConfig, images: dict[str, Pixels], bad: dict[str, str]
) -> tuple[dict[str, Pixels], list[dict[str, str]]]:
    """The images without the bad ones, which are listed; BadInput unless `skip_bad`."""
    if bad and not config.skip_bad:
        raise BadInput(_complaint(config.path, bad))
    images = {n: image for n, image in images.items() if n not in bad}
    if not images:
        raise BadInput(f"dataset.path: {config.path} holds no usable image")
    for name, reason in sorted(bad.items()):
        print(f"skipped {name}: {reason}", flush=True)
    return images, [{"file": n, "reason": r} for n, r in sorted(bad.items())]


def resize(image: Pixels, size: int | None) -> Pixels:
    """Scaled and cropped to a square of `size`; None: as it is."""
    if size is None:
        return image
    fitted = ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def stack(images: list[Pixels]) -> Pixels:
    """`[N, C, H, W]`, of one channel unless one of the images is in colour."""
    grey = all(image.ndim == 2 for image in images)
    return np.stack([_channels(image, grey) for image in images])


def _folders(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    entries = (e for e in fs.ls(root, detail=True) if e["type"] == "directory")
    folders = sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return [f for f in folders if not f.startswith(".")]


def _in(name: str, folder: str) -> bool:
    return name.startswith(folder + "/")


def _read_image(fs: fsspec.AbstractFileSystem, path: str, size: int | None) -> Pixels | str:
    """uint8 `[H, W]` or `[H, W, 3]`, or the reason why not."""
    try:
        with Image.open(io.BytesIO(fs.cat_file(path)), formats=FORMATS) as image:
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                return f"mode {image.mode} is not 8-bit"
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                raised = upright.convert("RGBA")
                white = Image.new("RGBA", raised.size, "white")
                upright = Image.alpha_composite(white, raised).convert("RGB")
            plain = upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
            pixels = resize(np.asarray(plain), size)
            if min(pixels.shape[:2]) < MIN_SIDE:
                return f"{plain.width}x{plain.height} is under {MIN_SIDE} pixels a side"
            return pixels
    except UnidentifiedImageError:
        return "not an image"
    except Image.DecompressionBombError:  # from the header, before anything is decoded
        return f"is over {MAX_PIXELS:,} pixels"
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        return f"cannot be read: {error}"


def _odd_sizes(images: dict[str, Pixels]) -> dict[str, str]:
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
    return (
        f"{path}: {len(bad)} bad: {files}{more}. Mend them, or drop them with dataset.skip_bad=true"
    )


def _channels(image: Pixels, grey: bool) -> Pixels:
    """`[C, H, W]`."""
    if grey:
        return image[None]
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, 2)
    return image.transpose(2, 0, 1)
