"""Masked convolutions and one layer of both stacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn import Dropout


class Masked(nn.Conv2d):
    """Convolution whose last tap, the pixel itself, is masked by colour; no padding."""

    mask: Tensor | None
    bias: Tensor  # always there

    def __init__(
        self, inputs: Tensor, outputs: Tensor, kernel: tuple[int, int] = (1, 1), *, a: bool = False
    ) -> None:
        """`inputs`, `outputs`: the colour of each map; `a`: not even the map's own colour."""
        super().__init__(len(inputs), len(outputs), kernel)
        mask = torch.ones_like(self.weight)
        own = outputs[:, None] > inputs if a else outputs[:, None] >= inputs
        mask[:, :, -1, -1] = own.float()
        self.register_buffer("mask", None if mask.all() else mask, persistent=False)

    @property
    def masked(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.masked, self.bias)


class Layer(nn.Module):
    """One layer of both stacks. Convolutions do not pad: `padding` says what they need."""

    def __init__(
        self, channels: int, p: int, kernel: int, *, classes: int, dropout: float, first: bool
    ) -> None:
        """`p`: maps of each stack; `kernel`: side of the masked square; `classes`: 0 for none."""
        super().__init__()
        half = kernel // 2
        into = torch.arange(channels) if first else colours(p, channels)
        maps, gates = colours(p, channels), colours(p, channels).repeat(2)
        rows = half if first else half + 1
        # left, right, above, below; the first layer's window ends a row above the pixel
        self.padding = (half, half, half, -1 if first else 0)
        self.first = first
        self.vertical = nn.Conv2d(len(into), 2 * p, (rows, 2 * half + 1))
        self.horizontal = Masked(into, gates, (1, half + 1), a=first)
        self.link = nn.Conv2d(2 * p, 2 * p, 1, bias=False)
        self.dropout = Dropout(dropout)
        self.out = Masked(maps, maps)
        # a gate passes a third of the spread: with no residual, the vertical stack would fade
        for conv, gain in ((self.vertical, 1.0 if first else 2.5), (self.horizontal, 1.0)):
            nn.init.normal_(conv.weight, std=gain * conv.weight[0].numel() ** -0.5)
        self.condition: nn.Embedding | None = None
        if classes:
            self.condition = nn.Embedding(classes, 4 * p)
            nn.init.normal_(self.condition.weight, std=0.1)

    def biases(self, label: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """V h of the vertical and of the horizontal stack, each `[B, 2p, 1, 1]`, or 0."""
        if self.condition is None:
            return 0.0, 0.0
        return self.condition(label)[..., None, None].chunk(2, 1)

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks `[B, p, H, W]` (the first layer: the image) to the vertical one's maps
        before the gate `[B, 2p, H, W]` and the horizontal stack `[B, p, H, W]`."""
        above, beside = self.biases(label)
        # on CPU in bfloat16 the fastest layout by far; what follows inherits it
        v = self.vertical(F.pad(v, self.padding)).contiguous(memory_format=torch.channels_last)
        v = v + above if self.condition else v
        new = self.link(v) + self.horizontal(F.pad(h, (self.padding[0], 0, 0, 0)))
        new = self.out(self.dropout(gated(new + beside if self.condition else new)))
        return v, new if self.first else h + new


def gated(x: Tensor) -> Tensor:
    """tanh of the first half of the maps times sigmoid of the second."""
    value, gate = x.chunk(2, 1)
    # torch's sigmoid of such a strided half takes six times as long as of a copy
    gate = gate.contiguous(memory_format=torch.channels_last)
    return torch.tanh(value) * torch.sigmoid(gate)


def colours(maps: int, channels: int) -> Tensor:
    """The colour of each of `maps` feature maps, in order: `[maps]`."""
    return torch.arange(maps) * channels // maps
