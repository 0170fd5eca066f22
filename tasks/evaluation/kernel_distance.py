"""The kernel inception distance between two sets of features `[N, D]`, with its standard error.

Binkowski et al. 2018. The kernel is (x.y / D + 1)^3: the cubed product of features that are
"lifted" to `[N, D + 1]`. Everything is in float64, as the distance is a small difference of large
sums; subsets in numpy, whose BLAS is the quicker one for their small products on AMD's processors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.evaluation.fidelity import checked

Lifted = NDArray[np.float64]  # [N, D + 1]
SUBSETS, SUBSET_SIZE = 100, 1000  # as in the paper and in torch-fidelity
BLOCK = 4_000_000  # numbers of a kernel matrix that are held at a time
TILE = 100  # rows of a subset's kernel matrix at a time: what a processor's cache holds
ROWS, GROUP = 1000, 8  # rows and features whose triple products are held at a time, likewise


class KID(NamedTuple):
    """Mean and deviation over subsets, and the standard error of that mean."""

    mean: float
    std: float
    std_error: float


def kid(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
) -> KID:
    """Unbiased squared MMD on `subsets` random pairs of subsets, as torch-fidelity draws them.

    `subset_size` shrinks to the smaller set. The deviation is that of one subset's value and does
    not fall with the sets; the standard error of the mean does: the variance of the estimate on
    all rows (`mmd_std_error`), plus what taking random subsets adds to it, std^2 / subsets.

    Raises:
        ValueError: fewer than three rows, or features that are not finite.
    """
    x, y = _lifted(a), _lifted(b)
    size = min(subset_size, len(x), len(y))
    random, room = np.random.RandomState(seed), np.empty((2, TILE * size))
    values = []
    for _ in range(subsets):
        p, q = (s.numpy()[random.choice(len(s), size, replace=False)] for s in (x, y))
        own = _total_within(p, room) + _total_within(q, room)
        values.append(own / (size * (size - 1)) - 2 * _total(p, q, room) / size**2)
    std = float(np.std(values))
    error = math.sqrt(_jackknife(x, y) + std**2 / subsets)
    return KID(float(np.mean(values)), std, error)


def mmd_std_error(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Standard error of the unbiased squared MMD of all rows, KID's kernel: the delete-one
    jackknife over the rows of both sets."""
    return math.sqrt(_jackknife(_lifted(a), _lifted(b)))


def _lifted(features: NDArray[np.floating]) -> Tensor:
    """Features `[N, D + 1]` whose products are those of the kernel: x.y / D + 1."""
    wide = torch.from_numpy(checked(features))
    ones = torch.ones(len(wide), 1, dtype=wide.dtype)
    return torch.cat([wide / math.sqrt(wide.shape[1]), ones], 1)


def _own(x: Tensor) -> Tensor:
    """The kernel of each row with itself, `[N]`."""
    return x.square().sum(1) ** 3


def _total(x: Lifted, y: Lifted, room: Lifted) -> float:
    """Sum of the kernel over all pairs of lifted rows. `room` `[2, TILE * M]` is written to: fresh
    memory costs more than the arithmetic, and a power ten times as much as two products."""
    total = 0.0
    for start in range(0, len(x), TILE):
        rows = x[start : start + TILE]
        products, squares = (r[: len(rows) * len(y)].reshape(len(rows), len(y)) for r in room)
        np.matmul(rows, y.T, out=products)
        np.square(products, out=squares)
        total += float(np.vdot(products, squares))
    return total


def _total_within(x: Lifted, room: Lifted) -> float:
    """The same over all pairs of different rows of `x`; the kernel is symmetric, so half of it is
    computed."""
    total = -float((np.square(x).sum(1) ** 3).sum())
    for start in range(0, len(x), TILE):
        rows = x[start : start + TILE]
        total += 2 * _total(rows, x[start:], room) - _total(rows, rows, room)
    return total


