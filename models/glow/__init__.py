"""Glow: Kingma & Dhariwal 2018, "Glow: Generative Flow with Invertible 1x1 Convolutions".

    flow      y [B, C, H, W] in [0, 1] -> logit(alpha + (1 - 2 alpha) y) <-> z [B, C*H*W],
              log|det dz/dy| [B]
    step      actnorm, invertible 1x1 convolution in LU form, affine coupling over channels:
              of u = (a, b), a passes and b' = (b + t(a)) * sigmoid(r(a) + 2)
    levels    squeeze (2x2 pixels -> 4 channels), `steps` steps, half of the channels factored
              out under a Gaussian whose mean and scale a convolution reads off the other half;
              again while both sides are even and >= 4; the last half is N(0, I)
    loss      -log p(x) in bits per dimension, uniform dequantisation

`z` holds what is factored out after its own prior's mean and scale are taken away, so all of
it is standard normal and `temperature` scales it alike at all levels. Sizes follow the image:
28x28 has two levels, 8x8 has two, odd sides have one without a squeeze.

Actnorm takes its first values from the whole first training batch of all workers, and a flag
among the buffers says that it has: before that, it is the identity.

Deviations from the paper: far smaller networks (the paper has width 512 and 32 steps of each of 3
levels); no label; the top prior is the fixed standard normal, without the paper's optional
learned one; the networks' last convolutions are plain ones at zero, without the per-channel gain
of the authors' code, whose sigmoid(r + 2) and whose actnorm inside the coupling networks are
kept, but for a floor: scales come smoothly to rest at exp(-LEAST) and deviations at exp(+-LEAST)
(`steps.py`), where the paper's reach 0, and an inverse that divides by them overflows now and then
(Behrmann et al. 2021, "Understanding and Mitigating Exploding Inverses"); the logit before the
flow, which the paper has not (on digits of 17 levels it saved 0.28 bits per dimension after 500
steps); odd sides are not squeezed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_unit
from models.glow.steps import ActNorm, Split, Step
from models.nn import gather_batch
from models.noise import dequantise, randn


class GlowConfig(Config):
    width: Positive = 64  # channels inside the coupling networks
    steps: Positive = 4  # of flow, at each level (the paper's K)
    alpha: float = Field(1e-4, gt=0, lt=0.5)  # keeps the logit finite
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-3, warmup_steps=100, clip_grad_norm=50.0)


class Glow(GenerativeModel):
    """Multi-scale Glow; the latent is the concatenation of what each level factors out."""

    Config = GlowConfig
    paper = "Kingma & Dhariwal 2018, arXiv:1807.03039"
    likelihood = "exact"
    channels_last = True
    reconstruction = "encode-decode"
    config: GlowConfig
    initialised: Tensor

    def __init__(self, config: GlowConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        c, h, w = data.shape
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        while h % 2 == 0 and w % 2 == 0 and min(h, w) >= 4:
            if len(self.levels):
                self.splits.append(Split(c))
                c //= 2
            c, h, w = 4 * c, h // 2, w // 2
            self.levels.append(_steps(c, config))
        self.squeezes = len(self.levels) > 0
        if not self.squeezes:
            self.levels.append(_steps(c, config))
        self.last_shape = (c, h, w)
        self.register_buffer("initialised", torch.tensor(False))

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if reason := super().unsuited(data):
            return reason
        c, h, w = data.shape
        if c == 1 and (h % 2 or w % 2 or min(h, w) < 4):
            return "it couples channels, and one channel of odd sides has no second half"
        return None

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`y` in [0, 1], `[B, C, H, W]`, to latents `[B, D]` and log|det dz/dy| `[B]`, nats."""
        squeezed = self.config.alpha + (1 - 2 * self.config.alpha) * y
        u, latents = torch.logit(squeezed), []
        slope = math.log(1 - 2 * self.config.alpha) - squeezed.log() - torch.log1p(-squeezed)
        log_det = slope.flatten(1).sum(1)
        for i, steps in enumerate(self.levels):
            if i:
                u, out, gain = self.splits[i - 1](u)
                latents.append(out.flatten(1))
                log_det = log_det + gain
            if self.squeezes:
                u = F.pixel_unshuffle(u, 2)
            for step in steps.children():
                u, gain = step(u)
                log_det = log_det + gain
        return torch.cat([*latents, u.flatten(1)], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Latents `[B, D]` to `y`, `[B, C, H, W]`: the inverse of `forward`."""
        c, h, w = self.last_shape
        rest, u = z[:, : -c * h * w], z[:, -c * h * w :].reshape(-1, c, h, w)
        for i, steps in reversed(list(enumerate(self.levels))):
            for step in reversed(list(steps.children())):
                u = step.inverse(u)  # type: ignore[operator]
            if self.squeezes:
                u = F.pixel_shuffle(u, 2)
            if i:
                out, rest = rest[:, -u[0].numel() :], rest[:, : -u[0].numel()]
                u = self.splits[i - 1].inverse(u, out.reshape(u.shape))  # type: ignore[operator]
        return (torch.sigmoid(u) - self.config.alpha) / (1 - 2 * self.config.alpha)

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of `y` in [0, 1) under the flow, nats, `[B]`."""
        z, log_det = self(y)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """log P(x) >= log of the mean of p(x + u) over `samples` draws of dequantisation noise."""
        total: Tensor | None = None  # running log-sum, so that memory does not grow with samples
        for _ in range(samples):
            y, volume = dequantise(x, self.data.levels)
            draw = self.log_density(y) + volume
            total = draw if total is None else torch.logaddexp(total, draw)
        assert total is not None
        return total - math.log(samples)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if self.training and not self.initialised:
            self._initialise(batch.x)
        nats = -self.log_prob(batch.x).mean()
        return {"loss": nats / (self.data.dimensions * math.log(2))}  # bits per dimension

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        """Every actnorm to zero mean and unit variance on this batch, in the order of the flow.

        Each worker passes the rows of all, so that all arrive at the same weights.
        """
        y = gather_batch(dequantise(x, self.data.levels)[0])
        norms = [module for module in self.modules() if isinstance(module, ActNorm)]
        for norm in norms:
            norm.measuring = True
        self(y)
        for norm in norms:
            norm.measuring = False
        self.initialised.fill_(True)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode the middle of each level's bin and decode: exact up to rounding."""
        y = (x.to(torch.get_default_dtype()) + 0.5) / self.data.levels
        return self._levels(self.inverse(self(y)[0]))

    @property
    def latent_dim(self) -> int:
        return self.data.dimensions

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
        if z is None:
            z = temperature * randn((n, self.data.dimensions), self.device)
        return self._levels(self.inverse(z))

    def _levels(self, y: Tensor) -> Tensor:
        return from_unit(y, self.data.levels)


def _steps(channels: int, config: GlowConfig) -> nn.ModuleList:
    return nn.ModuleList(Step(channels, config.width) for _ in range(config.steps))
