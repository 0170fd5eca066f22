"""Gradients of gradients, and the optimiser's correction for taking them only now and then."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.config import OptimizerConfig


def lazily(optimizer: OptimizerConfig, every: int) -> OptimizerConfig:
    """Adam corrected for a regulariser's step after each `every` main ones (appendix B)."""
    c = every / (every + 1)
    betas = (optimizer.betas[0] ** c, optimizer.betas[1] ** c)
    return optimizer.model_copy(update={"lr": optimizer.lr * c, "betas": betas})


def r1_penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """E |dD/dx|^2, and the logits `[B, 1]`."""
    real = real.detach().requires_grad_()
    logits = discriminate(real)
    (gradient,) = torch.autograd.grad(logits.sum(), [real], create_graph=True)
    return gradient.square().flatten(1).sum(1).mean(), logits


def path_lengths(
    synthesise: Callable[[Tensor], Tensor], ws: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """|J^T y|, a root mean square over the layers, `[B]`; and the images."""
    image = synthesise(ws)
    product = (image * y).sum() / math.sqrt(math.prod(y.shape[-2:]))
    (gradient,) = torch.autograd.grad(product, [ws], create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt(), image
