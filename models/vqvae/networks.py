"""Encoder and decoder, with what the decoder says of the pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.data import DataSpec, from_signed
from models.nn import Upsample, discretised_logistic_log_prob


class Residual(nn.Module):
    """The paper's block, ReLU, 3x3, ReLU, 1x1: `[B, width, h, w]` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Conv2d(width, width, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), inner, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ImageDecoder(nn.Sequential):
    """p(x|z_q): z_q `[B, N, code_dim]`, in raster order of `grid`, to a distribution of each
    pixel, a mixture of discretised logistics; with two levels, a Bernoulli."""

    def __init__(
        self, *layers: nn.Module, data: DataSpec, grid: tuple[int, int], mixture: int
    ) -> None:
        super().__init__(*layers)
        self.data, self.grid, self.mixture = data, grid, mixture

    def _parameters_of(self, quantised: Tensor) -> tuple[Tensor, ...]:
        """Of the pixels' distributions, from `[B, N, D]`: logits, means and log-scales of the
        mixture, `[B, C, M, H, W]`; with two levels the logits of the upper one, `[B, C, H, W]`."""
        out = self(quantised.transpose(1, 2).unflatten(2, self.grid)).to(quantised.dtype)
        if self.data.levels == 2:
            return (out,)
        channels, height, width = self.data.shape
        out = out.view(len(out), channels, 3, self.mixture, height, width)
        logits, means, log_scales = out.unbind(2)
        return logits, means, (log_scales - 2).clamp(-7, 3)

    def log_likelihood(self, x: Tensor, quantised: Tensor) -> Tensor:
        """log p(x|z_q), nats, `[B]`."""
        logits, *rest = self._parameters_of(quantised)
        level = x.to(quantised.dtype)
        if self.data.levels == 2:
            parts = -F.binary_cross_entropy_with_logits(logits, level, reduction="none")
        else:
            means, log_scales = rest
            parts = discretised_logistic_log_prob(
                level, logits, means, log_scales, self.data.levels
            )
        return parts.flatten(1).sum(1)

    def mean_image(self, quantised: Tensor) -> Tensor:
        """Levels, uint8 `[B, C, H, W]`."""
        logits, *rest = self._parameters_of(quantised)
        if self.data.levels == 2:
            return (logits > 0).to(torch.uint8)
        mean = (logits.softmax(2) * rest[0].clamp(-1, 1)).sum(2)
        return from_signed(mean, self.data.levels)


def autoencoder(
    data: DataSpec,
    sizes: list[tuple[int, int]],
    *,
    width: int,
    blocks: int,
    code_dim: int,
    mixture: int,
) -> tuple[nn.Sequential, ImageDecoder]:
    """The encoder `[B, C, *sizes[0]] -> [B, code_dim, *sizes[-1]]`, through all of `sizes`, with
    `blocks` residual blocks; and the decoder, which goes the same way back."""
    channels = data.shape[0]
    outs = 1 if data.levels == 2 else 3 * mixture  # for each channel
    down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
    up: list[nn.Module] = []
    for size in sizes[:-1]:
        down += [nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)]
        up = [nn.ReLU(), Upsample(width, width, size), *up]
    encoder = nn.Sequential(
        *down,
        *(Residual(width) for _ in range(blocks)),
        nn.ReLU(),
        nn.Conv2d(width, code_dim, 1),
    )
    decoder = ImageDecoder(
        nn.Conv2d(code_dim, width, 3, padding=1),
        *(Residual(width) for _ in range(blocks)),
        *up,
        nn.ReLU(),
        nn.Conv2d(width, channels * outs, 3, padding=1),
        data=data,
        grid=sizes[-1],
        mixture=mixture,
    )
    return encoder, decoder
