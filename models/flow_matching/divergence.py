"""The divergence of a velocity field v(x), exact and estimated."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_trace(v: Tensor, x: Tensor) -> Tensor:
    """div v, `[B]`, by one backward pass per dimension; rows must not depend on each other."""
    flat = v.flatten(1)
    total = torch.zeros_like(flat[:, 0])
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total.detach()


def hutchinson(v: Tensor, x: Tensor, probe: Tensor) -> Tensor:
    """probe . (dv/dx) probe, `[B]`: unbiased for div v, whose probes have identity covariance."""
    (product,) = torch.autograd.grad(v, x, probe)
    return (product * probe).flatten(1).sum(1).detach()
