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
from models.nn import Dropout
from models.noise import rand, random_labels


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


class _Masked(nn.Conv2d):
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


class _Layer(nn.Module):
    """One layer of both stacks. Convolutions do not pad: `padding` says what they need."""

    def __init__(self, config: PixelCNNConfig, data: DataSpec, *, first: bool) -> None:
        super().__init__()
        channels, p = data.shape[0], config.width
        half = (config.first_kernel if first else config.kernel) // 2
        into = torch.arange(channels) if first else _colours(p, channels)
        maps, gates = _colours(p, channels), _colours(p, channels).repeat(2)
        rows = half if first else half + 1
        # left, right, above, below; the first layer's window ends a row above the pixel
        self.padding = (half, half, half, -1 if first else 0)
        self.first = first
        self.vertical = nn.Conv2d(len(into), 2 * p, (rows, 2 * half + 1))
        self.horizontal = _Masked(into, gates, (1, half + 1), a=first)
        self.link = nn.Conv2d(2 * p, 2 * p, 1, bias=False)
        self.dropout = Dropout(config.dropout)
        self.out = _Masked(maps, maps)
        # a gate passes a third of the spread: with no residual, the vertical stack would fade
        for conv, gain in ((self.vertical, 1.0 if first else 2.5), (self.horizontal, 1.0)):
            nn.init.normal_(conv.weight, std=gain * conv.weight[0].numel() ** -0.5)
        self.condition: nn.Embedding | None = None
        if config.class_conditional:
            self.condition = nn.Embedding(len(data.classes), 4 * p)
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
        new = self.out(self.dropout(_gate(new + beside if self.condition else new)))
        return v, new if self.first else h + new


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
        self.layers = nn.ModuleList(
            _Layer(config, data, first=i == 0) for i in range(config.layers)
        )
        maps, hidden = (_colours(k, channels) for k in (config.width, config.hidden))
        self.hidden = _Masked(maps, hidden)
        self.output = _Masked(hidden, _colours(channels * data.levels, channels))

    def logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Of each value given those before it, `[B, H, W, C, levels]`, from levels or, already
        in [-1, 1], floats `[B, C, H, W]`."""
        v = x if x.is_floating_point() else to_signed(x, self.data.levels)
        h = v = v.to(self.hidden.weight.dtype)
        for layer in self.layers:
            v, h = layer(v if layer.first else _gate(v), h, label)
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
        cache = _Cache(self, n, label) if cached else None
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


class _Cache:
    """The maps of both stacks for `n` images in the making.

    Of the vertical stack all rows so far, padded as its convolutions want; of the horizontal
    stack the row in work, padded on the left. Matrices, buffers and the views of each column
    are made once: a layer of a pixel then costs five small operations, not one of them a copy.
    """

    def __init__(self, model: PixelCNN, n: int, label: Tensor | None) -> None:
        _, height, width = model.data.shape
        p, like, self.levels = model.config.width, model.hidden.weight, model.data.levels
        self.layers: list[_Layer] = list(model.layers)  # type: ignore[arg-type]
        self.biases = [layer.biases(label) for layer in self.layers]
        self.above, beside = [], []
        for layer in self.layers:
            left, right, top, _ = layer.padding
            maps = layer.vertical.in_channels
            self.above.append(like.new_zeros(n, maps, top + height, left + width + right))
            beside.append(like.new_zeros(n, left + width, maps))
        self.image = beside[0]
        self.top = like.new_empty(n, p)  # the horizontal stack's last maps, of one pixel
        self.links = like.new_empty(len(self.layers), width, n, 2 * p)  # of the row in work
        self.both, self.gated = like.new_empty(n, 2 * p), like.new_ones(n, p + 1)
        self.halves = (*self.both.chunk(2, 1), self.gated[:, :p])
        nothing = like.new_zeros(n, p)
        # of each column, of each layer: the window, its matrix, the link, the residual, the 1x1
        # matrix (its bias the last row, for the 1 that ends `gated`), and the result's place
        self.steps: list[list[tuple[Tensor, ...]]] = [[] for _ in range(width)]
        for i, layer in enumerate(self.layers):
            before, last = layer.padding[0], i + 1 == len(self.layers)
            wide, out = _matrix(layer.horizontal), _matrix(layer.out, with_bias=True)
            ahead = 0 if last else self.layers[i + 1].padding[0]
            for j, steps in enumerate(self.steps):
                window = beside[i][:, j : j + before + 1].view(n, -1)
                residual = nothing if layer.first else beside[i][:, j + before]
                place = self.top if last else beside[i + 1][:, j + ahead]
                steps.append((window, wide, self.links[i, j], residual, out, place))
        self.hidden = model.hidden.bias, _matrix(model.hidden)
        self.output = model.output.bias, _matrix(model.output)

    def start_row(self, row: int) -> None:
        """The vertical stack of this row, which the rows above decide, and its links."""
        width = self.links.shape[1]
        for i, (layer, (above, beside)) in enumerate(zip(self.layers, self.biases, strict=True)):
            window = self.above[i][:, :, row : row + layer.vertical.kernel_size[0]]
            v = layer.vertical(window) + above
            link = layer.link(v) + beside + layer.horizontal.bias[:, None, None]
            self.links[i] = link[:, :, 0].permute(2, 0, 1)
            if i + 1 < len(self.layers):
                left, _, top, _ = self.layers[i + 1].padding
                self.above[i + 1][:, :, row + top, left : left + width] = _gate(v)[:, :, 0]

    def logits(self, column: int, channel: int) -> Tensor:
        """Of the next value, `[n, levels]`."""
        value, gate, product = self.halves
        for window, wide, link, residual, out, place in self.steps[column]:
            torch.addmm(link, window, wide, out=self.both)
            torch.tanh(value, out=value)
            torch.sigmoid(gate, out=gate)
            torch.mul(value, gate, out=product)
            torch.addmm(residual, self.gated, out, out=place)
        bias, weight = self.hidden
        maps = torch.addmm(bias, self.top.relu(), weight).relu_()
        mine = slice(channel * self.levels, (channel + 1) * self.levels)
        bias, weight = self.output
        return torch.addmm(bias[mine], maps, weight[:, mine])

    def put(self, row: int, column: int, channel: int, level: Tensor) -> None:
        """The value that was drawn, `[n]`."""
        left, _, top, _ = self.layers[0].padding
        value = to_signed(level, self.levels)
        self.image[:, left + column, channel] = value
        self.above[0][:, channel, top + row, left + column] = value


def _matrix(conv: _Masked, *, with_bias: bool = False) -> Tensor:
    """Masked weights for pixels laid out one after the other, `[in, out]`; bias as a last row."""
    weight = conv.masked[:, :, 0].permute(2, 1, 0).flatten(0, 1)
    return torch.cat([weight, conv.bias[None]]) if with_bias else weight.contiguous()


def _pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Levels `[n]` of logits `[n, levels]`: where the cumulated probability passes `uniform`."""
    if temperature == 0:
        return logits.argmax(1)
    total = torch.softmax(logits / temperature, 1).cumsum(1)
    return (uniform[:, None] >= total[:, :-1]).sum(1)


def _gate(x: Tensor) -> Tensor:
    """tanh of the first half of the maps times sigmoid of the second."""
    value, gate = x.chunk(2, 1)
    # torch's sigmoid of such a strided half takes six times as long as of a copy
    gate = gate.contiguous(memory_format=torch.channels_last)
    return torch.tanh(value) * torch.sigmoid(gate)


def _colours(maps: int, channels: int) -> Tensor:
    """The colour of each of `maps` feature maps, in order: `[maps]`."""
    return torch.arange(maps) * channels // maps
