"""Fidelity of samples: distances between two sets of features `[N, D]`, and the inception score.

Everything is computed in float64: the distances are small differences of large sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Features = NDArray[np.float64]
SPLITS = 10  # of the inception score, as in the paper and in torch-fidelity


class Moments(NamedTuple):
    """Mean `[D]` and unbiased covariance `[D, D]` of a feature set, and how many rows it had."""

    mean: Features
    covariance: Features
    rows: int


def moments(features: NDArray[np.floating], weights: NDArray[np.int64] | None = None) -> Moments:
    """The moments of `[N, D]` features; `weights` says how often each row counts.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.
    """
    wide = checked(features)
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
    a, b = checked(a), checked(b)

    def again(features: Features) -> Moments:
        n = len(features)
        return moments(features, np.bincount(random.integers(0, n, n), minlength=n))

    return float(np.std([frechet_distance(again(a), again(b)) for _ in range(rounds)], ddof=1))


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
    wide = checked(logits)
    wide = wide[np.random.RandomState(seed).permutation(len(wide))]
    log_p = torch.from_numpy(wide).log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(wide) // splits : (i + 1) * len(wide) // splits]
        # the mean in the logarithm: a class that no row gives any probability adds 0, not NaN
        marginal = torch.logsumexp(part, 0) - math.log(len(part))
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def checked(features: NDArray[np.floating]) -> Features:
    """Features `[N, D]` in float64; ValueError where they are fewer than two rows or not finite."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} feature row(s); a distance needs at least 2")
    wide = features.astype(np.float64, copy=False)
    if not np.isfinite(wide).all():
        raise ValueError("features are not finite")
    return wide
