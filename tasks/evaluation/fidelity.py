"""Fidelity of samples, measured between two sets of features `[N, D]`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, eq. 6; unbiased
    covariances, float64. The trace of the root is the sum of the roots of the eigenvalues of
    S_a^(1/2) S_b S_a^(1/2), symmetric and so stable where S_a S_b is singular.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.
    """
    mean_a, cov_a = _moments(a)
    mean_b, cov_b = _moments(b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    root_trace = np.sqrt(cross.clip(0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b)
    return max(float(distance - 2 * root_trace), 0.0)


def frechet_distance_spread(
    a: NDArray[np.floating], b: NDArray[np.floating], *, rounds: int = 20, seed: int = 0
) -> float:
    """Standard deviation of the Fréchet distance over bootstrap resamples of both sets."""
    random = np.random.default_rng(seed)

    def again(features: NDArray[np.floating]) -> NDArray[np.floating]:
        return features[random.integers(0, len(features), len(features))]

    return float(np.std([frechet_distance(again(a), again(b)) for _ in range(rounds)], ddof=1))


def kid(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): mean and deviation over subsets.

    Unbiased squared MMD with the kernel (x.y / D + 1)^3 on `subsets` random pairs of subsets,
    drawn as torch-fidelity draws them; `subset_size` shrinks to the smaller set.
    """
    a, b = _checked(a), _checked(b)
    size = min(subset_size, len(a), len(b))
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: Features, y: Features) -> float:
    """Unbiased estimate for two sets of equal size, cubic polynomial kernel."""
    n, d = x.shape
    xx, yy, xy = (((p @ q.T) / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.sum() / n**2)


def _moments(features: NDArray[np.floating]) -> tuple[Features, Features]:
    features = _checked(features)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def _checked(features: NDArray[np.floating]) -> Features:
    if len(features) < 2:
        raise ValueError(f"{len(features)} feature row(s); a distance needs at least 2")
    wide = features.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("features are not finite")
    return wide
