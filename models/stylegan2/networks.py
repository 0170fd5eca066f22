"""Synthesis and discriminator, their layers, and the filters between sizes."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.noise import randn

Size = tuple[int, int]


def activate(x: Tensor) -> Tensor:
    """LeakyReLU, scaled to keep the variance that equalised weights rely on."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Equal(nn.Module):
    """Linear layer, or convolution if there is a kernel, and LeakyReLU. Weights from N(0, 1) are
    scaled at run time (Karras et al. 2018). Linear layers stay in full precision."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 0,
        *,
        stride: int = 1,
        rate: float = 1.0,
        bias: float | None = 0.0,
        active: bool = True,
    ) -> None:
        super().__init__()
        shape = (outputs, inputs, *[kernel] * 2) if kernel else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(shape) / rate)
        self.bias = None if bias is None else nn.Parameter(torch.full((outputs,), bias))
        self.scale, self.rate = rate / math.sqrt(self.weight[0].numel()), rate
        self.stride, self.padding = stride, kernel // 2 if stride == 1 else 0
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        bias = None if self.bias is None else self.bias * self.rate
        if weight.ndim == 4:
            x = F.conv2d(x, weight, bias, self.stride, self.padding)
        else:
            with torch.autocast(x.device.type, enabled=False):
                x = F.linear(x.to(weight.dtype), weight, bias)
        return activate(x) if self.active else x


class FIR(nn.Module):
    """Resampling by the filter [1, 3, 3, 1] along both axes, `[..., *size] -> [..., *outputs]`.

    Inputs lie `up` apart, zeros between and around them; output o sees four places from
    `o * down - pad` on. As two matrix products: on small images as fast as a convolution, with a
    second derivative that is much faster."""

    rows: Tensor
    columns: Tensor

    def __init__(
        self, size: Size, outputs: Size, pad: int, *, up: int = 1, down: int = 1, gain: int = 1
    ) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) * (gain / 8)
        for name, i, o in zip(("rows", "columns"), size, outputs, strict=True):
            k = torch.arange(i) * up - (torch.arange(o)[:, None] * down - pad)
            matrix = torch.where((k >= 0) & (k < 4), taps[k.clamp(0, 3)], 0.0)
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # colours stay in full precision
            return self.rows.to(x.dtype) @ (x @ self.columns.to(x.dtype).T)


class Normalise(nn.Module):
    """z onto the sphere of radius sqrt(latent_dim)."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def modulated_conv(
    x: Tensor, weight: Tensor, style: Tensor, *, up: bool = False, demodulate: bool = True
) -> Tensor:
    """Each example's own convolution: weights `style_i w_oik`, over their norm for each output o.

    Inputs and outputs are scaled in place of weights, which is the same (section 2.2) and needs
    no grouped convolution. `up`: transposed, to 2h + 1 rows that are yet to be filtered.
    `x [B, I, h, w]`, `weight [O, I, k, k]`, `style [B, I]`.
    """
    x = x * style[:, :, None, None]
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    if not demodulate:
        return x
    with torch.autocast(x.device.type, enabled=False):
        norm = style.square() @ weight.square().sum((2, 3)).T
    return x * torch.rsqrt(norm + 1e-8)[:, :, None, None]


class Styled(nn.Module):
    """`[B, I, *size] -> [B, O, *size]`, or `*outer` if given. 3x3: demodulated convolution, noise,
    bias, LeakyReLU. 1x1, to colours: without demodulation, noise or LeakyReLU."""

    def __init__(
        self,
        dim: int,
        inputs: int,
        outputs: int,
        kernel: int,
        size: Size,
        outer: Size | None = None,
    ) -> None:
        super().__init__()
        self.style = Equal(dim, inputs, bias=1.0, active=False)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.strength = nn.Parameter(torch.zeros(())) if kernel > 1 else None  # of the noise
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        spread = (2 * size[0] + 1, 2 * size[1] + 1)
        self.blur = FIR(spread, outer, pad=1, gain=2) if outer else None

    def forward(self, x: Tensor, w: Tensor, noise: float) -> Tensor:
        weight, colour = self.weight * self.scale, self.strength is None
        x = modulated_conv(
            x, weight, self.style(w), up=self.blur is not None, demodulate=not colour
        )
        x = self.blur(x) if self.blur else x
        if self.strength is not None and noise:
            x = x + self.strength * noise * randn((len(x), 1, *x.shape[2:]), x.device)
        return x + self.bias if colour else activate(x + self.bias)


