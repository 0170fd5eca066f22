"""What a layer keeps from pixel to pixel while it samples, and how a level is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from models.pixelrnn.layers import DiagonalBiLSTM, RowLSTM
from models.pixelrnn.lstm import TAPS, lstm


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


def draw(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Levels `[n]` of logits `[n, levels]`, by inverting the distribution at `noise` `[n]`."""
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits / temperature).softmax(-1).cumsum(-1) <= noise[:, None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
