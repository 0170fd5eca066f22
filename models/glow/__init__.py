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
kept, but for a floor: scales come smoothly to rest at exp(-LEAST) and deviations at exp(+-LEAST),
where the paper's reach 0, and an inverse that divides by them overflows now and then (Behrmann et
al. 2021, "Understanding and Mitigating Exploding Inverses"); the logit before the flow, which the
paper has not (on digits of 17 levels it saved 0.28 bits per dimension after 500 steps); odd sides
are not squeezed.
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
from models.nn import gather_batch
from models.noise import dequantise, randn

LEAST = 4.0  # bound on the size of a coupling's and of a split's log-scale


class GlowConfig(Config):
    width: Positive = 64  # channels inside the coupling networks
    steps: Positive = 4  # of flow, at each level (the paper's K)
    alpha: float = Field(1e-4, gt=0, lt=0.5)  # keeps the logit finite
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-3, warmup_steps=100, clip_grad_norm=50.0)


class _ActNorm(nn.Module):
    """`[B, C, h, w] -> (u + bias) * exp(log_scale)` per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.measuring = False  # while True, a forward pass first normalises what it is given

    def forward(self, u: Tensor) -> Tensor:
        if self.measuring:
            wide = u.detach().to(self.bias.dtype)
            std, mean = torch.std_mean(wide, (0, 2, 3), correction=0, keepdim=True)
            self.bias.data.copy_(-mean[0])
            self.log_scale.data.copy_(-torch.log(std[0] + 1e-4))
        return (u + self.bias) * self.log_scale.exp()

    def inverse(self, u: Tensor) -> Tensor:
        return u * torch.exp(-self.log_scale) - self.bias


class _InvertibleConv(nn.Module):
    """1x1 convolution by W = P L (U + diag(sign * exp(log_s))); P and the signs stay as drawn."""

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("order", permutation.argmax(1))  # row i of P L is row order[i] of L
        self.register_buffer("sign", upper.diagonal().sign())
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def _factors(self) -> tuple[Tensor, Tensor]:
        unit = torch.diag(torch.ones_like(self.sign))
        diagonal = torch.diag(self.sign * self.log_s.exp())
        return self.lower.tril(-1) + unit, self.upper.triu(1) + diagonal

    def forward(self, u: Tensor) -> Tensor:
        # bf16 would not be the inverse of `inverse`, and the matrix is small
        with torch.autocast(u.device.type, enabled=False):
            lower, upper = self._factors()
            return F.conv2d(u, (lower @ upper)[self.order][:, :, None, None])

    def inverse(self, u: Tensor) -> Tensor:
        lower, upper = self._factors()
        flat = u.flatten(2)[:, self.order.argsort()]
        flat = torch.linalg.solve_triangular(lower, flat, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, flat, upper=True).view_as(u)


class _Step(nn.Module):
    """Actnorm, 1x1 convolution and affine coupling over `[B, C, h, w]`, C >= 2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.mix = _ActNorm(channels), _InvertibleConv(channels)
        self.sizes = [channels // 2, channels - channels // 2]
        self.net = nn.Sequential(
            nn.Conv2d(self.sizes[0], width, 3, padding=1, bias=False),
            _ActNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            _ActNorm(width),
            nn.ReLU(),
            _zero_conv(width, 2 * self.sizes[1]),
        )
        for i in (0, 3):
            nn.init.normal_(self.net[i].weight, std=0.05)  # type: ignore[arg-type]

    def _affine(self, a: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(a).to(a.dtype).chunk(2, 1)
        return _bounded(F.logsigmoid(raw + 2)), shift

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.mix(self.norm(u)).split(self.sizes, 1)
        log_scale, shift = self._affine(a)
        constant = self.norm.log_scale.sum() + self.mix.log_s.sum()
        log_det = log_scale.flatten(1).sum(1) + constant * math.prod(u.shape[2:])
        return torch.cat([a, (b + shift) * log_scale.exp()], 1), log_det

    def inverse(self, u: Tensor) -> Tensor:
        a, b = u.split(self.sizes, 1)
        log_scale, shift = self._affine(a)
        u = torch.cat([a, b * torch.exp(-log_scale) - shift], 1)
        return self.norm.inverse(self.mix.inverse(u))


class _Split(nn.Module):
    """Half of `[B, C, h, w]` leaves, standardised by a Gaussian that depends on what stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = [channels // 2, channels - channels // 2]
        self.prior = _zero_conv(self.sizes[0], 2 * self.sizes[1])

    def _gaussian(self, stays: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.prior(stays).to(stays.dtype).chunk(2, 1)
        return mean, _bounded(log_std)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stays, leaves = u.split(self.sizes, 1)
        mean, log_std = self._gaussian(stays)
        return stays, (leaves - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)

    def inverse(self, stays: Tensor, z: Tensor) -> Tensor:
        mean, log_std = self._gaussian(stays)
        return torch.cat([stays, z * log_std.exp() + mean], 1)


class Glow(GenerativeModel):
    """Multi-scale Glow; the latent is the concatenation of what each level factors out."""

    Config = GlowConfig
    paper = "Kingma & Dhariwal 2018, arXiv:1807.03039"
    likelihood = "exact"
    reconstruction = "encode-decode"
    config: GlowConfig
    initialised: Tensor

    def __init__(self, config: GlowConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        c, h, w = data.shape
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        while h % 2 == 0 and w % 2 == 0 and min(h, w) >= 4:
            if len(self.levels):
                self.splits.append(_Split(c))
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
        norms = [module for module in self.modules() if isinstance(module, _ActNorm)]
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


def _bounded(log_scale: Tensor) -> Tensor:
    """As it is where small, at most `LEAST` in size."""
    return LEAST * torch.tanh(log_scale / LEAST)


def _steps(channels: int, config: GlowConfig) -> nn.ModuleList:
    return nn.ModuleList(_Step(channels, config.width) for _ in range(config.steps))


def _zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
