"""Text as windows of bytes: files of one's own, or the documentation inside Python itself."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy as np

from tasks.data.config import DEFAULT_PATH, DatasetConfig
from tasks.data.sources import SPLITS, Raw
from tasks.errors import BadInput


def read_text(config: DatasetConfig) -> Raw:
    """Consecutive windows of `config.window` bytes; the rest at the end is left out.

    The splits are contiguous, in the order of the text: train, validation, test. Neighbouring
    windows are of one speech or one page, so drawing the splits window by window would test a
    model on what it half knows.

    `path` is a text file, or a folder whose `*.txt` files are read in the order of their names;
    left at its default, the text is `pydoc_data.topics`, the documentation topics of Python's
    standard library (which differ from one Python version to the next).
    """
    if config.path == DEFAULT_PATH:
        content, source = _topics(), f"pydoc_data.topics of Python {platform.python_version()}"
    else:
        content, source = _files(Path(config.path)), "text files"
    count = len(content) // config.window
    if count == 0:
        raise BadInput(
            f"dataset.path: {config.path} has {len(content)} bytes, less than one window of "
            f"{config.window} (dataset.window)"
        )
    used = np.frombuffer(content, np.uint8, count * config.window)
    place = np.arange(count) / count
    train = 1 - config.validation - config.test
    split = np.select([place < train, place < 1 - config.test], SPLITS[:2], SPLITS[2])
    return Raw(
        x=used.reshape(count, config.window).copy(),
        levels=256,
        official=split,
        modality="text",
        provenance={"source": source, "sha256": hashlib.sha256(content).hexdigest()},
    )


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _files(path: Path) -> bytes:
    files = [path] if path.is_file() else sorted(path.glob("*.txt"))
    if not files:
        what = "no *.txt files in" if path.is_dir() else "no file or folder at"
        raise BadInput(f"dataset.path: {what} {path}")
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes())
            parts[-1].decode()
        except OSError as error:
            raise BadInput(f"dataset.path: {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadInput(
                f"dataset.path: {file}: not UTF-8 text (byte {error.start} is "
                f"{error.object[error.start]:#04x})"
            ) from error
    return b"".join(parts)
