"""Prepared data on disk: Parquet shards per split, and `manifest.json`.

    manifest.json  train-00000.parquet ...  validation-00000.parquet ...  test-00000.parquet ...

Rows are in the order of their content hash, so the same source gives the same bytes in
whatever order it was read. Columns: `x` (uint8 levels, C*H*W bytes), `label` (int64, or
null), `source` (the other image of a pair, or null).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.base import DataSpec
from tasks.data.config import DatasetConfig
from tasks.data.sources import Raw
from tasks.errors import BadInput

SPLITS = ("train", "validation", "test")
ROWS_PER_SHARD = 16_384
SCHEMA = pa.schema([("x", pa.binary()), ("label", pa.int64()), ("source", pa.binary())])


def write(directory: Path, raw: Raw, config: DatasetConfig) -> dict[str, Any]:
    """Split `raw` by content hash and write it to `directory`, which is made.

    Returns the manifest. Raises BadInput where a split would be empty.
    """
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in raw.x]
    split = _assign(hashes, raw, config)
    order = sorted(range(len(hashes)), key=lambda i: (hashes[i], _label(raw, i) or 0))
    directory.mkdir(parents=True)
    counts, content = {}, hashlib.sha256()
    for name in SPLITS:
        rows = [i for i in order if split[i] == name]
        if len(rows) < 2:
            raise BadInput(
                f"dataset: {len(rows)} of {len(hashes)} images fall into the {name} split; "
                "at least 2 are needed: give more images or a larger share"
            )
        counts[name] = len(rows)
        for i in rows:
            content.update(name.encode() + hashes[i] + str(_label(raw, i)).encode())
        for number, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
            _write_shard(
                directory / f"{name}-{number:05d}.parquet", raw, rows[start:][:ROWS_PER_SHARD]
            )
    manifest = {
        "name": config.name,
        "spec": DataSpec(shape=raw.x.shape[1:], levels=raw.levels, classes=raw.classes).model_dump(
            mode="json"
        ),
        "counts": counts,
        "class_counts": _class_counts(raw, split),
        "content_sha256": content.hexdigest(),
        "duplicates": _duplicates(hashes, split),
        "skipped": raw.skipped,
        "provenance": raw.provenance,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of prepared data; BadInput where there is none."""
    try:
        return json.loads((directory / "manifest.json").read_text())
    except FileNotFoundError as error:
        raise BadInput(
            f"{directory} holds no prepared data; run the prepare stage first"
        ) from error


def read_split(directory: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Levels `[N, C, H, W]` and labels `[N]` (None without classes) of one split."""
    spec = DataSpec(**read_manifest(directory)["spec"])
    tables = [pq.read_table(path) for path in sorted(directory.glob(f"{split}-*.parquet"))]
    table = pa.concat_tables(tables)
    joined = b"".join(table["x"].to_pylist())
    x = np.frombuffer(joined, np.uint8).reshape(-1, *spec.shape).copy()
    return x, table["label"].to_numpy() if spec.classes else None


def _assign(hashes: list[bytes], raw: Raw, config: DatasetConfig) -> list[str]:
    """The split of each row: a number in [0, 1) made of its content decides."""
    result = []
    for i, digest in enumerate(hashes):
        u = int.from_bytes(digest[:8], "big") / 2**64
        if raw.is_test is not None:
            test = bool(raw.is_test[i])
            validation = not test and u < config.validation
        else:
            test = u < config.test
            validation = not test and u < config.test + config.validation
        result.append("test" if test else "validation" if validation else "train")
    return result


def _write_shard(path: Path, raw: Raw, rows: list[int]) -> None:
    columns = {
        "x": [raw.x[i].tobytes() for i in rows],
        "label": [_label(raw, i) for i in rows],
        "source": [None] * len(rows),
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def _label(raw: Raw, i: int) -> int | None:
    return None if raw.label is None else int(raw.label[i])


def _class_counts(raw: Raw, split: list[str]) -> dict[str, dict[str, int]]:
    if raw.label is None:
        return {}
    pairs = Counter(zip(split, raw.label.tolist(), strict=True))
    return {s: {c: pairs[s, i] for i, c in enumerate(raw.classes)} for s in SPLITS}


def _duplicates(hashes: list[bytes], split: list[str]) -> dict[str, int]:
    """Exact copies: within splits, and images of one split that another one holds too."""
    where: dict[bytes, set[str]] = {}
    for digest, name in zip(hashes, split, strict=True):
        where.setdefault(digest, set()).add(name)
    return {
        "extra_copies": len(hashes) - len(where),
        "images_in_more_than_one_split": sum(len(names) > 1 for names in where.values()),
    }
