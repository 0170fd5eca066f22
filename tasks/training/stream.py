"""Training data that is larger than memory: read window by window from the prepared blocks.

The batches are those that `TrainData` hands out, row for row: where the data lies changes no
result. Of each stream of rows there are at most three windows in memory: the one in use, the one
before it (a step's phases look at the same batches again), and the next one, which a thread reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.data import Batch, DataSpec
from tasks.data import blocks
from tasks.data.blocks import Block
from tasks.training.comm import Comm
from tasks.training.data import SOURCES
from tasks.training.order import Order, place

KEPT = 2  # windows that were used last
Window = dict[str, Tensor]  # column -> rows
Key = tuple[int, int, int]  # seed, epoch, window


class StreamData:
    """One split, with the interface of `TrainData`; `spec` says what the data is."""

    def __init__(self, prepared: Path, spec: DataSpec, split: str = "train") -> None:
        found = blocks.blocks(prepared, split)
        self.streams = [
            Stream(spec, found, names, salt) for names, salt in independent_columns(spec)
        ]

    def __len__(self) -> int:
        """Of the smaller domain, where there are two."""
        return min(stream.order.rows for stream in self.streams)

    def to(self, device: torch.device) -> StreamData:
        """From now on, windows go there."""
        for stream in self.streams:
            stream.device = device
        return self

    def batch(self, number: int, batch_size: int, seed: int, comm: Comm) -> Batch:
        """This worker's rows of global batch `number`: shuffled epochs, the remainder left out."""
        columns: dict[str, Tensor] = {}
        for stream in self.streams:
            columns |= stream.take(number, batch_size, seed, comm)
        return Batch(**columns)

    def whole(self) -> Batch:
        raise RuntimeError("data that streams is never there as a whole")


class Stream:
    """Columns whose rows belong together, in an order of their own."""

    def __init__(
        self, spec: DataSpec, there: Sequence[Block], names: Sequence[str], salt: int
    ) -> None:
        self.spec, self.names, self.device = spec, names, torch.device("cpu")
        self.blocks = [block for block in there if block.rows(names[0])]
        self.order = order_of(spec, there, names, salt)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._used: dict[Key, Window] = {}  # the last one used is the last
        self._next: tuple[Key, Future[Window]] | None = None

    def take(self, number: int, batch_size: int, seed: int, comm: Comm) -> Window:
        """This worker's rows of global batch `number`."""
        epoch, start, count = place(self.order.rows, number, batch_size, comm)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for window, places in self.order.epoch(seed, epoch).pieces(start, count):
            there = self._window((seed, epoch, window))
            for name, found in parts.items():
                found.append(there[name][places.to(self.device)])
        return {name: torch.cat(found) for name, found in parts.items()}

    def _window(self, key: Key) -> Window:
        window = self._used.pop(key, None)
        fresh = window is None
        if window is None:
            waiting, self._next = self._next, None
            if waiting is None or waiting[0] != key:
                waiting = key, self._reading(key)
            window = waiting[1].result()
        self._used[key] = window
        for old in list(self._used)[:-KEPT]:
            del self._used[old]
        if fresh:
            seed, epoch, number = key
            last = number + 1 == len(self.order.epoch(seed, epoch).windows)
            following = (seed, epoch + 1, 0) if last else (seed, epoch, number + 1)
            if following not in self._used:
                self._next = following, self._reading(following)
        return window

    def _reading(self, key: Key) -> Future[Window]:
        seed, epoch, number = key
        chosen = [self.blocks[i] for i in self.order.epoch(seed, epoch).windows[number]]
        return self._reader.submit(self._read, chosen)

    def _read(self, chosen: list[Block]) -> Window:
        found = blocks.read_blocks(self.spec, chosen, self.names)
        return {name: torch.from_numpy(rows).to(self.device) for name, rows in found.items()}


def independent_columns(spec: DataSpec) -> list[tuple[tuple[str, ...], int]]:
    """Columns whose rows belong together, with the salt of their order."""
    names = blocks.columns(spec)
    if spec.source is None or spec.source.aligned:
        return [(names, 0)]
    return [(tuple(n for n in names if n != "source"), 0), (("source",), SOURCES)]


def order_of(spec: DataSpec, there: Sequence[Block], names: Sequence[str], salt: int) -> Order:
    """The order of rows of these columns."""
    sizes = [block.rows(names[0]) for block in there if block.rows(names[0])]
    return Order(sizes, sum(blocks.row_bytes(spec, name) for name in names), salt)