class Synthesis(nn.Module):
    """Styles `[B, styles, dim]` -> images `[B, channels, *sizes[-1]]`."""

    def __init__(self, dim: int, widths: list[int], sizes: list[Size], channels: int) -> None:
        super().__init__()
        self.styles = 2 * len(sizes)
        self.constant = nn.Parameter(torch.randn(widths[0], *sizes[0]))
        layers = [Styled(dim, widths[0], widths[0], 3, sizes[0])]
        for (inner, outer), (size, larger) in zip(pairwise(widths), pairwise(sizes), strict=True):
            layers.append(Styled(dim, inner, outer, 3, size, larger))
            layers.append(Styled(dim, outer, outer, 3, larger))
        self.layers = nn.ModuleList(layers)
        colours = zip(widths, sizes, strict=True)
        self.colours = nn.ModuleList(Styled(dim, w, channels, 1, size) for w, size in colours)
        self.grow = nn.ModuleList(FIR(*pair, pad=2, up=2, gain=2) for pair in pairwise(sizes))

    def forward(self, ws: Tensor, noise: float = 1.0) -> Tensor:
        w = ws.unbind(1)
        x = self.layers[0](self.constant.expand(len(ws), -1, -1, -1), w[0], noise)
        image = self.colours[0](x, w[1], noise)
        for i, grow in enumerate(self.grow, 1):
            x = self.layers[2 * i - 1](x, w[2 * i - 1], noise)
            x = self.layers[2 * i](x, w[2 * i], noise)
            image = grow(image) + self.colours[i](x, w[2 * i + 1], noise)
        return image


class ResidualBlock(nn.Module):
    """`[B, inputs, *size] -> [B, outputs, *smaller]`; filters before it drops pixels."""

    def __init__(self, inputs: int, outputs: int, size: Size, smaller: Size) -> None:
        super().__init__()
        self.first = Equal(inputs, inputs, 3)
        self.blur = FIR(size, (2 * smaller[0] + 1, 2 * smaller[1] + 1), pad=2)
        self.second = Equal(inputs, outputs, 3, stride=2)
        self.shrink = FIR(size, smaller, pad=1, down=2)
        self.skip = Equal(inputs, outputs, 1, bias=None, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.blur(self.first(x))) + self.skip(self.shrink(x))) / math.sqrt(2)


class Deviation(nn.Module):
    """One more channel: how much the group of neighbours in the batch differs."""

    def forward(self, x: Tensor) -> Tensor:
        group = next(g for g in (4, 3, 2, 1) if len(x) % g == 0)
        groups = (x if x.dtype == torch.float64 else x.float()).reshape(-1, group, x[0].numel())
        spread = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1)
        plane = spread.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, plane.to(x.dtype)], 1)


def discriminator(widths: list[int], sizes: list[Size], channels: int) -> nn.Sequential:
    """`[B, channels, *sizes[0]] -> [B, 1]`."""
    steps, width = zip(pairwise(widths), pairwise(sizes), strict=True), widths[-1]
    return nn.Sequential(
        Equal(channels, widths[0], 1),
        *[ResidualBlock(*change, *size) for change, size in steps],
        Deviation(),
        Equal(width + 1, width, 3),
        nn.Flatten(),
        Equal(width * math.prod(sizes[-1]), width),
        Equal(width, 1, active=False),
    )
