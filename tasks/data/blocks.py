"""Blocks of prepared data: Parquet's row groups, each of which is read without the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.data import DataSpec

SCHEMA = pa.schema(
    [("x", pa.binary()), ("label", pa.int64()), ("source", pa.binary()), ("text", pa.string())]
)


class Block(NamedTuple):
    """Where some rows of a split lie together."""

    file: Path
    group: int  # of the file's row groups
    images: int
    sources: int  # as many as images, unless they are another domain

    def rows(self, column: str) -> int:
        return self.sources if column == "source" else self.images


def columns(spec: DataSpec) -> tuple[str, ...]:
    """Those that such data has."""
    there = {
        "x": True,
        "label": spec.classes or spec.attributes,
        "source": spec.source,
        "text": spec.text_length,
    }
    return tuple(name for name, has in there.items() if has)


def row_bytes(spec: DataSpec, column: str) -> int:
    """What a row of it takes when read."""
    shape, dtype = _form(spec, column)
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def blocks(directory: Path, split: str) -> list[Block]:
    """The blocks of a split in the order of its rows; only the shards' footers are read."""
    found = []
    for file in sorted(directory.glob(f"{split}-*.parquet")):
        about = pq.read_metadata(file)
        for number in range(about.num_row_groups):
            group = about.row_group(number)
            held = {
                c.path_in_schema: c.statistics.num_values  # nulls are not counted
                for c in map(group.column, range(group.num_columns))
            }
            found.append(Block(file, number, held["x"], held["source"]))
    return found


def read_blocks(
    spec: DataSpec, chosen: Sequence[Block], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """These columns, one block after the other, as in `Split`."""
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        shape, dtype = _form(spec, name)
        found[name] = np.empty((sum(block.rows(name) for block in chosen), *shape), dtype)
    filled = dict.fromkeys(names, 0)
    for block in chosen:
        with pq.ParquetFile(block.file) as file:
            table = file.read_row_group(block.group, columns=list(names), use_threads=False)
        for name in names:
            end = filled[name] + block.rows(name)
            _decode(table[name].drop_null(), name, spec, found[name][filled[name] : end])
            filled[name] = end
    return found


def write_shard(
    directory: Path, split: str, number: int, parts: Iterable[dict[str, list[Any]]]
) -> None:
    """One shard, each part a block: lists of what stands in the columns, an empty one for a
    column that the data does not have; filled up with nulls."""
    file = directory / f"{split}-{number:05d}.parquet"
    # images hardly ever repeat: a dictionary of them takes time and nothing else
    with pq.ParquetWriter(
        file, SCHEMA, compression="zstd", use_dictionary=["label", "text"]
    ) as writer:
        for part in parts:
            length = max(map(len, part.values()))
            filled = {key: [*rows, *[None] * (length - len(rows))] for key, rows in part.items()}
            writer.write_table(pa.table(filled, schema=SCHEMA), row_group_size=length)


def _form(spec: DataSpec, column: str) -> tuple[tuple[int, ...], type]:
    """Shape and dtype of one row."""
    if column == "label":
        return ((len(spec.attributes),) if spec.attributes else ()), np.int64
    if column == "text":
        return (spec.text_length,), np.uint8
    if column == "x":
        return spec.shape, np.uint8
    assert spec.source is not None
    return spec.source.shape, np.uint8


def _decode(column: pa.ChunkedArray, name: str, spec: DataSpec, out: NDArray[Any]) -> None:
    if name == "label":
        label = column.to_numpy()
        bits = np.arange(len(spec.attributes))
        out[...] = label[:, None] >> bits & 1 if spec.attributes else label
    elif name == "text":
        out[...] = 0
        for row, caption in zip(out, column.to_pylist(), strict=True):
            row[: len(caption.encode())] = list(caption.encode())
    else:
        flat, start = out.reshape(-1), 0
        for chunk in column.chunks:  # bytes lie one after the other in Arrow's own buffer
            _, places, values = chunk.buffers()
            places = np.frombuffer(places, np.int32)[chunk.offset :][: len(chunk) + 1]
            part = np.frombuffer(values, np.uint8)[places[0] : places[-1]] if len(chunk) else ()
            flat[start : start + len(part)] = part
            start += len(part)
        assert start == len(flat), f"{name}: {start} bytes where {len(flat)} belong"
