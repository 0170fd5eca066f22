"""torchcfm: flow matching in the loop of its MNIST example."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import transforms

from benchmarks.peers import Clock, Peer, count, endless, loader, nearest


def torchcfm(model: Any, root: Path, batch: int, *, own: bool = False) -> Peer:
    """The loop of torchcfm's MNIST example, with our U-Net or with its own of a like size."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel

    net: nn.Module = model.net
    if own:
        net = nearest(
            lambda w: UNetModel(dim=(1, 28, 28), num_channels=w, num_res_blocks=1),
            (32, 64),  # its norms have 32 groups
            count(model),
        )
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), model.config.optimizer.lr)
    batches = loader(root, batch, transforms.Normalize((0.5,), (0.5,)))

    def train(steps: int) -> float:
        clock = Clock(batch)
        for x1, _ in itertools.islice(endless(batches), steps):
            optimizer.zero_grad()
            x0 = torch.randn_like(x1)
            t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
            vt = net(t, xt) if own else net(xt, 1000 * t)
            loss = torch.mean((vt - ut) ** 2)
            loss.backward()
            optimizer.step()
            clock.tick()
        return clock.rate()

    return Peer("torchcfm, its own U-Net" if own else "torchcfm", count(net), train)
