"""Prepared data on disk: Parquet shards per split, and `manifest.json`.

    manifest.json  train-00000.parquet ...  validation-00000.parquet ...  test-00000.parquet ...

Rows are in the order of their content hash, so the same source gives the same bytes in
whatever order it was read. Columns: `x` (uint8 levels, a byte each), `label` (int64: the class,
or the attributes as bits; or null), `source` (uint8 levels of the other image of the pair, or
null), `text` (the caption, or null). Where the two images of a row are no pair, `x` and `source`
are two lists beside each other, the shorter one filled up with nulls.

A shard is made of blocks (Parquet's row groups) of about 4 MiB, each of which can be read without
the others: what streams does so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.data import DataSpec
from tasks.data.blocks import Block, blocks, columns, read_blocks, write_shard
from tasks.data.config import DatasetConfig
from tasks.data.sources import Raw
from tasks.data.splits import SPLITS, assign, domains, duplicates
from tasks.errors import BadInput

ROWS_PER_SHARD = 16_384
BLOCK_BYTES = 4 * 2**20  # of levels
LEAST = 6  # rows of a split: what the fifth neighbour takes to be measured


class Split(NamedTuple):
    """One split as it was prepared; what the data does not have is None."""

    x: NDArray[np.uint8]  # levels [N, *shape]
    label: NDArray[np.int64] | None  # [N], or [N, A] of 0 and 1
    source: NDArray[np.uint8] | None  # levels [N, C', H', W']; another length where unpaired
    text: NDArray[np.uint8] | None  # bytes of the captions [N, T], zeros after the end


def write(directory: Path, raw: Raw, config: DatasetConfig) -> dict[str, Any]:
    """Split `raw` by content hash and write it to `directory`, which is made.

    Returns the manifest. Raises BadInput where a split would be empty.
    """
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in raw.x]
    split = assign(hashes, raw.official, config)
    order = sorted(range(len(hashes)), key=lambda i: (hashes[i], _label(raw, i) or 0))
    directory.mkdir(parents=True)
    kept, counts, content = {}, {}, hashlib.sha256()
    for name in SPLITS:
        rows = [i for i in order if split[i] == name]
        rows, sources = domains(rows, hashes, raw, config, name)
        kept[name] = rows
        examples = {"image": "images", "text": "windows of text"}.get(raw.modality, "points")
        for what, found in ((examples, rows), ("sources", rows if sources is None else sources)):
            if len(found) < LEAST:
                raise BadInput(
                    f"dataset: {len(found)} {what} fall into the {name} split; at least {LEAST} "
                    f"are needed: give more {what} or a larger share"
                )
        counts[name] = len(rows) if sources is None else min(len(rows), len(sources))
        for i in rows:
            content.update(name.encode() + hashes[i] + str(_label(raw, i)).encode())
            content.update(raw.text[i].encode() if raw.text else b"")
        for i in sources or ():
            assert raw.source is not None
            content.update(hashlib.sha256(raw.source[i].tobytes()).digest())
        _write_split(directory, name, raw, rows, sources)
    manifest = {
        "name": config.name,
        "spec": DataSpec(
            shape=raw.x.shape[1:],
            levels=raw.levels,
            classes=raw.classes,
            attributes=raw.attributes,
            source=raw.source_spec,
            text_length=max((len(text.encode()) for text in raw.text or ()), default=0),
            modality=raw.modality,
        ).model_dump(mode="json"),
        "counts": counts,
        "class_counts": _class_counts(raw, kept),
        "content_sha256": content.hexdigest(),
        # points are cells of a grid: two in one cell are no copies of each other
        "duplicates": {} if raw.modality == "points" else duplicates(hashes, split),
        "truth": raw.truth,
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


def read_split(directory: Path, split: str, rows: int | None = None) -> Split:
    """One split of the prepared data, or its first `rows` rows where there are more."""
    spec, chosen = DataSpec(**read_manifest(directory)["spec"]), blocks(directory, split)
    if rows is not None:
        chosen = [b for i, b in enumerate(chosen) if not _hold(chosen[:i], columns(spec), rows)]
    found = {name: part[:rows] for name, part in read_blocks(spec, chosen, columns(spec)).items()}
    return Split(found["x"], *(found.get(name) for name in Split._fields[1:]))


def each_image_block(directory: Path, split: str) -> Iterator[NDArray[np.uint8]]:
    """The levels of a split, block by block."""
    spec = DataSpec(**read_manifest(directory)["spec"])
    for block in blocks(directory, split):
        yield read_blocks(spec, [block], ("x",))["x"]


def _hold(chosen: list[Block], names: Sequence[str], rows: int) -> bool:
    return all(sum(block.rows(name) for block in chosen) >= rows for name in names)


def _write_split(
    directory: Path, name: str, raw: Raw, rows: list[int], sources: list[int] | None
) -> None:
    largest = max(raw.x[0].nbytes, 0 if raw.source is None else raw.source[0].nbytes)
    size = max(1, BLOCK_BYTES // largest)

    def part(start: int, end: int) -> dict[str, list[Any]]:
        mine = rows[start:end]
        others = [] if raw.source is None else (sources or [])[start:end]
        return {
            "x": [raw.x[i].tobytes() for i in mine],
            "label": [_label(raw, i) for i in mine],
            "source": [raw.source[i].tobytes() for i in others] if raw.source is not None else [],
            "text": [raw.text[i] for i in mine] if raw.text else [],
        }

    length = max(len(rows), len(sources or ()))
    for number, first in enumerate(range(0, length, ROWS_PER_SHARD)):
        last = min(first + ROWS_PER_SHARD, length)
        starts = range(first, last, size)
        parts = (part(start, min(start + size, last)) for start in starts)
        write_shard(directory, name, number, parts)


def _label(raw: Raw, i: int) -> int | None:
    if raw.label is None:
        return None
    if raw.attributes:
        return sum(int(bit) << place for place, bit in enumerate(raw.label[i]))
    return int(raw.label[i])


def _class_counts(raw: Raw, kept: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    if raw.label is None or raw.attributes:
        return {}
    counted = {split: Counter(raw.label[rows].tolist()) for split, rows in kept.items()}
    return {s: {c: counts[i] for i, c in enumerate(raw.classes)} for s, counts in counted.items()}
