"""Sources: each turns its files into `Raw`, arrays with nothing decided about splits."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data import Modality, SourceSpec
from tasks.data.archives import unzipped
from tasks.data.config import DEFAULT_PATH, DatasetConfig
from tasks.errors import BadInput

SPLITS = ("train", "validation", "test")
MAX_IMAGES = 1_000_000  # in one file of MNIST's kind, of which MNIST has 60,000
MAX_IDX = 16 + MAX_IMAGES * 28 * 28
MAX_AMAT = MAX_IMAGES * (2 * 28 * 28 + 1)  # a digit and a space for every pixel


@dataclass
class Raw:
    """A source as it was read.

    Attributes:
        x: uint8 levels `[N, *shape]`.
        label: int64 `[N]`, or `[N, A]` attributes, or None where the source has no labels.
        official: the split of each row, `[N]`, where the source has official ones, else None.
        source: uint8 levels `[N, C', H', W']` of the other image of each pair, or, where
            `source_spec.truth` is False, `[M, ...]` of the other domain; or None.
        text: a caption for each image, or None.
        truth: what is known of the density itself, where it is: `entropy_nats`.
        provenance: where it came from; nothing that differs between machines.
        skipped: files that were left out, each with its reason.
    """

    x: NDArray[np.uint8]
    levels: int
    label: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    official: NDArray[np.str_] | None = None
    source: NDArray[np.uint8] | None = None
    source_spec: SourceSpec | None = None
    text: list[str] | None = None
    modality: Modality = "image"
    truth: dict[str, float] = field(default_factory=dict)
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
        official=np.repeat(["train", "test"], [len(images[0]), len(images[1])]),
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
        content = unzipped(file, MAX_IDX) if file.suffix == ".gz" else file.read_bytes()
        zeros, kind, rank = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        body = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
        if zeros or kind != 8 or body.size != np.prod(shape):
            raise ValueError(f"not unsigned bytes of shape {shape}: {body.size} bytes follow")
        return body.reshape(shape)
    except BadInput:
        raise
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


def binarized_mnist(config: DatasetConfig) -> Raw:
    """Larochelle's statically binarised MNIST: text rows of 784 zeros and ones, three splits."""
    folder, parts = Path(config.path), []
    names = [f"binarized_mnist_{split}.amat" for split in ("train", "valid", "test")]
    for name in names:
        file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
        if file is None:
            raise BadInput(f"dataset.path: {folder} lacks {name} (plain or with .gz)")
        parts.append(_read_amat(file))
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return Raw(
        x=np.concatenate(parts)[:, None],
        levels=2,
        official=np.repeat(SPLITS, [len(part) for part in parts]),
        provenance={"source": "statically binarised MNIST (Larochelle)", "sha256": digest},
    )


def _read_amat(file: Path) -> NDArray[np.uint8]:
    """`[N, 28, 28]` of 0 and 1 from lines of 784 numbers with spaces between."""
    try:
        content = unzipped(file, MAX_AMAT) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from error
    digits = np.frombuffer(content.translate(None, b" \t\r\n"), np.uint8) - ord("0")
    rows = content.count(b"\n") + (not content.endswith(b"\n"))
    if digits.size != rows * 784 or digits.size == 0 or digits.max() > 1:
        raise BadInput(f"{file}: not lines of 784 zeros and ones")
    return digits.reshape(rows, 28, 28)


def text(config: DatasetConfig) -> Raw:
    """Windows of bytes, of Python's own documentation topics or of the files under `path`."""
    from tasks.data.text import read_text

    return read_text(config)


def toy2d(config: DatasetConfig) -> Raw:
    """Points of the plane whose density is known."""
    from tasks.data.toy2d import draw

    return draw(config)


SOURCES: dict[str, Callable[[DatasetConfig], Raw]] = {
    "digits": digits,
    "mnist": mnist,
    "binarized_mnist": binarized_mnist,
    "image_folder": image_folder,
    "paired_folder": paired_folder,
    "text": text,
    "toy2d": toy2d,
}
