"""The U-Net that predicts noise or velocity: what the diffusion families share.

    UNet       x [B, C, H, W], t [B], label [B] or None -> [B, outputs, H, W]
    embedding  sinusoids of t, two layers (+ a learned vector of the class); it scales and
               shifts the second norm of every residual block (Nichol & Dhariwal 2021)

After Ho et al. 2020 (arXiv:2006.11239), appendix B: residual blocks with GroupNorm and SiLU,
skips from each block of the way down to its mirror on the way up, self-attention where the
image is small. The sides follow the image by ceil-halving until the next would be below 4.

Deviations from Ho et al.: one block per level on either way by default (they have two down
and three up); upsampling is a transposed convolution, cheaper than nearest neighbour and a
convolution at the full size; channels double once and then stay; at most 8 groups in a norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn import Dropout, Upsample, pyramid


def sinusoids(t: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of `t` `[B]` at geometric frequencies, `[B, width]`; t runs to ~1000."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(longest) / half * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)


class UNet(nn.Module):
    """Every size follows from the image's shape; the last layer starts at zero.

    Args:
        shape: (C, H, W) of the image.
        outputs: channels of the result.
        width: channels at full size; twice as many at all others.
        blocks: residual blocks per size, on the way down and again on the way up.
        attention: self-attention at sizes of at most so many pixels (and always in the middle).
        classes: number of class vectors to learn; 0: the network takes no label.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        *,
        width: int,
        blocks: int,
        attention: int,
        dropout: float = 0.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        sizes = pyramid((height, breadth))
        widths = [width] + [2 * width] * (len(sizes) - 1)
        self.width = width + width % 2
        embedded = 4 * width
        self.time = nn.Sequential(
            nn.Linear(self.width, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        self.classes = nn.Embedding(classes, embedded) if classes else None
        self.first = nn.Conv2d(channels, width, 3, padding=1)

        def stage(inputs: list[int], wide: int, size: tuple[int, int]) -> nn.ModuleList:
            attend = math.prod(size) <= attention
            return nn.ModuleList(_Block(i, wide, embedded, dropout, attend) for i in inputs)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        before = width
        for i, (wide, size) in enumerate(zip(widths, sizes, strict=True)):
            self.down.append(stage([before] + [wide] * (blocks - 1), wide, size))
            # on the way up, the first block takes over from the smaller size, at its own width
            self.up.insert(0, stage([2 * wide] * blocks, wide, size))
            if i + 1 < len(sizes):
                self.shrink.append(nn.Conv2d(wide, wide, 3, stride=2, padding=1))
                self.grow.insert(0, Upsample(widths[i + 1], wide, size))
            before = wide
        self.middle = nn.ModuleList(
            [_Block(before, before, embedded, dropout, at) for at in (True, False)]
        )
        self.last = nn.Sequential(
            _norm(width), nn.SiLU(), _zeroed(nn.Conv2d(width, outputs, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        e = self.time(sinusoids(t, self.width))
        if self.classes is not None:
            assert label is not None
            e = e + self.classes(label)
        e = F.silu(e)
        h = self.first(x)
        skips = []
        for i, stage in enumerate(self.down):
            h = self.shrink[i - 1](h) if i else h
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, e)
                skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for i, stage in enumerate(self.up):
            h = self.grow[i - 1](h) if i else h
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], 1), e)
        h = self.last(h)
        return h if h.dtype == torch.float64 else h.float()


class _Block(nn.Module):
    """Residual block, `[B, inputs, h, w] -> [B, outputs, h, w]`, then attention where asked."""

    def __init__(
        self, inputs: int, outputs: int, embedded: int, dropout: float, attend: bool
    ) -> None:
        super().__init__()
        self.before = nn.Sequential(
            _norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.norm = _norm(outputs)
        self.embedding = nn.Linear(embedded, 2 * outputs)
        self.after = nn.Sequential(
            nn.SiLU(), Dropout(dropout), _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.embedding(e)[:, :, None, None].chunk(2, 1)
        h = self.norm(self.before(x)) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.after(h))


class _Attention(nn.Module):
    """Self-attention over pixels with a residual connection, `[B, C, h, w]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)  # a key's bias would cancel
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, height, width))


def _norm(channels: int) -> nn.GroupNorm:
    """GroupNorm whose groups have several channels: alone, a channel's bias would cancel."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 2))
    return nn.GroupNorm(groups, channels)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
