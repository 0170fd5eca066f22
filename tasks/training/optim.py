"""Optimiser, clipping, random state and precision: what the loop needs to know of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import OptimizerConfig
from tasks.environment import keep_freed_memory, use_threads


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`"auto"` to `"bf16"` or `"fp32"`, by what the device computes natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def set_up_torch(threads: int) -> None:
    """So many threads, the same result at every run, and memory that is kept for the next step."""
    use_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def lay_out(model: GenerativeModel, precision: str) -> None:
    """The layout of the weights in memory that trains fastest, in place; the same numbers.

    In float32 it stays as it is: another layout is another order of sums, and other weights.
    """
    if model.channels_last and precision == "bf16" and model.device.type == "cpu":
        model.to(memory_format=torch.channels_last)


def make_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The torch optimiser that `config` names.

    On a CPU torch would go through the parameters one by one, in Python: the same operations, and
    the same weights bit for bit. Its fused kernels round otherwise.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "foreach": True,
    }
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


def clip_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients to a norm of at most `most`, all together; returns what it was.

    As `nn.utils.clip_grad_norm_`, but on a CPU, where that a number is known costs nothing, those
    that are short enough are not multiplied by one.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    scale = most / (norm + 1e-6)
    if norm.device.type != "cpu" or not bool(scale >= 1):  # not a number: into the gradients
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def seed_noise(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` where it is drawn. That also notes, with a look at the stack, what
    every other kind of device is to be seeded with, should it ever be used: 0.3 ms each time."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
