"""What workers say to each other. With one worker, nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Comm:
    """The process group if there is one, else a world of one."""

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world = dist.get_world_size() if ready else 1

    @classmethod
    def alone(cls) -> Comm:
        """A world of one, whatever there is."""
        comm = cls()
        comm.rank, comm.world = 0, 1
        return comm

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean of the gradients over the workers, in one collective; missing ones count as 0."""
        if self.world == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [f.view(g.shape) for f, g in zip(pieces, gradients, strict=True)]
        )

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values

    def first(self, value: float) -> float:
        """The first worker's value, on every worker."""
        if self.world == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        box = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(box, 0)
        return float(box)
