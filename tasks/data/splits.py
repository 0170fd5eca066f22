"""Which split each image falls into: decided by its content, never by its place in the source."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tasks.data.config import DatasetConfig
from tasks.data.sources import SPLITS, Raw

__all__ = ["SPLITS", "assign", "domains", "duplicates"]


def assign(
    hashes: list[bytes], official: NDArray[np.str_] | None, config: DatasetConfig
) -> list[str]:
    """The split of each row: a number in [0, 1) made of its content decides.

    Where the source has official splits they stand; if there is no validation split among them,
    it is taken from the train split in the same way.
    """
    carve = official is None or "validation" not in official
    result = []
    for i, digest in enumerate(hashes):
        u = int.from_bytes(digest[:8], "big") / 2**64
        if official is None:
            split = "test" if u < config.test else "train"
            u -= config.test
        else:
            split = str(official[i])
        if split == "train" and carve and u < config.validation:
            split = "validation"
        result.append(split)
    return result


def domains(
    rows: list[int], hashes: list[bytes], raw: Raw, config: DatasetConfig, split: str
) -> tuple[list[int], list[int] | None]:
    """Which rows give images and which give sources, None where there are none.

    Of known pairs that are to be trained as two domains, each training row gives one of its
    two images, by its hash; validation and test keep their pairs, to measure by.
    """
    spec = raw.source_spec
    if spec is None or raw.source is None:
        return rows, None
    if not spec.truth:
        others = [hashlib.sha256(source.tobytes()).digest() for source in raw.source]
        theirs = assign(others, None, config)
        order = sorted(range(len(others)), key=others.__getitem__)
        return rows, [i for i in order if theirs[i] == split]
    if spec.aligned or split != "train":
        return rows, rows
    return [i for i in rows if hashes[i][8] % 2], [i for i in rows if not hashes[i][8] % 2]


def duplicates(hashes: list[bytes], split: list[str]) -> dict[str, int]:
    """Exact copies: within splits, and images of one split that another one holds too."""
    where: dict[bytes, set[str]] = {}
    for digest, name in zip(hashes, split, strict=True):
        where.setdefault(digest, set()).add(name)
    return {
        "extra_copies": len(hashes) - len(where),
        "images_in_more_than_one_split": sum(len(names) > 1 for names in where.values()),
    }
