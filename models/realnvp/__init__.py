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
from models.noise import dequantise, randn
from models.realnvp.couplings import (
    checkerboard,
    halves,
    image_couplings,
    point_couplings,
    run,
    run_inverse,
)


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


class RealNVP(GenerativeModel):
    """Multi-scale RealNVP; the latent is the concatenation of what each scale factors out."""

    Config = RealNVPConfig
    paper = "Dinh et al. 2017, arXiv:1605.08803"
    modalities = frozenset({"image", "points"})
    likelihood = "exact"
    channels_last = True
    reconstruction = "encode-decode"
    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        if data.modality == "points":
            self.last = point_couplings(config.point_couplings, config.hidden, config.frequencies)
            self.last_shape = data.shape
            return
        inner, (c, h, w) = (config.width, config.blocks), data.shape
        while h % 2 == 0 and w % 2 == 0 and min(h, w) >= 8:
            self.before.append(
                image_couplings([checkerboard(c, h, w, i) for i in range(3)], *inner)
            )
            c, h, w = 4 * c, h // 2, w // 2
            self.after.append(image_couplings([halves(c, h, w, i) for i in range(3)], *inner))
            c = c // 2
        self.last = image_couplings([checkerboard(c, h, w, i) for i in range(4)], *inner)
        self.last_shape = (c, h, w)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`y` in (0, 1), `[B, *shape]`, to latents `[B, D]` and log|det dz/dy| `[B]`, nats."""
        squeezed = self.config.alpha + (1 - 2 * self.config.alpha) * y
        u = torch.logit(squeezed)
        slope = math.log(1 - 2 * self.config.alpha) - squeezed.log() - torch.log1p(-squeezed)
        log_det = slope.flatten(1).sum(1)
        latents = []
        for before, after in zip(self.before, self.after, strict=True):
            u, gain = run(before, u)
            log_det = log_det + gain
            u, gain = run(after, F.pixel_unshuffle(u, 2))
            log_det = log_det + gain
            out, u = u.chunk(2, 1)
            latents.append(out.flatten(1))
        u, gain = run(self.last, u)
        return torch.cat([*latents, u.flatten(1)], 1), log_det + gain

    def inverse(self, z: Tensor) -> Tensor:
        """Latents `[B, D]` to `y` in (0, 1), `[B, *shape]`: the inverse of `forward`."""
        size = math.prod(self.last_shape)
        rest, u = z[:, :-size], z[:, -size:].reshape(-1, *self.last_shape)
        u = run_inverse(self.last, u)
        for before, after in zip(reversed(self.before), reversed(self.after), strict=True):
            out = rest[:, -u[0].numel() :].reshape(u.shape)
            rest = rest[:, : -u[0].numel()]
            u = F.pixel_shuffle(run_inverse(after, torch.cat([out, u], 1)), 2)
            u = run_inverse(before, u)
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
