"""What workers say to each other. With one worker, nothing."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

START_S = 300  # until all have met
# ten times what `DistributedDataParallel` has: these do not overlap the backward pass, so that more
# of them would only add their latencies (docs/performance.md, "Scaling"); most families fit one
BUCKET_BYTES = 250 * 2**20


class Comm:
    """The process group if there is one, else a world of one."""

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world = dist.get_world_size() if ready else 1

    @classmethod
    def sharing(cls, batch_size: int) -> Comm | None:
        """The most workers that can share such a batch; None for one that is left over.

        An elastic group has as many as there was room for, whether they divide the batch or not.
        Those that do are made the process group: `models.nn` speaks to all of it.
        """
        comm = cls()
        world = max(n for n in range(1, comm.world + 1) if batch_size % n == 0)
        if world == comm.world:
            return comm
        timeout = timedelta(seconds=START_S)
        address, backend = os.environ["MASTER_ADDR"], dist.get_backend()
        port = 0
        if comm.rank == 0:
            store = dist.TCPStore(address, 0, world, True, timeout, wait_for_workers=False)
            port = store.port
        port = int(comm.first(port)[0])
        dist.destroy_process_group()
        if comm.rank >= world:
            return None
        if comm.rank:
            store = dist.TCPStore(address, port, world, False, timeout)
        dist.init_process_group(backend, store=store, rank=comm.rank, world_size=world)
        return cls()

    @classmethod
    def alone(cls) -> Comm:
        """A world of one, whatever there is."""
        comm = cls()
        comm.rank, comm.world = 0, 1
        return comm

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean of the gradients over the workers, one collective a bucket; missing ones are 0.

        A bucket travels while the next one is packed.
        """
        if self.world == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        travelling = []
        for bucket in buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            travelling.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in travelling:
            work.wait()
            flat /= self.world
            pieces = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(
                bucket, [f.view(g.shape) for f, g in zip(pieces, bucket, strict=True)]
            )

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values

    def first(self, *values: float) -> list[float]:
        """The first worker's values, on every worker, in one collective."""
        if self.world == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        box = torch.tensor(values, dtype=torch.float64, device=device)
        dist.broadcast(box, 0)
        return box.tolist()


def buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """In their order, those of one dtype together, up to `BUCKET_BYTES`; a larger one is alone."""
    found: list[list[Tensor]] = []
    last: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        bucket, size = last.get(gradient.dtype, ([], 0))
        if not bucket or size + gradient.nbytes > BUCKET_BYTES:
            bucket, size = [], 0
            found.append(bucket)
        bucket.append(gradient)
        last[gradient.dtype] = bucket, size + gradient.nbytes
    return found
