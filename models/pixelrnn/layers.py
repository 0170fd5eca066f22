"""Masked maps and the residual blocks around the LSTMs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pixelrnn.lstm import Scan, Walk


def groups(features: int, colours: int) -> Tensor:
    """The colour that each feature belongs to, 0 for R."""
    return torch.arange(features) * colours // features


class MaskedLinear(nn.Linear):
    """A 1x1 convolution with mask B, over the last dimension."""

    mask: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__(len(inputs), len(outputs))
        self.register_buffer("mask", inputs <= outputs[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv(nn.Conv2d):
    """The first convolution, 7x7 with mask A: the rows above, the pixels on the left, and of
    the pixel itself the colours before."""

    mask: Tensor

    def __init__(self, colours: int, outputs: Tensor) -> None:
        super().__init__(colours, len(outputs), 7, padding=3)
        mask = torch.zeros_like(self.weight, dtype=torch.bool)
        mask[:, :, :3] = mask[:, :, 3, :3] = True
        mask[:, :, 3, 3] = torch.arange(colours) < outputs[:, None]
        self.register_buffer("mask", mask, persistent=False)

    @property
    def kernel(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, padding=3)


class Layer(nn.Module):
    """A residual block around an LSTM: features `[H*W, B, 2h]` to the same."""

    mask: Tensor

    def __init__(self, hidden: int, colours: int, directions: int, left: bool, taps: int) -> None:
        super().__init__()
        inner, outer = groups(hidden, colours), groups(2 * hidden, colours)
        own = outer[:, None] <= inner.repeat(4)
        mask = torch.cat([torch.ones_like(own), own]) if left else own  # the pixel on the left
        self.register_buffer("mask", mask, persistent=False)
        self.input_weight = nn.Parameter(_uniform(directions, *mask.shape, fan=len(mask)))
        self.state_weight = nn.Parameter(
            _uniform(directions, taps, hidden, 4 * hidden, fan=taps * hidden)
        )
        self.bias = nn.Parameter(torch.zeros(directions, 1, 4 * hidden))
        with torch.no_grad():
            self.bias[..., hidden : 2 * hidden] = 1  # remember until taught to forget
        self.up = MaskedLinear(inner, outer)

    def states(self, x: Tensor, walk: Walk) -> Tensor:
        """Inputs `[H*W, B, I]` to hidden states `[D, H*W, B, h]`."""
        kernel = self.input_weight * self.mask
        every = x.flatten(0, 1).expand(len(kernel), -1, -1)
        gates = torch.baddbmm(self.bias, every, kernel)
        return Scan.apply(gates.view(len(kernel), *x.shape[:2], -1), self.state_weight, walk)


def _uniform(*shape: int, fan: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan)


class RowLSTM(Layer):
    def __init__(self, hidden: int, colours: int) -> None:
        super().__init__(hidden, colours, directions=1, left=True, taps=3)

    def forward(self, x: Tensor, width: int, walk: Walk) -> Tensor:
        left = F.pad(x.unflatten(0, (-1, width)), (0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1)
        return x + self.up(self.states(torch.cat([left, x], -1), walk)[0])


class DiagonalBiLSTM(Layer):
    def __init__(self, hidden: int, colours: int) -> None:
        super().__init__(hidden, colours, directions=2, left=False, taps=2)

    def forward(self, x: Tensor, width: int, walk: Walk) -> Tensor:
        left, right = self.states(x, walk)
        down = F.pad(right[:-width], (0, 0, 0, 0, width, 0))  # a row down: it had seen its own
        return x + self.up(left + down)
