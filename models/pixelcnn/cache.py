"""What `sample` keeps from pixel to pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.data import DataSpec, to_signed
from models.pixelcnn.layers import Layer, Masked, gated


class Cache:
    """The maps of both stacks for `n` images in the making.

    Of the vertical stack all rows so far, padded as its convolutions want; of the horizontal
    stack the row in work, padded on the left. Matrices, buffers and the views of each column
    are made once: a layer of a pixel then costs five small operations, not one of them a copy.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        hidden: Masked,
        output: Masked,
        data: DataSpec,
        n: int,
        label: Tensor | None,
    ) -> None:
        """Of the model's `layers` and of the two convolutions of its head."""
        _, height, width = data.shape
        p, like, self.levels = hidden.in_channels, hidden.weight, data.levels
        self.layers: list[Layer] = list(layers)  # type: ignore[arg-type]
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
        self.hidden = hidden.bias, _matrix(hidden)
        self.output = output.bias, _matrix(output)

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
                self.above[i + 1][:, :, row + top, left : left + width] = gated(v)[:, :, 0]

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


def _matrix(conv: Masked, *, with_bias: bool = False) -> Tensor:
    """Masked weights for pixels laid out one after the other, `[in, out]`; bias as a last row."""
    weight = conv.masked[:, :, 0].permute(2, 1, 0).flatten(0, 1)
    return torch.cat([weight, conv.bias[None]]) if with_bias else weight.contiguous()
