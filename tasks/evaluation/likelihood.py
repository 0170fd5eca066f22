"""Likelihood: nats and bits per dimension of the discrete data, and how the number came about."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, Positive

CHUNK = 128  # examples at a time


class LikelihoodDraws(Config):
    """Monte Carlo draws behind each log-probability, by its kind; 1 where none is needed."""

    exact: Positive = 64  # of dequantisation noise
    bound: Positive = 500  # importance samples; 5,000 for a number to publish: ten times the time
    ode: Positive = 1  # of dequantisation noise and of the trace's probe
    ais: Positive = 1


def nats(
    model: GenerativeModel,
    x: NDArray[np.uint8] | Tensor,
    draws: int,
    say: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """-log P of each example, float64 `[N]` on the CPU. `say` is told how far it is."""
    parts, done, shown = [], 0, time.monotonic()
    for part in torch.as_tensor(x).split(CHUNK):
        parts.append(-model.log_prob(part.to(model.device), samples=draws).double().cpu())
        done += len(part)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"likelihood {done:,}/{len(x):,}")
    return torch.cat(parts)


def taken(model: GenerativeModel, draws: dict[str, int]) -> int:
    """How many of the draws of its kind the model takes: none but one where it is deterministic."""
    return min(draws[model.likelihood], model.most_draws or draws[model.likelihood])


def measure(
    model: GenerativeModel,
    test: NDArray[np.uint8],
    draws: dict[str, int],
    entropy: float | None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics, and reasons for those that there are not.

    Args:
        test: levels `[N, *shape]`.
        draws: Monte Carlo draws by kind of likelihood: of dequantisation noise for an exact one,
            importance samples (diffusion: steps) for a bound, noise and probe for an ode.
        entropy: of the data's own density in nats, where it is known.
    """
    if model.likelihood == "none":
        reason = "the family has no likelihood"
        return {}, {"nats": reason, "bits_per_dim": reason}
    k = taken(model, draws)
    values = nats(model, test, k, say)
    mean = float(values.mean())
    if not math.isfinite(mean):
        reason = f"{int((~values.isfinite()).sum())} of {len(test)} test examples have none finite"
        return {}, {"nats": reason, "bits_per_dim": reason}
    per_dim = model.data.dimensions * math.log(2)
    error = float(values.std()) / math.sqrt(len(test))
    found: dict[str, Any] = {
        "nats": mean,
        "nats_std_error": error,
        "levels": model.data.levels,
        "bits_per_dim": mean / per_dim,
        "bits_per_dim_std_error": error / per_dim,
        "likelihood_kind": model.likelihood,
        "likelihood_draws": k,
        "likelihood_examples": len(test),
    }
    if model.likelihood_note:
        found["likelihood_note"] = model.likelihood_note
    if model.data.modality == "text":
        found["bits_per_byte"] = mean / per_dim
        found["perplexity"] = math.exp(mean / model.data.dimensions)  # of a byte
    if entropy is not None:
        found["entropy_nats"], found["nats_above_entropy"] = entropy, mean - entropy
    return found, {}
