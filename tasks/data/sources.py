"""Sources: each turns its files into `Raw`, arrays with nothing decided about splits."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.base import SourceSpec
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput

DEFAULT_PATH = "data/raw"


@dataclass
class Raw:
    """A source as it was read.

    Attributes:
        x: uint8 levels `[N, C, H, W]`.
        label: int64 `[N]`, or `[N, A]` attributes, or None where the source has no labels.
        is_test: bool `[N]` where the source has an official test split, else None.
        source: uint8 levels `[N, C', H', W']` of the other image of each pair, or, where
            `source_spec.truth` is False, `[M, ...]` of the other domain; or None.
        text: a caption for each image, or None.
        provenance: where it came from; nothing that differs between machines.
        skipped: files that were left out, each with its reason.
    """

    x: NDArray[np.uint8]
    levels: int
    label: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    is_test: NDArray[np.bool_] | None = None
    source: NDArray[np.uint8] | None = None
    source_spec: SourceSpec | None = None
    text: list[str] | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


def digits(config: DatasetConfig) -> Raw:
    """The 1,797 handwritten digits, 8x8 with 17 levels, that come inside scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Raw(
        x=bunch.images.astype(np.uint8)[:, None],
        levels=17,
        label=bunch.target.astype(np.int64),
        classes=tuple("0123456789"),
        provenance={"source": "sklearn.datasets.load_digits (UCI optical recognition, test half)"},
    )


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(config: DatasetConfig) -> Raw:
    """MNIST from the original IDX files under `path`, else from torchvision's download."""
    folder = Path(config.path)
    if not any(_idx_file(folder, name) for name in MNIST_FILES):
        if config.path != DEFAULT_PATH:
            raise BadInput(
                f"dataset.path: no MNIST files in {folder}; expected {', '.join(MNIST_FILES)} "
                "(each plain or with .gz)"
            )
        folder = _download_mnist()
    arrays = {}
    for name in MNIST_FILES:
        file = _idx_file(folder, name)
        if file is None:
            raise BadInput(f"dataset.path: {folder} lacks {name} (plain or with .gz)")
        arrays[name] = _read_idx(file)
    images = [arrays[n] for n in MNIST_FILES if "images" in n]
    labels = [arrays[n] for n in MNIST_FILES if "labels" in n]
    for image, label, part in zip(images, labels, ("train", "t10k"), strict=True):
        if len(image) != len(label):
            raise BadInput(f"{folder}: {part} has {len(image)} images but {len(label)} labels")
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()
    return Raw(
        x=np.concatenate(images)[:, None],
        levels=256,
        label=np.concatenate(labels).astype(np.int64),
        classes=tuple("0123456789"),
        is_test=np.repeat([False, True], [len(images[0]), len(images[1])]),
        provenance={"source": "MNIST, original IDX files", "sha256": digest},
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz", folder / "MNIST" / "raw" / name):
        if candidate.is_file():
            return candidate
    return None


def _read_idx(file: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or not."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, kind, rank = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        body = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
        if zeros or kind != 8 or body.size != np.prod(shape):
            raise ValueError(f"not unsigned bytes of shape {shape}: {body.size} bytes follow")
        return body.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise BadInput(f"{file}: not a whole IDX file ({error})") from error


def _download_mnist() -> Path:
    """Through torchvision, which checks the files' md5, into the project's download cache."""
    from torchvision.datasets import MNIST

    root = Path(".genarena/downloads")
    try:
        MNIST(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise BadInput(
            f"dataset: MNIST could not be downloaded ({error}); give its folder in dataset.path "
            "(make run DATA_PATH=...)"
        ) from error
    return root / "MNIST" / "raw"


def image_folder(config: DatasetConfig) -> Raw:
    """Any folder or fsspec URI of images; the class is the sub-folder."""
    from tasks.data.images import read_folder

    return read_folder(config)


def paired_folder(config: DatasetConfig) -> Raw:
    """Pairs of images: A|B in one file, or two sub-folders `source` and `target`."""
    from tasks.data.pairs import read_pairs

    return read_pairs(config)


SOURCES: dict[str, Callable[[DatasetConfig], Raw]] = {
    "digits": digits,
    "mnist": mnist,
    "image_folder": image_folder,
    "paired_folder": paired_folder,
}
