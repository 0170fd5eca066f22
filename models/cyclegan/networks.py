"""Generators and discriminators."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.adversarial import down
from models.nn import pyramid


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNetGenerator(nn.Sequential):
    """`[B, inputs, *size] -> [B, outputs, *size]` in [-1, 1]."""

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], width: int, blocks: int
    ) -> None:
        sizes = pyramid(size)[:3]
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(inputs, width, 7, bias=False),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
        ]
        for i in range(len(sizes) - 1):
            outs = width * 2 ** (i + 1)
            conv = nn.Conv2d(outs // 2, outs, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.InstanceNorm2d(outs), nn.ReLU()]
        inner = width * 2 ** (len(sizes) - 1)
        layers += [ResidualBlock(inner) for _ in range(blocks)]
        for small, large in pairwise(reversed(sizes)):
            extra = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
            up = nn.ConvTranspose2d(
                inner, inner // 2, 3, stride=2, padding=1, output_padding=extra, bias=False
            )
            inner //= 2
            layers += [up, nn.InstanceNorm2d(inner), nn.ReLU()]
        super().__init__(*layers, nn.ReflectionPad2d(3), nn.Conv2d(inner, outputs, 7), nn.Tanh())


class PatchDiscriminator(nn.Sequential):
    """`[B, inputs, *size] -> [B, 1, h, w]`, a number for each patch."""

    def __init__(self, inputs: int, size: tuple[int, int], width: int, halvings: int) -> None:
        sizes = pyramid(size, smallest=3)[:-1][:halvings]
        layers: list[nn.Module] = [down(inputs, width, sizes[0]), nn.LeakyReLU(0.2)]
        for i, side in enumerate(sizes[1:], 1):
            conv = down(width * 2 ** (i - 1), width * 2**i, side, bias=False)
            layers += [conv, nn.InstanceNorm2d(width * 2**i), nn.LeakyReLU(0.2)]
        inner = width * 2 ** len(sizes)
        super().__init__(
            *layers,
            nn.Conv2d(inner // 2, inner, 4, padding=1, bias=False),
            nn.InstanceNorm2d(inner),
            nn.LeakyReLU(0.2),
            nn.Conv2d(inner, 1, 4, padding=1),
        )
