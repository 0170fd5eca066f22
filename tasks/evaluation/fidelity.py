"""Fidelity of samples: distances between two sets of features `[N, D]`, and the inception score.

Everything is computed in float64: the distances are small differences of large sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Features = NDArray[np.float64]
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as in the paper and in torch-fidelity
SPLITS = 10  # of the inception score, likewise
BLOCK = 4_000_000  # numbers of a kernel matrix that are held at a time


class Moments(NamedTuple):
    """Mean `[D]` and unbiased covariance `[D, D]` of a feature set, and how many rows it had."""

    mean: Features
    covariance: Features
    rows: int


class KID(NamedTuple):
    """Mean and deviation over subsets, and the standard error of that mean."""

    mean: float
    std: float
    std_error: float


def moments(features: NDArray[np.floating], weights: NDArray[np.int64] | None = None) -> Moments:
    """The moments of `[N, D]` features; `weights` says how often each row counts.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.
    """
    wide = _checked(features)
    count = np.ones(len(wide)) if weights is None else weights.astype(np.float64)
    rows = int(count.sum())
    mean = count @ wide / rows
    centred = wide - mean
    return Moments(mean, (centred * count[:, None]).T @ centred / (rows - 1), rows)


def frechet_distance(a: NDArray[np.floating] | Moments, b: NDArray[np.floating] | Moments) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets, or to their moments.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, eq. 6; unbiased
    covariances, float64. The trace of the root is the sum of the roots of the eigenvalues of
    S_a^(1/2) S_b S_a^(1/2), symmetric and so stable where S_a S_b is singular.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.
    """
    a = a if isinstance(a, Moments) else moments(a)
    b = b if isinstance(b, Moments) else moments(b)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.square(a.mean - b.mean).sum() + traces
    return max(float(distance - 2 * np.sqrt(cross.clip(0)).sum()), 0.0)


def frechet_distance_spread(
    a: NDArray[np.floating], b: NDArray[np.floating], *, rounds: int = 20, seed: int = 0
) -> float:
    """Standard deviation of the Fréchet distance over bootstrap resamples of both sets."""
    random = np.random.default_rng(seed)
    a, b = _checked(a), _checked(b)

    def again(features: Features) -> Moments:
        n = len(features)
        return moments(features, np.bincount(random.integers(0, n, n), minlength=n))

    return float(np.std([frechet_distance(again(a), again(b)) for _ in range(rounds)], ddof=1))


def kid(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
) -> KID:
    """Kernel inception distance (Binkowski et al. 2018) on random subsets, with its error.

    Unbiased squared MMD with the kernel (x.y / D + 1)^3 on `subsets` random pairs of subsets,
    drawn as torch-fidelity draws them; `subset_size` shrinks to the smaller set. The deviation
    is that of one subset's value and does not fall with the sets; the standard error of the
    mean does: the variance of the estimate on all rows (`mmd_std_error`), plus what taking
    random subsets adds to it, std^2 / subsets.
    """
    a, b = _lifted(a), _lifted(b)
    size = min(subset_size, len(a), len(b))
    random, room = np.random.RandomState(seed), np.empty((2, size, size))
    values = []
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        values.append(_squared_mmd(x, y, room))
    std = float(np.std(values))
    error = math.sqrt(_jackknife(a, b) + std**2 / subsets)
    return KID(float(np.mean(values)), std, error)


def mmd_std_error(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Standard error of the unbiased squared MMD of all rows, KID's kernel: the delete-one
    jackknife over the rows of both sets."""
    return math.sqrt(_jackknife(_lifted(a), _lifted(b)))


def _jackknife(a: Features, b: Features) -> float:
    """The variance behind `mmd_std_error`, of lifted features."""
    if min(len(a), len(b)) < 3:
        raise ValueError(f"{min(len(a), len(b))} feature rows; a jackknife needs at least 3")
    variance = 0.0
    for i, (x, sums) in enumerate(zip((a, b), _kernel_sums(a, b), strict=True)):
        k, other = len(x), (b, a)[i]
        rows = sums[:, i] - np.square(x).sum(1) ** 3
        # the estimate without row i, up to what is the same for every i
        within = (rows.sum() - 2 * rows) / ((k - 1) * (k - 2))
        left_out = within + 2 * sums[:, 1 - i] / ((k - 1) * len(other))
        variance += (k - 1) / k * np.square(left_out - left_out.mean()).sum()
    return float(variance)


def inception_score(
    logits: NDArray[np.floating], *, splits: int = SPLITS, seed: int = 2020
) -> tuple[float, float]:
    """exp of the mean KL(p(class | x) || p(class)) (Salimans et al. 2016) of classifier logits
    `[N, C]`: mean and deviation over `splits` parts of the shuffled rows, as torch-fidelity has it.

    Raises:
        ValueError: fewer rows than splits, or logits that are not finite.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} rows are too few for {splits} splits")
    wide = _checked(logits)
    wide = wide[np.random.RandomState(seed).permutation(len(wide))]
    log_p = torch.from_numpy(wide).log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(wide) // splits : (i + 1) * len(wide) // splits]
        # the mean in the logarithm: a class that no row gives any probability adds 0, not NaN
        marginal = torch.logsumexp(part, 0) - math.log(len(part))
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _lifted(features: NDArray[np.floating]) -> Features:
    """Features `[N, D + 1]` whose products are those of the kernel: x.y / D + 1."""
    wide = _checked(features)
    return np.column_stack([wide / math.sqrt(wide.shape[1]), np.ones(len(wide))])


