"""Text encoder, conditioning augmentation, the two generators and their discriminators."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adversarial import down, initialise
from models.nn import BatchNorm2d, pyramid
from models.noise import randn

Size = tuple[int, int]


class TextEncoder(nn.Module):
    """Bytes `[B, T]`, zeros after the end, to `[B, outputs]`; what follows the end is not seen."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        channels = outputs // 2 or 1
        self.embed = nn.Embedding(256, channels)
        convolutions = [nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2, 4)]
        for conv in convolutions:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.convolutions = nn.ModuleList(convolutions)
        self.project = nn.Linear(2 * channels, outputs)
        # Neither player can win by making the embedding large or small. No bias, here or in the
        # discriminators' view of the text: batch norm would all but cancel it.
        self.norm = nn.LayerNorm(outputs, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        there = (text != 0)[:, None]
        h = self.embed(text.long()).transpose(1, 2) * there
        for conv in self.convolutions:
            h = F.relu(conv(h)) * there  # zeros again, as beyond the end of a longer row
        count = there.sum(2).clamp(min=1)
        # After the ReLU a zero takes no maximum from a character that is there.
        pooled = torch.cat([h.amax(2), h.sum(2) / count], 1)
        return self.norm(self.project(pooled).float())


class Augmentation(nn.Module):
    """`e -> c, KL`: conditioning augmentation, section 3.2 of the paper; KL `[B]` in nats."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def moments(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of c, each `[B, outputs]`."""
        mean, log_var = self.linear(e).float().chunk(2, 1)
        return mean, log_var

    def forward(self, e: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        mean, log_var = self.moments(e)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        if temperature == 0:
            return mean, kl
        noise = temperature * randn(mean.shape, mean.device)
        return mean + torch.exp(0.5 * log_var) * noise, kl


class StageOne(nn.Module):
    """`e, z -> image [B, C, *size] in [-1, 1], KL [B]`; `width` channels at `size`."""

    def __init__(
        self,
        channels: int,
        size: Size,
        width: int,
        *,
        text_dim: int,
        condition_dim: int,
        latent_dim: int,
    ) -> None:
        super().__init__()
        self.augmentation = Augmentation(text_dim, condition_dim)
        sizes = _sizes(size)
        widths = [width * 2**i for i in range(len(sizes))]
        self.body = nn.Sequential(
            nn.Linear(
                condition_dim + latent_dim,
                widths[-1] * math.prod(sizes[-1]),
                bias=False,
            ),
            nn.Unflatten(1, (widths[-1], *sizes[-1])),
            BatchNorm2d(widths[-1]),
            nn.ReLU(),
            *_ups(widths, sizes),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
        )
        self.body.apply(initialise)

    def forward(self, e: Tensor, z: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        c, kl = self.augmentation(e, temperature)
        return self.body(torch.cat([c, z], 1)), kl


class StageTwo(nn.Module):
    """`e, image [B, C, *half] -> image [B, C, *size], KL [B]`; `width` channels at `size`."""

    def __init__(
        self,
        channels: int,
        half: Size,
        size: Size,
        width: int,
        *,
        text_dim: int,
        condition_dim: int,
        residual_blocks: int,
    ) -> None:
        super().__init__()
        self.augmentation = Augmentation(text_dim, condition_dim)
        below = pyramid(half)
        halvings = next((i for i, side in enumerate(below) if i and max(side) <= 16), len(below))
        sizes = [size, *below[: halvings + 1]]
        widths = [width * 2**i for i in range(len(sizes))]
        first = [nn.Conv2d(channels, widths[1], 3, padding=1), nn.ReLU()]
        halve = [
            layer
            for (outer, inner), side in zip(pairwise(widths[1:]), sizes[1:], strict=False)
            for layer in (down(outer, inner, side, bias=False), BatchNorm2d(inner), nn.ReLU())
        ]
        self.encoder = nn.Sequential(*first, *halve)
        self.join = _conv(widths[-1] + condition_dim, widths[-1])
        self.decoder = nn.Sequential(
            *(Residual(widths[-1]) for _ in range(residual_blocks)),
            *_ups(widths, sizes),
            nn.Conv2d(widths[0], channels, 3, padding=1),
            nn.Tanh(),
        )
        for part in (self.encoder, self.join, self.decoder):
            part.apply(initialise)

    def forward(self, e: Tensor, image: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        c, kl = self.augmentation(e, temperature)
        return self.decoder(self.join(_joined(self.encoder(image), c))), kl


class Discriminator(nn.Module):
    """Image `[B, C, *size]` -> `features`; features, e `[B, text_dim]` -> logit `[B]`."""

    def __init__(
        self, channels: int, size: Size, width: int, *, text_dim: int, condition_dim: int
    ) -> None:
        super().__init__()
        sizes = _sizes(size)
        widths = [channels, *(width * 2**i for i in range(1, len(sizes)))]
        layers: list[nn.Module] = []
        for (outer, inner), side in zip(pairwise(widths), sizes, strict=False):
            layers.append(down(outer, inner, side, bias=not layers))
            layers += [BatchNorm2d(inner)] if len(layers) > 1 else []
            layers.append(nn.LeakyReLU(0.2))
        if not layers:  # an image of 2x2 has no halves
            widths.append(width)
            layers = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        last = widths[-1]
        self.features = nn.Sequential(*layers)
        self.text = nn.Sequential(nn.Linear(text_dim, condition_dim, bias=False), nn.LeakyReLU(0.2))
        self.head = nn.Sequential(
            nn.Conv2d(last + condition_dim, last, 1, bias=False),
            BatchNorm2d(last),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(last * math.prod(sizes[-1]), 1),
        )
        for part in (self.features, self.head):
            part.apply(initialise)

    def forward(self, features: Tensor, e: Tensor) -> Tensor:
        return self.head(_joined(features, self.text(e))).squeeze(1).float()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm2d(outputs), nn.ReLU()
    )


def _ups(widths: list[int], sizes: list[Size]) -> list[nn.Module]:
    """From the last of `sizes` up to the first."""
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1, 0, -1):
        layers += [nn.Upsample(size=sizes[i - 1]), _conv(widths[i], widths[i - 1])]
    return layers


def _joined(x: Tensor, vector: Tensor) -> Tensor:
    """`[B, F, h, w]` and `[B, V]`, the same at every place, to `[B, F + V, h, w]`."""
    tiled = vector.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, tiled], 1)


def _sizes(size: Size) -> list[Size]:
    return pyramid(size, smallest=4 if min(size) > 8 else 2)
