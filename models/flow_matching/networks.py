"""The network of points; that of images is `models.unet`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.unet import sinusoids


class Perceptron(nn.Module):
    """`[B, inputs]` and times `[B]` to `[B, inputs]`; the last layer starts at zero."""

    def __init__(self, inputs: int, hidden: int, layers: int, features: int = 32) -> None:
        super().__init__()
        self.features = features
        widths = [inputs + features] + [hidden] * layers
        body = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*body, nn.Linear(hidden, inputs))
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.body[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x, sinusoids(t, self.features).to(x.dtype)], 1))
