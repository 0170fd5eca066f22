"""normflows: its RealNVP and its Glow in the loop of its examples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Clock, Peer, count, endless, loader


def normflows(model: Any, root: Path, batch: int) -> Peer:
    """normflows' RealNVP or Glow of our sizes, in the loop of its examples."""
    import normflows as nf

    glow = type(model).__name__ == "Glow"
    levels = _glow_blocks(model, nf) if glow else _couplings(model, nf)
    shapes = [shape for _, shape in levels]
    bases = [nf.distributions.DiagGaussian(shape, trainable=False) for shape in shapes]
    merges = [nf.flows.Merge() for _ in levels[1:]]
    logit = nf.transforms.Logit(model.config.alpha)
    flow = nf.MultiscaleFlow(bases, [f for f, _ in levels], merges, logit, class_cond=False)
    batches = loader(root, batch, nf.utils.Scale(255.0 / 256.0), nf.utils.Jitter(1 / 256.0))
    settings = model.config.optimizer
    optimizer = torch.optim.Adam(flow.parameters(), settings.lr, weight_decay=settings.weight_decay)

    def train(steps: int) -> float:
        clock = Clock(batch)
        for x, _ in itertools.islice(endless(batches), steps):
            optimizer.zero_grad()
            loss = flow.forward_kld(x)
            if ~(torch.isnan(loss) | torch.isinf(loss)):
                loss.backward()
                optimizer.step()
            clock.tick()
        return clock.rate()

    return Peer("normflows", count(flow), train)


class _Half(nn.Module):
    """The scale or the shift of a network that gives both, and is run once for the two of them."""

    def __init__(self, net: nn.Module, known: list[Tensor], *, scale: bool) -> None:
        super().__init__()
        self.net = net if scale else None
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        if self.net is None:
            return self.known.pop()
        raw, shift = self.net(x).chunk(2, 1)
        self.known.append(shift)
        return torch.tanh(raw)


def _couplings(model: Any, nf: Any) -> list[tuple[list[Any], tuple[int, ...]]]:
    """normflows' masked couplings over our masks, with networks of ours; coarsest level first."""

    def flows(couplings: Any) -> list[Any]:
        found = []
        for coupling in couplings:
            known: list[Tensor] = []
            scale, shift = (_Half(coupling.net, known, scale=first) for first in (True, False))
            found.append(nf.flows.MaskedAffineFlow(coupling.mask, shift, scale))
        return found[::-1]  # they are written from the latents to the data

    levels: list[tuple[list[Any], tuple[int, ...]]] = [(flows(model.last), model.last_shape)]
    shape = model.last_shape
    for before, after in zip(reversed(model.before), reversed(model.after), strict=True):
        levels.append(([*flows(after), nf.flows.Squeeze(), *flows(before)], shape))
        shape = (shape[0] // 2, 2 * shape[1], 2 * shape[2])
    return levels


def _glow_blocks(model: Any, nf: Any) -> list[tuple[list[Any], tuple[int, ...]]]:
    """normflows' Glow blocks, as many and as wide as ours; coarsest level first."""
    shape, levels = model.last_shape, []
    for number in range(len(model.levels)):  # the last level keeps all, the others lose a half
        channels = shape[0] if number == 0 else 2 * shape[0]
        blocks = [
            nf.flows.GlowBlock(channels, model.config.width, split_mode="channel", net_actnorm=True)
            for _ in range(model.config.steps)
        ]
        levels.append(([*blocks, nf.flows.Squeeze()], shape))
        shape = (channels // 4, 2 * shape[1], 2 * shape[2])
    return levels
