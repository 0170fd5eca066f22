"""The layers of the flow: what is invertible, and by how much each changes the volume."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 4.0  # bound on the size of a coupling's and of a split's log-scale


class ActNorm(nn.Module):
    """`[B, C, h, w] -> (u + bias) * exp(log_scale)` per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.measuring = False  # while True, a forward pass first normalises what it is given

    def forward(self, u: Tensor) -> Tensor:
        if self.measuring:
            wide = u.detach().to(self.bias.dtype)
            std, mean = torch.std_mean(wide, (0, 2, 3), correction=0, keepdim=True)
            self.bias.data.copy_(-mean[0])
            self.log_scale.data.copy_(-torch.log(std[0] + 1e-4))
        return (u + self.bias) * self.log_scale.exp()

    def inverse(self, u: Tensor) -> Tensor:
        return u * torch.exp(-self.log_scale) - self.bias


class InvertibleConv(nn.Module):
    """1x1 convolution by W = P L (U + diag(sign * exp(log_s))); P and the signs stay as drawn."""

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("order", permutation.argmax(1))  # row i of P L is row order[i] of L
        self.register_buffer("sign", upper.diagonal().sign())
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def _factors(self) -> tuple[Tensor, Tensor]:
        unit = torch.diag(torch.ones_like(self.sign))
        diagonal = torch.diag(self.sign * self.log_s.exp())
        return self.lower.tril(-1) + unit, self.upper.triu(1) + diagonal

    def forward(self, u: Tensor) -> Tensor:
        # bf16 would not be the inverse of `inverse`, and the matrix is small
        with torch.autocast(u.device.type, enabled=False):
            lower, upper = self._factors()
            return F.conv2d(u, (lower @ upper)[self.order][:, :, None, None])

    def inverse(self, u: Tensor) -> Tensor:
        lower, upper = self._factors()
        flat = u.flatten(2)[:, self.order.argsort()]
        flat = torch.linalg.solve_triangular(lower, flat, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, flat, upper=True).view_as(u)


class Step(nn.Module):
    """Actnorm, 1x1 convolution and affine coupling over `[B, C, h, w]`, C >= 2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.mix = ActNorm(channels), InvertibleConv(channels)
        self.sizes = [channels // 2, channels - channels // 2]
        self.net = nn.Sequential(
            nn.Conv2d(self.sizes[0], width, 3, padding=1, bias=False),
            ActNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            ActNorm(width),
            nn.ReLU(),
            _zero_conv(width, 2 * self.sizes[1]),
        )
        for i in (0, 3):
            nn.init.normal_(self.net[i].weight, std=0.05)  # type: ignore[arg-type]

    def _affine(self, a: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(a).to(a.dtype).chunk(2, 1)
        return _bounded(F.logsigmoid(raw + 2)), shift

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.mix(self.norm(u)).split(self.sizes, 1)
        log_scale, shift = self._affine(a)
        constant = self.norm.log_scale.sum() + self.mix.log_s.sum()
        log_det = log_scale.flatten(1).sum(1) + constant * math.prod(u.shape[2:])
        return torch.cat([a, (b + shift) * log_scale.exp()], 1), log_det

    def inverse(self, u: Tensor) -> Tensor:
        a, b = u.split(self.sizes, 1)
        log_scale, shift = self._affine(a)
        u = torch.cat([a, b * torch.exp(-log_scale) - shift], 1)
        return self.norm.inverse(self.mix.inverse(u))


class Split(nn.Module):
    """Half of `[B, C, h, w]` leaves, standardised by a Gaussian that depends on what stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = [channels // 2, channels - channels // 2]
        self.prior = _zero_conv(self.sizes[0], 2 * self.sizes[1])

    def _gaussian(self, stays: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.prior(stays).to(stays.dtype).chunk(2, 1)
        return mean, _bounded(log_std)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stays, leaves = u.split(self.sizes, 1)
        mean, log_std = self._gaussian(stays)
        return stays, (leaves - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)

    def inverse(self, stays: Tensor, z: Tensor) -> Tensor:
        mean, log_std = self._gaussian(stays)
        return torch.cat([stays, z * log_std.exp() + mean], 1)


def _bounded(log_scale: Tensor) -> Tensor:
    """As it is where small, at most `LEAST` in size."""
    return LEAST * torch.tanh(log_scale / LEAST)


def _zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
