"""Gated PixelCNN: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders".

    order     rows from the top, pixels from the left, R then G then B within a pixel
    vertical  [B, C, H, W] -> L x ([B, 2p, H, W] -> gate -> [B, p, H, W]); sees all rows above
    horizontal  the row's own past, plus a 1x1 of the vertical stack's 2p maps before their gate;
              gate, 1x1, residual: [B, p, H, W]
    gate      tanh(W_f x + V_f h) * sigmoid(W_g x + V_g h), h the one-hot class (eq. 4)
    head      ReLU, 1x1, ReLU, 1x1 -> logits [B, H, W, C, levels]
    loss      -log p(x), bits per dimension; exact

The vertical stack's first convolution ends one row above the pixel, the later ones at the pixel's
own row; so nothing needs shifting between the stacks, and there is no blind spot. The horizontal
stack's maps are divided among the colours in order; a map at a pixel sees the maps of its own and
earlier colours there (in the first layer of earlier colours alone: mask A, after it mask B).

`sample` computes each row of the vertical stack once, and each pixel of the horizontal stack once
for each colour, from cached maps (Ramachandran et al. 2017, "Fast Generation for Convolutional
Autoregressive Models"); `sample_naive` runs the whole network for each value.

Deviations from the paper: far smaller by default; classes (eq. 4) are the only condition, without
the location-dependent kind; dropout, off by default, where the paper has none; `log_prob` of a
class-conditional model is that of its mixture over equally likely classes; gated convolutions
start from normal weights that keep the spread of what passes a gate (the paper says nothing).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.noise import rand, random_labels
from models.pixelcnn.cache import Cache
from models.pixelcnn.layers import Layer, Masked, colours, gated


def _odd(side: int) -> int:
    if side < 3 or side % 2 == 0:
        raise ValueError("a kernel's side is odd, and 3 or more")
    return side


Side = Annotated[int, AfterValidator(_odd)]


class PixelCNNConfig(Config):
    width: Positive = 32  # p: feature maps of each stack, twice as many before a gate
    layers: Positive = 8
    first_kernel: Side = 7  # side of the first layer's masked square
    kernel: Side = 5  # and of the later ones: with 3, eight layers see too few rows of 28
    hidden: Positive = 64  # feature maps between the head's two 1x1 convolutions
    dropout: float = Field(0.0, ge=0, lt=1)  # of the horizontal stack's gated maps
    class_conditional: bool = False
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, clip_grad_norm=1.0)


class PixelCNN(GenerativeModel):
    """Gated PixelCNN over levels of any number, of one colour or several."""

    Config = PixelCNNConfig
    paper = "van den Oord et al. 2016, arXiv:1606.05328"
    likelihood = "exact"
    most_draws = 1
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        channels = data.shape[0]
        if config.class_conditional:
            if not data.classes:
                raise ValueError("class_conditional needs labels, and the data has no classes")
            self.conditions = frozenset({"label"})
        if min(config.width, config.hidden) < channels:
            raise ValueError(f"width and hidden must be at least {channels}: a map for each colour")
        classes = len(data.classes) if config.class_conditional else 0
        kernels = [config.first_kernel, *[config.kernel] * (config.layers - 1)]
        self.layers = nn.ModuleList(
            Layer(
                channels,
                config.width,
                kernel,
                classes=classes,
                dropout=config.dropout,
                first=i == 0,
            )
            for i, kernel in enumerate(kernels)
        )
        maps, hidden = (colours(k, channels) for k in (config.width, config.hidden))
        self.hidden = Masked(maps, hidden)
        self.output = Masked(hidden, colours(channels * data.levels, channels))

    def logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Of each value given those before it, `[B, H, W, C, levels]`, from levels or, already
        in [-1, 1], floats `[B, C, H, W]`."""
        v = x if x.is_floating_point() else to_signed(x, self.data.levels)
        h = v = v.to(self.hidden.weight.dtype)
        for layer in self.layers:
            v, h = layer(v if layer.first else gated(v), h, label)
        h = self.output(F.relu(self.hidden(F.relu(h))))
        return h.permute(0, 2, 3, 1).unflatten(3, (self.data.shape[0], self.data.levels))

    def _log_prob(self, x: Tensor, label: Tensor | None) -> Tensor:
        """log p(x|label), nats, `[B]`."""
        logits = self.logits(x, label)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        levels = x.permute(0, 2, 3, 1).reshape(-1).long()
        nats = F.cross_entropy(logits.flatten(0, 3), levels, reduction="none")
        return -nats.view(len(x), -1).sum(1)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        nats = -self._log_prob(batch.x, batch.label if self.conditions else None).mean()
        return {"loss": nats / (self.data.dimensions * math.log(2))}  # bits per dimension

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Exact; with classes, of their mixture in equal parts. `samples` changes nothing."""
        if not self.conditions:
            return self._log_prob(x, None)
        total: Tensor | None = None  # running log-sum, so that memory does not grow with classes
        for number in range(len(self.data.classes)):
            part = self._log_prob(x, torch.full((len(x),), number, device=x.device))
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - math.log(len(self.data.classes))

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Cached; the same levels as `sample_naive`. `temperature` divides the logits."""
        if z is not None:
            raise ValueError("an autoregressive model has no latents: z must be None")
        return self._draw(n, label, temperature, cached=True)

    def sample_naive(
        self, n: int, *, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """One pass of the whole network for each value: what `sample` is held against."""
        return self._draw(n, label, temperature, cached=False)

    @torch.no_grad()
    def _draw(self, n: int, label: Tensor | None, temperature: float, *, cached: bool) -> Tensor:
        channels, height, width = self.data.shape
        if self.conditions and label is None:
            label = random_labels(n, self.data, self.device)
        uniform = rand((n, height, width, channels), self.device).permute(1, 2, 3, 0).contiguous()
        x = torch.zeros(n, channels, height, width, dtype=torch.uint8, device=self.device)
        cache = (
            Cache(self.layers, self.hidden, self.output, self.data, n, label) if cached else None
        )
        for row in range(height):
            if cache is not None:
                cache.start_row(row)
            for column in range(width):
                for channel in range(channels):
                    if cache is not None:
                        logits = cache.logits(column, channel)
                    else:
                        logits = self.logits(x, label)[:, row, column, channel]
                    level = _pick(logits, uniform[row, column, channel], temperature)
                    x[:, channel, row, column] = level
                    if cache is not None:
                        cache.put(row, column, channel, level)
        return x


def _pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Levels `[n]` of logits `[n, levels]`: where the cumulated probability passes `uniform`."""
    if temperature == 0:
        return logits.argmax(1)
    total = torch.softmax(logits / temperature, 1).cumsum(1)
    return (uniform[:, None] >= total[:, :-1]).sum(1)