def _squared_mmd(x: Features, y: Features, room: Features) -> float:
    """Unbiased estimate for two lifted sets of equal size n; `room` is `[2, n, n]`."""
    n = len(x)

    def total(p: Features, q: Features) -> float:
        """Sum of the kernel over all pairs; multiplied out, since a power takes ten times as
        long, and in place, since fresh memory costs more than the arithmetic."""
        np.matmul(p, q.T, out=room[0])
        np.square(room[0], out=room[1])
        return float(np.vdot(room[0], room[1]))

    own = sum(total(p, p) - (np.square(p).sum(1) ** 3).sum() for p in (x, y))
    return float(own / (n * (n - 1)) - 2 * total(x, y) / n**2)


def _kernel_sums(a: Features, b: Features) -> tuple[Features, Features]:
    """Sums of the kernel over the rows of `a` and of `b`, for each row of `a` `[N, 2]` and of `b`
    `[M, 2]`; both lifted.

    sum_j (x.y_j)^3 is x contracted thrice with the third moment of y, sum_j y_j (x) y_j (x) y_j:
    with R rows in all that takes 1.5 R D^3 multiplications instead of R^2 D.
    """
    if 1.5 * a.shape[1] ** 2 > len(a) + len(b):
        return _kernel_sums_of_many_features(a, a, b), _kernel_sums_of_many_features(b, a, b)
    thirds = np.hstack([_third_moment(a), _third_moment(b)])
    return _contracted(a, thirds), _contracted(b, thirds)


def _kernel_sums_of_many_features(x: Features, *others: Features) -> Features:
    found = []
    for y in others:
        sums = []
        for start in range(0, len(x), step := max(1, BLOCK // len(y))):
            matrix = x[start : start + step] @ y.T
            sums.append(np.einsum("ij,ij,ij->i", matrix, matrix, matrix))
        found.append(np.concatenate(sums))
    return np.column_stack(found)


def _pairs(x: Features) -> Iterator[tuple[Features, Features]]:
    """Blocks of rows `[n, D]` with the products of two features of each, `[D (D + 1) / 2, n]`."""
    first, second = np.triu_indices(x.shape[1])  # each pair once
    step = max(1, BLOCK // len(first))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        columns = np.ascontiguousarray(part.T)
        yield part, columns[first] * columns[second]


def _third_moment(x: Features) -> Features:
    """sum_i x_i (x) x_i (x) x_i, `[D (D + 1) / 2, D]`, pairs that stand for two counted twice."""
    first, second = np.triu_indices(x.shape[1])
    total = sum(products @ part for part, products in _pairs(x))
    return total * np.where(first == second, 1.0, 2.0)[:, None]


def _contracted(x: Features, thirds: Features) -> Features:
    """Rows of `x` contracted with each of the third moments `[D (D + 1) / 2, K D]`: `[N, K]`."""
    found = []
    for part, products in _pairs(x):
        half = (products.T @ thirds).reshape(len(part), -1, x.shape[1])
        found.append(np.einsum("nkd,nd->nk", half, part))
    return np.concatenate(found)


def _checked(features: NDArray[np.floating]) -> Features:
    if len(features) < 2:
        raise ValueError(f"{len(features)} feature row(s); a distance needs at least 2")
    wide = features.astype(np.float64, copy=False)
    if not np.isfinite(wide).all():
        raise ValueError("features are not finite")
    return wide
