"""Optimiser, clipping, random state and precision: what the loop needs to know of them."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import OptimizerConfig

# of mallopt(3): from which size on a block is a mapping of its own (before glibc 2.35 no more than
# 32 MiB is taken), how much may lie free at the end of the heap, and how much it grows by, on which
# depends whether a thread other than the first gives its heap back
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2
KEEP = (
    (M_MMAP_THRESHOLD, 32 * 2**20),
    (M_TRIM_THRESHOLD, 2**31 - 1),
    (M_TOP_PAD, 64 * 2**20),
    (M_MMAP_THRESHOLD, 256 * 2**20),
)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`"auto"` to `"bf16"` or `"fp32"`, by what the device computes natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def set_up_torch(threads: int) -> None:
    """So many threads, the same result at every run, and memory that is kept for the next step."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees, where it can be told so (glibc).

    It would give large blocks back to the system, which hands out empty pages at the next step:
    thousands of page faults in each (docs/performance.md). A process holds no more than at its most
    then, and no less. What variables of the environment say stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, size in KEEP:
            mallopt(option, size)


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
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    options["foreach"] = True
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
