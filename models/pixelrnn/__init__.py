"""PixelRNN: van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks".

    factors   p(x) = prod p(x_i | x_<i), pixels in raster order, the colours of a pixel R, G, B
    first     7x7 convolution, mask A: x [B, C, H, W] -> features [H*W, B, 2h]
    layers    masked input-to-state map, LSTM, 1x1 convolution h -> 2h, plus the layer's input:
              "row_lstm": row by row; a cell sees the three states above it (state-to-state 3x1)
                  and, in its own row, the pixel on its left and itself (input-to-state 3x1,
                  mask B): a triangle of context
              "diagonal_bilstm": diagonal by diagonal from either upper corner; a cell sees the
                  state above it and the one beside it (2x1 on the skewed map); the map of the
                  right direction is moved down a row and added to the left one: the whole context
    head      ReLU, 1x1 convolution, ReLU, 1x1 convolution, all mask B -> logits [.., C, levels]
    loss      -log p(x) in bits per dimension

What the layers see: "diagonal_bilstm" everything before a pixel but, from more than three columns
before the row's end, the last pixel of the row above: the right direction's map has everything
at a pixel but the pixel itself (mask A). The paper's design has that one blind spot at any depth.

Features are split into C groups, one for each colour; masks A and B let group j see the groups
i < j and i <= j of its own pixel. What comes from states, of earlier pixels all, has no mask.

Deviations from the paper: no skip connections from the layers to the output (the paper has them
in some CIFAR models beside the residual ones); a softmax over two levels where the paper has a
sigmoid, which is the same; Adam instead of RMSProp, batches larger than 16; the forget gates
start open (bias 1), about which the paper says nothing; C need not divide the features, groups
then differ by one; positions outside the skewed image hold zero states. Classes are not in this
paper: with `class_conditional` a learned vector of the class is added to the first features.
Widths are for minutes on two CPU cores: the paper has h 16 and 7 layers, or h 32 and 1, on MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.noise import rand, random_labels
from models.pixelrnn.layers import DiagonalBiLSTM, MaskedConv, MaskedLinear, RowLSTM, groups
from models.pixelrnn.lstm import Walk, diagonals, rows
from models.pixelrnn.sampling import DiagonalCache, RowCache, draw

CHUNK = 128  # images whose states `log_prob` holds at a time


class PixelRNNConfig(Config):
    layer: Literal["row_lstm", "diagonal_bilstm"] = "diagonal_bilstm"
    layers: Positive = 2
    hidden: Positive = 16  # h: units of each LSTM and direction; the features between are 2h
    head: Positive = 32  # features between the two 1x1 convolutions of the head
    class_conditional: bool = False  # p(x|y)
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, clip_grad_norm=1.0)


class Kind(NamedTuple):
    layer: Any
    cache: Any
    walk: Callable[[int, int], Walk]  # of height and width


KINDS = {
    "row_lstm": Kind(RowLSTM, RowCache, rows),
    "diagonal_bilstm": Kind(DiagonalBiLSTM, DiagonalCache, diagonals),
}


class PixelRNN(GenerativeModel):
    """Either of the paper's recurrent layers; `sample` keeps their states from pixel to pixel."""

    Config = PixelRNNConfig
    paper = "van den Oord et al. 2016, arXiv:1601.06759"
    likelihood = "exact"
    most_draws = 1
    config: PixelRNNConfig

    def __init__(self, config: PixelRNNConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        if config.class_conditional:
            if not data.classes:
                raise ValueError("class_conditional needs data with classes")
            self.conditions = frozenset({"label"})
        colours, height, width = data.shape
        layer, self.cache, walk = KINDS[config.layer]
        features = groups(2 * config.hidden, colours)
        self.first = MaskedConv(colours, features)
        self.layers = nn.ModuleList(layer(config.hidden, colours) for _ in range(config.layers))
        between = groups(config.head, colours)
        levels = torch.arange(colours).repeat_interleave(data.levels)
        self.head = nn.Sequential(
            nn.ReLU(), MaskedLinear(features, between), nn.ReLU(), MaskedLinear(between, levels)
        )
        if config.class_conditional:
            self.embed = nn.Embedding(len(data.classes), len(features))
            nn.init.normal_(self.embed.weight, std=0.1)  # about the size of the features
        self.walk = walk(height, width)

    def logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Of every value: `[H*W, B, C, levels]`, from levels `[B, C, H, W]`."""
        return self(to_signed(x, self.data.levels), label)

    def forward(self, real: Tensor, label: Tensor | None = None) -> Tensor:
        """As `logits`, from reals in [-1, 1]."""
        colours, _, width = self.data.shape
        features = self.first(real).permute(2, 3, 0, 1).flatten(0, 1) + self._shift(label)
        for layer in self.layers:
            features = layer(features, width, self.walk)
        return self.head(features).float().unflatten(-1, (colours, self.data.levels))

    def _shift(self, label: Tensor | None) -> Tensor | float:
        """What the class adds to the first features, `[B, 2h]`."""
        if not self.config.class_conditional:
            return 0.0
        if label is None:
            raise ValueError("a class-conditional model needs a label with each image")
        return self.embed(label.to(self.device))

    def _nats(self, x: Tensor, label: Tensor | None) -> Tensor:
        """-log p(x|y), `[B]`."""
        logits = self.logits(x, label)
        levels = x.long().permute(2, 3, 0, 1).flatten(0, 1)
        parts = F.cross_entropy(logits.flatten(0, 2), levels.flatten(), reduction="none")
        return parts.view(levels.shape).sum((0, 2))

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        nats = self._nats(batch.x, batch.label).mean()
        return {"loss": nats / (self.data.dimensions * math.log(2)), "nats": nats}

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Exact; with classes, log of the mean of p(x|y) over all of them."""
        return torch.cat([self._log_prob(part) for part in x.split(CHUNK)])

    def _log_prob(self, x: Tensor) -> Tensor:
        if not self.config.class_conditional:
            return -self._nats(x, None)
        count = len(self.data.classes)
        each = [-self._nats(x, torch.full((len(x),), y, device=x.device)) for y in range(count)]
        return torch.logsumexp(torch.stack(each), 0) - math.log(count)

    @torch.no_grad()
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
        x, label, noise = self._begin(n, label, z)
        shift = self._shift(label)
        colours, height, width = self.data.shape
        kernel = self.first.kernel
        # of the pixel's own row: the three on the left, and itself
        own = kernel[:, :, 3, :4].flatten(1).mT
        padded = F.pad(torch.zeros_like(x, dtype=kernel.dtype), (3, 3, 3, 0))
        caches = [self.cache(layer, n, width) for layer in self.layers]
        for row in range(height):
            above = F.conv2d(padded[:, :, row : row + 3], kernel[:, :, :3], self.first.bias)
            known = above[:, :, 0].permute(2, 0, 1) + shift
            for cache in caches:
                cache.begin_row()
            for column in range(width):
                # each colour asks for the pixel again, now that the colours before it are known
                for colour in range(colours):
                    taps = padded[:, :, row + 3, column : column + 4].flatten(1)
                    features = torch.addmm(known[column], taps, own)
                    for cache in caches:
                        features = cache.pixel(column, features)
                    logits = self.head(features).unflatten(-1, (colours, -1))[:, colour]
                    level = draw(logits, noise[:, colour, row, column], temperature)
                    x[:, colour, row, column] = level
                    value = to_signed(level, self.data.levels)
                    padded[:, colour, row + 3, column + 3] = value
            for cache in caches:
                cache.end_row()
        return x

    @torch.no_grad()
    def sample_naive(
        self, n: int, *, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """What `sample` draws for the same seed, by a whole pass of the network for each value."""
        x, label, noise = self._begin(n, label, None)
        colours, height, width = self.data.shape
        for pixel in range(height * width):
            row, column = divmod(pixel, width)
            for colour in range(colours):
                logits = self.logits(x, label)[pixel, :, colour]
                x[:, colour, row, column] = draw(logits, noise[:, colour, row, column], temperature)
        return x

    def _begin(
        self, n: int, label: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The empty image, the labels, and a uniform number for each value."""
        if z is not None:
            raise ValueError("a PixelRNN has no latents")
        if not self.config.class_conditional:
            label = None
        elif label is None:
            label = random_labels(n, self.data, self.device)
        x = torch.zeros((n, *self.data.shape), dtype=torch.uint8, device=self.device)
        return x, label, rand(x.shape, self.device)
