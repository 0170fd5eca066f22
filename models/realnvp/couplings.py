"""The couplings, their masks and the networks inside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.nn import BatchNorm2d


class _Residual(nn.Module):
    """Pre-activation residual block, `[B, width, h, w]` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Coupling(nn.Module):
    """Affine coupling over `[B, C, h, w]` or `[B, 2]`.

    `mask` `[C, h, w]` or `[2]` is 1 where the input passes unchanged; `net` gives two values
    for each of the input.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, net: nn.Sequential) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.net = net
        # one for each channel or coordinate; zero here would be a saddle
        self.scale = nn.Parameter(torch.ones(len(mask), *[1] * (mask.ndim - 1)))
        nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]

    def _affine(self, u: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(u * self.mask).to(u.dtype).chunk(2, 1)
        free = 1 - self.mask
        return self.scale * torch.tanh(raw) * free, shift * free

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._affine(u)
        return u * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        log_scale, shift = self._affine(u)
        return (u - shift) * torch.exp(-log_scale)


def checkerboard(c: int, h: int, w: int, parity: int) -> Tensor:
    mask = (torch.arange(h)[:, None] + torch.arange(w) + parity) % 2
    return mask.float().expand(c, h, w).clone()


def halves(c: int, h: int, w: int, parity: int) -> Tensor:
    mask = torch.arange(c) < c // 2 if parity % 2 else torch.arange(c) >= c // 2
    return mask.float()[:, None, None].expand(c, h, w).clone()


def image_couplings(masks: list[Tensor], width: int, blocks: int) -> nn.ModuleList:
    """One for each mask `[C, h, w]`; networks of `width` channels and `blocks` residual blocks."""
    return nn.ModuleList(_Coupling(mask, _convolutions(len(mask), width, blocks)) for mask in masks)


def _convolutions(channels: int, width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        *(_Residual(width) for _ in range(blocks)),
        BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * channels, 1),
    )


def point_couplings(count: int, hidden: int, frequencies: int) -> nn.ModuleList:
    """Each moves one coordinate by what the other one is, in turns."""
    masks = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    return nn.ModuleList(
        _Coupling(masks[i % 2], _perceptron(hidden, frequencies)) for i in range(count)
    )


def _perceptron(hidden: int, frequencies: int) -> nn.Sequential:
    """`[B, 2] -> [B, 4]`."""
    return nn.Sequential(
        _Waves(frequencies),
        nn.Linear(2 + 4 * frequencies, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 4),
    )


class _Waves(nn.Module):
    """Beside `[B, 2]` its sines and cosines, `[B, 2 + 4 * frequencies]`.

    A perceptron of the bare number learns nothing as steep as the borders between modes.
    """

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, u: Tensor) -> Tensor:
        waves = [u * k for k in range(1, self.frequencies + 1)]
        return torch.cat([u, *map(torch.sin, waves), *map(torch.cos, waves)], 1)


def run(couplings: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    log_det = torch.zeros(len(u), dtype=u.dtype, device=u.device)
    for coupling in couplings.children():
        u, gain = coupling(u)
        log_det = log_det + gain
    return u, log_det


def run_inverse(couplings: nn.Module, u: Tensor) -> Tensor:
    for coupling in reversed(list(couplings.children())):
        u = coupling.inverse(u)  # type: ignore[operator]
    return u
