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

from models.base import (
    Batch,
    Config,
    DataSpec,
    GenerativeModel,
    OptimizerConfig,
    Positive,
    rand,
    random_labels,
    to_signed,
)

CHUNK = 128  # images whose states `log_prob` holds at a time
TAPS = (0, -1, 1)  # the cells of the line before that a state depends on; diagonals: two of them


class PixelRNNConfig(Config):
    layer: Literal["row_lstm", "diagonal_bilstm"] = "diagonal_bilstm"
    layers: Positive = 2
    hidden: Positive = 16  # h: units of each LSTM and direction; the features between are 2h
    head: Positive = 32  # features between the two 1x1 convolutions of the head
    class_conditional: bool = False  # p(x|y)
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, clip_grad_norm=1.0)


class Walk(nn.Module):
    """The order in which an LSTM walks over the map: at each step a line of cells, `n` of them
    from `low` on, in each of D directions. A cell's state depends on those of the step before,
    at `taps` from its own place in the line. No parameters: a module for its buffers' device.

    Args:
        lines: of each step `low` and the pixels `[D, n]` of its line, in raster order.
        length: of the longest line.
    """

    order: Tensor  # [D * H * W]: direction * H * W + pixel, as the steps come to them
    inverse: Tensor  # where in `order` each of them is
    place: Tensor  # where in the states [steps + 1, D, length + 2] each of them is

    def __init__(self, lines: list[tuple[int, Tensor]], length: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.length, self.taps = length, taps
        self.steps: list[tuple[int, int, int]] = []  # (start in `order`, low, n)
        directions, pixels = len(lines[0][1]), sum(line.shape[1] for _, line in lines)
        direction = torch.arange(directions)[:, None]
        order, place, start = [], [], 0
        for step, (low, line) in enumerate(lines):
            n = line.shape[1]
            order.append((direction * pixels + line).flatten())
            cells = torch.arange(low, low + n) + 1
            place.append((((step + 1) * directions + direction) * (length + 2) + cells).flatten())
            self.steps.append((start, low, n))
            start += directions * n
        inverse = torch.cat(order).argsort()
        self.register_buffer("order", torch.cat(order), persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("place", torch.cat(place)[inverse], persistent=False)


def rows(height: int, width: int) -> Walk:
    """Down the rows; a state comes from the three above it."""
    return Walk([(0, row) for row in torch.arange(height * width).view(height, 1, -1)], width, TAPS)


def diagonals(height: int, width: int) -> Walk:
    """Along the columns of the skewed map, from the left and from the right; a state comes from
    the pixel beside it and the one above. Only cells inside the image are visited: the others,
    half of the skewed map, would stay zero."""
    lines = []
    for step in range(height + width - 1):
        low = max(0, step - width + 1)
        row = torch.arange(low, min(height, step + 1))
        column = step - row
        lines.append((low, row * width + torch.stack([column, width - 1 - column])))
    return Walk(lines, height, TAPS[:2])


class Scan(torch.autograd.Function):
    """All steps of an LSTM over a map, with their gradients by hand.

    gates `[D, P, B, 4h]` (the input-to-state part of every pixel: input, forget and output
    gate, content), weight `[D, taps, h, 4h]` -> hidden states `[D, P, B, h]`, in float32
    whatever the gates come in. By hand because the recurrence is most of the cost, and autograd
    would record and copy every step of it.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, walk: Walk) -> Tensor:
        directions, _, batch, four = gates.shape
        h, count = four // 4, len(walk.steps)
        wide = torch.promote_types(gates.dtype, torch.float32)
        weight = weight.to(wide)
        act = gates.flatten(0, 1).index_select(0, walk.order).to(wide)
        state = act.new_zeros(count + 1, directions, walk.length + 2, batch, h)
        cell = act.new_zeros(count + 1, directions, walk.length, batch, h)
        tanh = act.new_empty(len(act), batch, h)
        for step, (start, low, n) in enumerate(walk.steps):
            a = act[start : start + directions * n].view(directions, n * batch, four)
            for tap, w in zip(walk.taps, weight.unbind(1), strict=True):
                a.baddbmm_(_cells(state[step], low + 1 + tap, n).flatten(1, 2), w)
            a[..., : 3 * h].sigmoid_()
            a[..., 3 * h :].tanh_()
            i, f, o, g = a.view(directions, n, batch, four).chunk(4, -1)
            c = _cells(cell[step + 1], low, n)
            torch.mul(f, _cells(cell[step], low, n), out=c).addcmul_(i, g)
            t = tanh[start : start + directions * n].view_as(c)
            torch.mul(o, torch.tanh(c, out=t), out=_cells(state[step + 1], low + 1, n))
        ctx.save_for_backward(act, state, cell, tanh, weight)
        ctx.walk, ctx.dtype = walk, gates.dtype
        out = state.flatten(0, 2).index_select(0, walk.place)
        return out.view(directions, -1, batch, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        act, state, cell, tanh, weight = ctx.saved_tensors
        walk: Walk = ctx.walk
        directions, _, batch, h = grad.shape
        incoming = grad.flatten(0, 1).index_select(0, walk.order)
        d_act, back = torch.empty_like(act), weight.flatten(1, 2).mT.contiguous()
        d_weight = torch.zeros_like(weight).flatten(1, 2)
        d_state, d_cell = torch.zeros_like(state[0]), torch.zeros_like(cell[0])
        for step in reversed(range(len(walk.steps))):
            start, low, n = walk.steps[step]
            span, shape = slice(start, start + directions * n), (directions, n, batch, -1)
            i, f, o, g = act[span].view(shape).chunk(4, -1)
            di, df, do, dg = d_act[span].view(shape).chunk(4, -1)
            t, dh, dc = tanh[span].view(shape), incoming[span].view(shape), _cells(d_cell, low, n)
            dh += _cells(d_state, low + 1, n)
            torch.mul(dh, t, out=do)
            dc += torch.ops.aten.tanh_backward(dh.mul_(o), t)
            torch.mul(dc, g, out=di)
            torch.mul(dc, _cells(cell[step], low, n), out=df)
            torch.mul(dc, i, out=dg)
            dc *= f  # what is left belongs to the cells of the step before
            a, da = (part[span].view(directions, n * batch, -1) for part in (act, d_act))
            s, ds, t, dt = a[..., : 3 * h], da[..., : 3 * h], a[..., 3 * h :], da[..., 3 * h :]
            torch.ops.aten.sigmoid_backward.grad_input(ds, s, grad_input=ds)
            torch.ops.aten.tanh_backward.grad_input(dt, t, grad_input=dt)
            parts = torch.bmm(da, back).view(directions, n, batch, -1).split(h, -1)
            sources = []
            for tap, part in zip(walk.taps, parts, strict=True):
                before = _cells(d_state, low + 1 + tap, n)
                # tap 0 overwrites what the step after left there; the others then add to it
                before.copy_(part) if tap == 0 else before.add_(part)
                sources.append(_cells(state[step], low + 1 + tap, n).flatten(1, 2))
            d_weight.baddbmm_(torch.cat(sources, -1).mT, da)
        d_gates = d_act.to(ctx.dtype).index_select(0, walk.inverse)
        return d_gates.view(directions, -1, batch, 4 * h), d_weight.view_as(weight), None


def _cells(line: Tensor, low: int, n: int) -> Tensor:
    """Of a line `[D, length, B, h]`: `n` cells from `low` on."""
    return line[:, low : low + n]


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


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step: gates `[n, 4h]` and cells `[n, h]` to hidden states and cells, `[n, h]`."""
    i, f, o, g = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


class RowCache:
    """A Row LSTM while it samples: of the row above its states, of this row what lies left.

    All that the row above adds to this row's gates is known before the row begins.
    """

    def __init__(self, layer: RowLSTM, n: int, width: int) -> None:
        self.layer, self.width = layer, width
        self.kernel = (layer.input_weight * layer.mask)[0]
        features, h = layer.up.out_features, layer.up.in_features
        self.x = self.kernel.new_zeros(width + 1, n, features)  # the first: outside the image
        self.hidden = self.kernel.new_zeros(width + 2, n, h)
        self.cell = self.kernel.new_zeros(width, n, h)

    def begin_row(self) -> None:
        self.above = self.cell.clone()
        gates = self.layer.bias[0]
        for tap, w in zip(TAPS, self.layer.state_weight[0], strict=True):
            gates = gates + self.hidden[1 + tap : 1 + tap + self.width] @ w
        self.gates = gates

    def pixel(self, column: int, x: Tensor) -> Tensor:
        """Features `[n, 2h]`; may be asked again for the same pixel, with more colours known."""
        self.x[column + 1] = x
        inputs = torch.cat([self.x[column], x], -1)
        gates = torch.addmm(self.gates[column], inputs, self.kernel)
        self.hidden[column + 1], self.cell[column] = lstm(gates, self.above[column])
        return x + self.layer.up(self.hidden[column + 1])

    def end_row(self) -> None:
        """Everything of this row is known already."""


class DiagonalCache:
    """A Diagonal BiLSTM while it samples: the left direction's states of the row above and of
    the pixel on the left; the right direction's of the row above.

    The right direction comes to a row from its end, so it walks a row once that is drawn; what
    it finds is wanted in the next row only.
    """

    def __init__(self, layer: DiagonalBiLSTM, n: int, width: int) -> None:
        self.layer, self.width = layer, width
        self.kernel = layer.input_weight * layer.mask
        self.beside, self.over = layer.state_weight.unbind(1)
        features, h = layer.up.out_features, layer.up.in_features
        self.x = self.kernel.new_zeros(width, n, features)
        self.left, self.left_cell, self.right = self.kernel.new_zeros(3, width + 1, n, h)

    def begin_row(self) -> None:
        self.gates = self.layer.bias[0] + self.left[1:] @ self.over[0]

    def pixel(self, column: int, x: Tensor) -> Tensor:
        """Features `[n, 2h]`; may be asked again for the same pixel, with more colours known."""
        self.x[column] = x
        gates = torch.addmm(self.gates[column], x, self.kernel[0])
        gates = gates.addmm_(self.left[column], self.beside[0])
        # index 0 lies outside the image and stays zero
        self.left[column + 1], self.left_cell[column + 1] = lstm(gates, self.left_cell[column])
        return x + self.layer.up(self.left[column + 1] + self.right[column])

    def end_row(self) -> None:
        known = self.layer.bias[1] + self.x @ self.kernel[1] + self.right[:-1] @ self.over[1]
        cell = torch.zeros_like(self.right[-1])  # the last index lies outside the image
        for column in reversed(range(self.width)):
            gates = torch.addmm(known[column], self.right[column + 1], self.beside[1])
            self.right[column], cell = lstm(gates, cell)


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


def draw(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Levels `[n]` of logits `[n, levels]`, by inverting the distribution at `noise` `[n]`."""
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits / temperature).softmax(-1).cumsum(-1) <= noise[:, None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
