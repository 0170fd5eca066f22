"""Densities of the plane that can be seen and whose entropy is known.

Each is a mixture of equal, isotropic Gaussians whose centres lie on a figure. The plane
[-4, 4) x [-4, 4) is cut into 256 x 256 cells; a point is the cell it falls into, so that every
family that models levels can model it, and its log-probability is that of the cell.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tasks.data.config import DatasetConfig
from tasks.data.sources import Raw

CELLS, HALF_WIDTH = 256, 4.0
SEED = 20_260_101
DEVIATION = {"moons": 0.15, "rings": 0.12, "mixture": 0.25}
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

Reals = NDArray[np.float64]


def draw(config: DatasetConfig) -> Raw:
    """`config.points` points of the density, in official splits: points are independent, and a
    split by content would keep whole cells from the training."""
    centres, deviation = figure(config.toy), DEVIATION[config.toy]
    generator = np.random.default_rng(SEED)
    # two times the number, for the few that fall off the plane
    chosen = centres[generator.integers(len(centres), size=2 * config.points)]
    plane = chosen + deviation * generator.standard_normal(chosen.shape)
    inside = plane[(abs(plane) < HALF_WIDTH).all(1)][: config.points]
    cells = np.floor((inside + HALF_WIDTH) * (CELLS / (2 * HALF_WIDTH))).astype(np.uint8)
    probabilities = cell_probabilities(config.toy)
    positive = probabilities[probabilities > 0]
    bounds = np.cumsum([round(share * len(cells)) for share in SHARES.values()])
    return Raw(
        x=cells,
        levels=CELLS,
        official=np.array(list(SHARES))[np.searchsorted(bounds, np.arange(len(cells)), "right")],
        modality="points",
        truth={"entropy_nats": float(-(positive * np.log(positive)).sum())},
        provenance={"source": f"toy2d {config.toy}, seed {SEED}"},
    )


def figure(toy: str) -> Reals:
    """The centres `[K, 2]`."""
    if toy == "mixture":
        return 2.5 * _circle(8)
    if toy == "rings":
        # as many centres as the circumference is long, so that the rings are equally dense
        return np.concatenate([radius * _circle(round(400 * radius)) for radius in (1.0, 2.0, 3.0)])
    half = _circle(2000)[:1000]  # the upper half of the circle
    return 1.5 * np.concatenate([half - [0.5, 0.25], [0.5, 0.25] - half])


def cell_probabilities(toy: str) -> Reals:
    """The probability of each cell `[256, 256]` (first coordinate first), within the plane."""
    centres, deviation = figure(toy), DEVIATION[toy]
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, CELLS + 1)
    erf = np.vectorize(math.erf)
    below = 0.5 * (1 + erf((edges - centres[:, :, None]) / (deviation * math.sqrt(2))))
    mass = np.diff(below)  # [K, 2, 256]: of each coordinate
    joint = np.einsum("ki,kj->ij", mass[:, 0], mass[:, 1])
    return joint / joint.sum()


def _circle(n: int) -> Reals:
    angle = np.arange(n) * (2 * math.pi / n)
    return np.stack([np.cos(angle), np.sin(angle)], 1)
