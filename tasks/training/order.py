"""The order in which an epoch hands out rows that lie in blocks on disk.

An epoch draws which blocks lie together in a window, and shuffles the rows of each window. It is
a function of (seed, epoch) and of the blocks alone: the same whether the rows are in memory or are
read window by window, and any place of it can be gone to without what comes before. Data of one
window is shuffled as a whole. (Rows lie on disk by the hash of their content, so that neighbours
there have nothing in common.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tasks.training.comm import Comm
from tasks.training.turns import fold_seed

WINDOW_BYTES = 64 * 2**20  # of rows; what streams holds three windows


class Order:
    """Of rows in blocks of `sizes` rows, `row_bytes` each; `salt` tells two such orders apart."""

    def __init__(self, sizes: Sequence[int], row_bytes: int, salt: int = 0) -> None:
        self.sizes, self.salt = tuple(sizes), salt
        self.rows = sum(sizes)
        self.blocks = max(1, WINDOW_BYTES // max(1, max(sizes) * row_bytes))  # of a window
        self._known: dict[tuple[int, int], Epoch] = {}

    def epoch(self, seed: int, number: int) -> Epoch:
        key = (seed, number)
        if key not in self._known:
            for old in list(self._known)[:-1]:  # the one before is asked for by later phases
                del self._known[old]
            self._known[key] = Epoch(self, seed, number)
        return self._known[key]


class Epoch:
    """One pass over all rows.

    Attributes:
        windows: the numbers of the blocks in each window, ascending.
    """

    def __init__(self, order: Order, seed: int, number: int) -> None:
        # torch's generator looks at the lower 32 bits alone
        self.seed = seed * 1_000_003 + number ^ order.salt
        self.order = order
        blocks = torch.randperm(len(order.sizes), generator=self._generator("blocks")).tolist()
        starts = range(0, len(blocks), order.blocks)
        self.windows = [sorted(blocks[start : start + order.blocks]) for start in starts]
        rows = [sum(order.sizes[block] for block in window) for window in self.windows]
        self._starts = [0, *accumulate(rows)]
        self._shuffled: dict[int, Tensor] = {}

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `start` to `start + count` of the epoch: a window, and places in it."""
        while count > 0:
            window = bisect_right(self._starts, start) - 1
            begin = start - self._starts[window]
            places = self._shuffle(window)[begin : begin + count]
            yield window, places
            start, count = start + len(places), count - len(places)

    def rows(self) -> Tensor:
        """All rows in this order, numbered as they lie in the blocks."""
        firsts = [0, *accumulate(self.order.sizes)]
        parts = []
        for number, window in enumerate(self.windows):
            there = torch.cat([torch.arange(firsts[b], firsts[b + 1]) for b in window])
            parts.append(there[self._shuffle(number)])
        return torch.cat(parts)

    def _shuffle(self, window: int) -> Tensor:
        if window not in self._shuffled:
            for old in sorted(self._shuffled)[:-1]:
                del self._shuffled[old]
            size = self._starts[window + 1] - self._starts[window]
            self._shuffled[window] = torch.randperm(size, generator=self._generator(window))
        return self._shuffled[window]

    def _generator(self, what: int | str) -> torch.Generator:
        seed = fold_seed(self.seed, what) if what else self.seed
        return torch.Generator().manual_seed(seed)


def place(rows: int, number: int, batch_size: int, comm: Comm) -> tuple[int, int, int]:
    """Where this worker's share of global batch `number` lies: the epoch, its first row there,
    how many rows. What does not fill a batch at an epoch's end is left out."""
    epoch, position = divmod(number, rows // batch_size)
    mine = batch_size // comm.world
    return epoch, position * batch_size + comm.rank * mine, mine
