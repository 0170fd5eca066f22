"""The protocol at a size for tests."""

from __future__ import annotations

from typing import Any

from models.base import GenerativeModel
from tasks.evaluation import protocol
from tasks.evaluation.decoder import AISConfig
from tasks.evaluation.measured import Measured
from tasks.evaluation.quality import Yardstick
from tasks.evaluation.usefulness import UsefulnessConfig

SMALL: dict[str, Any] = {
    "batch_size": 64,
    "likelihood_examples": 8,
    "likelihood_draws": {"exact": 1, "bound": 2, "ode": 1, "ais": 1},
    "anomaly_images": 8,
    "ais": AISConfig(images=0),
    "reconstruction_images": 8,
    "usefulness": UsefulnessConfig(samples=0),
    "seed": 0,
    "say": lambda text: None,
}


def measured(
    model: GenerativeModel,
    yardstick: Yardstick,
    samples: int,
    untrained: GenerativeModel | None = None,
    **more: Any,
) -> Measured:
    """All groups, small; `more` replaces settings of `SMALL`."""
    return protocol.measure(
        model, untrained or model, yardstick, samples=samples, **{**SMALL, **more}
    )
