"""The recurrence of both layers: the order in which an LSTM walks over a map, all of its steps with
their gradients, and one step alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TAPS = (0, -1, 1)  # the cells of the line before that a state depends on; diagonals: two of them


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


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step: gates `[n, 4h]` and cells `[n, h]` to hidden states and cells, `[n, h]`."""
    i, f, o, g = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell
