"""Optimiser, moving average and precision: what the loop needs to know of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`"auto"` to `"bf16"` or `"fp32"`, by what the device computes natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def set_up_torch(threads: int) -> None:
    """So many threads, and the same result at every run."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def make_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The torch optimiser that `config` names."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name in ("adam", "adamw", "adamax"):
        options["betas"] = config.betas
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adamax": torch.optim.Adamax,
        "rmsprop": torch.optim.RMSprop,
        "sgd": torch.optim.SGD,
    }
    return kinds[config.name](parameters, **options)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """At `step`, from 0: linear warm-up, then constant, or cosine to zero at `decay_steps`."""
    rate = config.lr
    if config.warmup_steps:
        rate *= min(1.0, (step + 1) / config.warmup_steps)
    if config.decay_steps:
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.decay_steps)))
    return rate


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Any], None]:
    """Exponential moving average that starts as a plain mean: decay <= (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, count: Any) -> None:
        n = float(count)
        weight = 1.0 - min(decay, (1.0 + n) / (10.0 + n))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:  # counters
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)

    return update
