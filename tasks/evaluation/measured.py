"""What one family's evaluation has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Unmeasurable(RuntimeError):
    """Why a family cannot be measured at all: its record says `failed` with this reason."""


@dataclass
class Measured:
    """What one family's evaluation found.

    Attributes:
        metrics: name -> number, short text, or numbers by class.
        not_applicable: name -> why there is no number.
        samples: all drawn samples, levels `[n, *shape]`.
        pairs: originals and their reconstructions, or None.
        neighbours: samples and the training image nearest to each, or None.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    conditional: bool = False  # whether the samples were asked for with conditions
    truth: bool = True  # whether the label of a test row is what its sample was asked to be
    samples: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    neighbours: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None

    def add(self, found: tuple[dict[str, Any], dict[str, str]]) -> None:
        """Metrics, and reasons for those that there are not."""
        self.metrics |= found[0]
        self.not_applicable |= found[1]
