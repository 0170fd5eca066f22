"""Precision, recall, density and coverage: how the supports of two feature sets overlap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1000  # rows of the distance matrix that are held at a time
K_MANIFOLD, K_COVERAGE = 3, 5  # nearest neighbours, as both papers recommend


def manifold_metrics(
    real: NDArray[np.floating], fake: NDArray[np.floating], *, keys: frozenset[str] | None = None
) -> dict[str, float]:
    """The four numbers between `real` `[N, D]` and `fake` `[M, D]` features.

    precision: share of fakes inside the real manifold; recall: share of reals inside the fake
    one (Kynkäänniemi et al. 2019, balls to the 3rd neighbour). density: how many real balls a
    fake lies in, over k; coverage: share of real balls with a fake in them (Naeem et al. 2020,
    5th neighbour). `keys` leaves out what is not asked for.

    Raises:
        ValueError: too few rows for the neighbours, or features that are not finite.
    """
    wanted = keys or frozenset({"precision", "recall", "density", "coverage"})
    a, b = _checked(real), _checked(fake)
    near, far = _radii(a, K_MANIFOLD, K_COVERAGE)
    fake_radii = _radii(b, K_MANIFOLD)[0] if "recall" in wanted else None
    inside, balls = 0, 0.0
    recalled = torch.zeros(len(a), dtype=torch.bool)
    covered = torch.zeros(len(a), dtype=torch.bool)
    for start, distances in _distances(b, a):  # [chunk of fakes, reals]
        inside += int((distances < near).any(1).sum())
        in_ball = distances < far
        balls += float(in_ball.sum())
        covered |= in_ball.any(0)
        if fake_radii is not None:
            recalled |= (distances < fake_radii[start : start + CHUNK, None]).any(0)
    found = {
        "precision": inside / len(b),
        "recall": float(recalled.double().mean()),
        "density": balls / (K_COVERAGE * len(b)),
        "coverage": float(covered.double().mean()),
    }
    return {name: value for name, value in found.items() if name in wanted}


def _radii(x: Tensor, *ks: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, `[K, N]`."""
    # the nearest is itself
    nearest = [d.topk(max(ks) + 1, 1, largest=False).values for _, d in _distances(x, x)]
    return torch.cat(nearest).T[list(ks)]


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), CHUNK):
        yield start, torch.cdist(x[start : start + CHUNK], y)


def _checked(features: NDArray[np.floating]) -> Tensor:
    if len(features) <= K_COVERAGE:
        raise ValueError(f"{len(features)} feature row(s); at least {K_COVERAGE + 1} are needed")
    wide = torch.from_numpy(features.astype(np.float64))
    if not torch.isfinite(wide).all():
        raise ValueError("features are not finite")
    return wide
