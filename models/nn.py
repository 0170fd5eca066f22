"""Blocks that several families use unchanged."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.noise import rand, shard


def pyramid(size: tuple[int, int], smallest: int = 4) -> list[tuple[int, int]]:
    """Spatial sizes from `size` down by ceil-halving while both sides stay >= `smallest`.

    >>> pyramid((28, 28))
    [(28, 28), (14, 14), (7, 7), (4, 4)]
    >>> pyramid((8, 8))
    [(8, 8), (4, 4)]
    """
    sizes = [size]
    while True:
        h, w = ((side + 1) // 2 for side in sizes[-1])
        if min(h, w) < smallest:
            return sizes
        sizes.append((h, w))


class Upsample(nn.Module):
    """Transposed convolution (kernel 4, stride 2), cropped to `size` where a side is odd.

    `[B, in, h, w] -> [B, out, *size]` with `size` in `{2h - 1, 2h}` per side.
    """

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.size
        return self.conv(x)[..., :h, :w]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics span all workers, on CPU as well as on GPU.

    `torch.nn.SyncBatchNorm` computes the same but refuses CPU tensors. In evaluation mode,
    or with one worker (see `noise.noise_shard`), this is plain `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        world = _workers()
        if not (self.training and world > 1):
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # differentiable

        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        wide = x.float()
        count = world * x.numel() / x.shape[1]
        mean = all_reduce(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Dropout(nn.Module):
    """Dropout whose mask is drawn for the whole batch of all workers (see `noise.rand`).

    Active in training mode, or always where the family uses it as its noise (`always`).
    """

    def __init__(self, p: float = 0.5, *, always: bool = False) -> None:
        super().__init__()
        self.p, self.always = p, always

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.always) or self.p == 0:
            return x
        return x * (rand(x.shape, x.device) >= self.p).to(x.dtype) / (1 - self.p)


def global_mean(x: Tensor) -> Tensor:
    """Mean of a scalar over all workers, without gradient: for running statistics."""
    x = x.detach().clone()
    if _workers() > 1:
        dist.all_reduce(x)
        x /= _workers()
    return x


def gather_batch(x: Tensor) -> Tensor:
    """The whole batch `[world * B, ...]` of all workers' rows, in rank order, without gradient."""
    x = x.detach()
    if _workers() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(_workers())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _workers() -> int:
    """How many share the batch: outside of `noise_shard`, and without a process group, one."""
    return shard()[1] if dist.is_initialized() else 1


def discretised_logistic_log_prob(
    x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, levels: int
) -> Tensor:
    """Log-probability of integer levels under a mixture of discretised logistics.

    The mass of a level is the logistic's integral over its bin; the first and the last bin
    reach to infinity, so the levels' probabilities sum to one (Salimans et al. 2017, eq. 2).

    Args:
        x: integer levels `[B, C, H, W]`.
        logits, means, log_scales: `[B, C, K, H, W]`; means on the scale where the levels
            span [-1, 1].
        levels: number of levels.

    Returns:
        `[B, C, H, W]`, nats.
    """
    half_bin = 1.0 / (levels - 1)
    centred = (x * (2 * half_bin) - 1).unsqueeze(2) - means
    inverse = torch.exp(-log_scales)
    upper, lower = inverse * (centred + half_bin), inverse * (centred - half_bin)
    # log(sigmoid(upper) - sigmoid(lower)), in the half-plane where nothing cancels:
    # = logsigmoid(upper) + logsigmoid(-lower) + log(1 - exp(-(upper - lower))).
    width = upper - lower
    middle = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
    level = x.unsqueeze(2)
    log_mass = torch.where(
        level < 0.5,
        F.logsigmoid(upper),
        torch.where(level > levels - 1.5, F.logsigmoid(-lower), middle),
    )
    return torch.logsumexp(log_mass + F.log_softmax(logits, 2), 2)


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(values), stable."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])
