"""RealNVP: Dinh, Sohl-Dickstein & Bengio 2017, "Density estimation using Real NVP".

    flow      y [B, C, H, W] in (0, 1) -> logit(alpha + (1 - 2 alpha) y) <-> z [B, C*H*W],
              log|det dz/dy| [B]
    coupling  u' = b*u + (1-b) * (u * exp(s(b*u)) + t(b*u)), s = scale * tanh(.), scale learned
    scales    3 checkerboard couplings, squeeze (2x2 pixels -> 4 channels), 3 channel-wise
              couplings, half of the channels factored out; again while both sides are even
              and halve to >= 4; then 4 checkerboard couplings on what remains
    points    y [B, 2]: couplings in turns over the two coordinates, fully connected networks
    loss      -log p(x) in bits per dimension, uniform dequantisation

Sizes follow the image: 28x28 has two squeezes, 8x8 has one, odd sides have none.

Deviations from the paper: the logit squashes alpha + (1 - 2 alpha) y, symmetric, where the
paper has alpha + (1 - alpha) y, and alpha is 1e-5 where it has 0.05: black is then as wide
as the rest, and no coupling must learn a scale of 50 for it (on 8-bit MNIST 1.46 bits per
dimension where 0.05 had 3.05, after 250 steps); batch normalisation sits inside the residual
networks but not between the couplings, nor is there weight normalisation; the squeeze keeps
torch's channel order (the halves are then the upper and the lower pixels of each 2x2
square); for points, which the paper has not, the networks see sines and cosines of the
coordinate too.
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
from models.nn import BatchNorm2d
from models.noise import dequantise, randn


class RealNVPConfig(Config):
    width: Positive = 32  # channels inside the coupling networks
    blocks: Positive = 1  # residual blocks in each coupling network
    point_couplings: Positive = 16  # for points of the plane: couplings,
    hidden: Positive = 64  # width of their networks' two hidden layers,
    frequencies: int = Field(4, ge=0)  # and sines and cosines of each coordinate they see
    alpha: float = Field(1e-5, gt=0, lt=0.5)  # keeps the logit finite; the paper has 0.05
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-3, weight_decay=5e-5, warmup_steps=100, clip_grad_norm=20.0
    )


class _Residual(nn.Module):
    """Pre-activation residual block, `[B, width, h, w]` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Coupling(nn.Module):
    """Affine coupling over `[B, C, h, w]` or `[B, 2]`.

    `mask` `[C, h, w]` or `[2]` is 1 where the input passes unchanged; `net` gives two values
    for each of the input.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, net: nn.Sequential) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.net = net
        # one for each channel or coordinate; zero here would be a saddle
        self.scale = nn.Parameter(torch.ones(len(mask), *[1] * (mask.ndim - 1)))
        nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]

    def _affine(self, u: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(u * self.mask).to(u.dtype).chunk(2, 1)
        free = 1 - self.mask
        return self.scale * torch.tanh(raw) * free, shift * free

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._affine(u)
        return u * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        log_scale, shift = self._affine(u)
        return (u - shift) * torch.exp(-log_scale)


class RealNVP(GenerativeModel):
    """Multi-scale RealNVP; the latent is the concatenation of what each scale factors out."""

    Config = RealNVPConfig
    paper = "Dinh et al. 2017, arXiv:1605.08803"
    modalities = frozenset({"image", "points"})
    likelihood = "exact"
    reconstruction = "encode-decode"
    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        if data.modality == "points":
            self.last, self.last_shape = _point_couplings(config), data.shape
            return
        c, h, w = data.shape
        while h % 2 == 0 and w % 2 == 0 and min(h, w) >= 8:
            self.before.append(_couplings(config, [_checkerboard(c, h, w, i) for i in range(3)]))
            c, h, w = 4 * c, h // 2, w // 2
            self.after.append(_couplings(config, [_halves(c, h, w, i) for i in range(3)]))
            c = c // 2
        self.last = _couplings(config, [_checkerboard(c, h, w, i) for i in range(4)])
        self.last_shape = (c, h, w)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`y` in (0, 1), `[B, *shape]`, to latents `[B, D]` and log|det dz/dy| `[B]`, nats."""
        squeezed = self.config.alpha + (1 - 2 * self.config.alpha) * y
        u = torch.logit(squeezed)
        slope = math.log(1 - 2 * self.config.alpha) - squeezed.log() - torch.log1p(-squeezed)
        log_det = slope.flatten(1).sum(1)
        latents = []
        for before, after in zip(self.before, self.after, strict=True):
            u, gain = _run(before, u)
            log_det = log_det + gain
            u, gain = _run(after, F.pixel_unshuffle(u, 2))
            log_det = log_det + gain
            out, u = u.chunk(2, 1)
            latents.append(out.flatten(1))
        u, gain = _run(self.last, u)
        return torch.cat([*latents, u.flatten(1)], 1), log_det + gain

    def inverse(self, z: Tensor) -> Tensor:
        """Latents `[B, D]` to `y` in (0, 1), `[B, *shape]`: the inverse of `forward`."""
        size = math.prod(self.last_shape)
        rest, u = z[:, :-size], z[:, -size:].reshape(-1, *self.last_shape)
        u = _run_inverse(self.last, u)
        for before, after in zip(reversed(self.before), reversed(self.after), strict=True):
            out = rest[:, -u[0].numel() :].reshape(u.shape)
            rest = rest[:, : -u[0].numel()]
            u = F.pixel_shuffle(_run_inverse(after, torch.cat([out, u], 1)), 2)
            u = _run_inverse(before, u)
        return (torch.sigmoid(u) - self.config.alpha) / (1 - 2 * self.config.alpha)

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of `y` in (0, 1) under the flow, nats, `[B]`."""
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
        nats = -self.log_prob(batch.x).mean()
        return {"loss": nats / (self.data.dimensions * math.log(2))}  # bits per dimension

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


def _checkerboard(c: int, h: int, w: int, parity: int) -> Tensor:
    mask = (torch.arange(h)[:, None] + torch.arange(w) + parity) % 2
    return mask.float().expand(c, h, w).clone()


def _halves(c: int, h: int, w: int, parity: int) -> Tensor:
    mask = torch.arange(c) < c // 2 if parity % 2 else torch.arange(c) >= c // 2
    return mask.float()[:, None, None].expand(c, h, w).clone()


def _couplings(config: RealNVPConfig, masks: list[Tensor]) -> nn.ModuleList:
    return nn.ModuleList(_Coupling(mask, _convolutions(len(mask), config)) for mask in masks)


def _convolutions(channels: int, config: RealNVPConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, config.width, 3, padding=1),
        *(_Residual(config.width) for _ in range(config.blocks)),
        BatchNorm2d(config.width),
        nn.ReLU(),
        nn.Conv2d(config.width, 2 * channels, 1),
    )


def _point_couplings(config: RealNVPConfig) -> nn.ModuleList:
    """Each moves one coordinate by what the other one is, in turns."""
    masks = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    return nn.ModuleList(
        _Coupling(masks[i % 2], _perceptron(config)) for i in range(config.point_couplings)
    )


def _perceptron(config: RealNVPConfig) -> nn.Sequential:
    """`[B, 2] -> [B, 4]`."""
    return nn.Sequential(
        _Waves(config.frequencies),
        nn.Linear(2 + 4 * config.frequencies, config.hidden),
        nn.SiLU(),
        nn.Linear(config.hidden, config.hidden),
        nn.SiLU(),
        nn.Linear(config.hidden, 4),
    )


class _Waves(nn.Module):
    """Beside `[B, 2]` its sines and cosines, `[B, 2 + 4 * frequencies]`.

    A perceptron of the bare number learns nothing as steep as the borders between modes.
    """

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, u: Tensor) -> Tensor:
        waves = [u * k for k in range(1, self.frequencies + 1)]
        return torch.cat([u, *map(torch.sin, waves), *map(torch.cos, waves)], 1)


def _run(couplings: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    log_det = torch.zeros(len(u), dtype=u.dtype, device=u.device)
    for coupling in couplings.children():
        u, gain = coupling(u)
        log_det = log_det + gain
    return u, log_det


def _run_inverse(couplings: nn.Module, u: Tensor) -> Tensor:
    for coupling in reversed(list(couplings.children())):
        u = coupling.inverse(u)  # type: ignore[operator]
    return u