def _jackknife(a: Tensor, b: Tensor) -> float:
    """The variance behind `mmd_std_error`, of lifted features.

    Without row i of k, the estimate is 2 / (k - 1) times the row's witness, but for what is the
    same for every i.
    """
    if min(len(a), len(b)) < 3:
        raise ValueError(f"{min(len(a), len(b))} feature rows; a jackknife needs at least 3")
    many = a.shape[1] ** 2 > len(a) + len(b)
    witnesses = _witnesses_of_many_features(a, b) if many else _witnesses(a, b)
    return sum(
        float((w - w.mean()).square().sum()) * 4 / (len(w) * (len(w) - 1)) for w in witnesses
    )


def _witnesses_of_many_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `a` `[N]` and of `b` `[M]`: its mean kernel with the other set's rows, less
    that with its own set's other rows (Gretton et al. 2012, section 2.3, without the row)."""
    across, back = _kernel_sums(a, b)
    found = []
    for x, theirs, others in ((a, across, b), (b, back, a)):
        ours = _kernel_sums(x, x)[0] - _own(x)
        found.append(theirs / len(others) - ours / (len(x) - 2))
    return found[0], found[1]


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over `y`, for each row of `x`, and over `x`, for each row of `y`."""
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype)
    for part in x.split(max(1, BLOCK // len(y))):
        cubes = (part @ y.T).pow_(3)
        rows.append(cubes.sum(1))
        columns += cubes.sum(0)
    return torch.cat(rows), columns


def _witnesses(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same by third moments: sum_j (x.y_j)^3 is x contracted thrice with the sum of y_j (x)
    y_j (x) y_j. With R rows in all that takes R D^3 / 3 multiplications instead of R^2 D.
    """
    moments = _third_moment(a), _third_moment(b)
    found = []
    for x, own, theirs, others in ((a, *moments, b), (b, *moments[::-1], a)):
        k = len(x)
        witness = [q / len(others) - p / (k - 2) for p, q in zip(own, theirs, strict=True)]
        found.append(_contracted(x, witness) + _own(x) / (k - 2))
    return found[0], found[1]


def _triples(x: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """What the products x_i x_j x_k of features i <= j <= k are made of, for some rows n and a
    group of j: which rows, which group, x_k `[K, n]` from the group's first j on, and x_i x_j
    `[I, n]`, which the next overwrites."""
    width = x.shape[1]
    room = torch.empty(GROUP * width * min(ROWS, len(x)), dtype=x.dtype)
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        columns = x[rows].T.contiguous()
        n = columns.shape[1]
        for group, first in enumerate(range(0, width, GROUP)):
            filled = 0
            for j in range(first, min(first + GROUP, width)):
                after = filled + (j + 1) * n
                torch.mul(columns[: j + 1], columns[j], out=room[filled:after].view(j + 1, n))
                filled = after
            yield rows, group, columns[first:], room[:filled].view(-1, n)


def _third_moment(x: Tensor) -> list[Tensor]:
    """sum_n x_i x_j x_k, `[K, I]` for each group of `_triples`, times how many orders i, j and k
    have, so that a sum over it is one over all triples."""
    width = x.shape[1]
    total: dict[int, Tensor] = {}
    for _, group, last, pairs in _triples(x):
        part = last @ pairs.T
        total[group] = total[group] + part if group in total else part
    for group, moment in total.items():
        first = group * GROUP
        js = torch.arange(first, min(first + GROUP, width))
        i = torch.cat([torch.arange(int(j) + 1) for j in js])
        j, k = js.repeat_interleave(js + 1), torch.arange(first, width)[:, None]
        equal = (i == j).long() + (j == k)
        moment *= torch.tensor([6.0, 3.0, 1.0], dtype=x.dtype)[equal] * (j <= k)
    return list(total.values())


def _contracted(x: Tensor, moment: list[Tensor]) -> Tensor:
    """Rows of `x` contracted thrice with such a moment: `[N]`."""
    found = torch.zeros(len(x), dtype=x.dtype)
    for rows, group, last, pairs in _triples(x):
        found[rows] += (moment[group] @ pairs).mul_(last).sum(0)
    return found
