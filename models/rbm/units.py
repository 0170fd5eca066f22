"""Levels of the visible units and states of the hidden ones, drawn from log-odds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Noise = Callable[[torch.Size | tuple[int, ...], torch.device], Tensor]


def at(table: Tensor, v: Tensor) -> Tensor:
    """Sum over the values of what `table` `[D, levels]` has at the levels `v` `[B, D]`: `[B]`."""
    return table.gather(1, v.long().T).sum(0)


def bernoulli(log_odds: Tensor, noise: Noise, temperature: float = 1.0) -> Tensor:
    if temperature == 0:
        return (log_odds > 0).to(log_odds.dtype)
    drawn = noise(log_odds.shape, log_odds.device)
    return (drawn < (log_odds.float() / temperature).sigmoid()).to(log_odds.dtype)


def categorical(log_odds: Tensor, noise: Noise, temperature: float = 1.0) -> Tensor:
    """Levels `[B, D]` from log-odds `[B, D, levels]`."""
    if temperature == 0:
        return log_odds.argmax(2)
    steps = (log_odds / temperature).softmax(2).cumsum(2)[..., :-1]
    return (steps <= noise(log_odds.shape[:2], log_odds.device)[..., None]).sum(2)
