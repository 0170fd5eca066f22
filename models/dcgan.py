"""DCGAN: Radford, Metz & Chintala 2016, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks".

    generator      z [B, latent_dim] -> [B, C, H, W] in [-1, 1]: projection, then transposed
                   convolutions (kernel 4, stride 2) with batch norm and ReLU, tanh
    discriminator  [B, C, H, W] -> logit [B]: strided convolutions with batch norm and
                   LeakyReLU(0.2), none of the norm at the first layer
    losses         discriminator: -log D(x) - log(1 - D(G(z)))
                   generator: -log D(G(z)), the non-saturating loss of Goodfellow et al. 2014

As in the paper: weights from N(0, 0.02), Adam with lr 2e-4 and beta1 0.5, real and fake
batches separately through the discriminator. Deviations: depth follows the image's size (at
64x64 it is the paper's, 4x4 and four upsamplings); `width` is a quarter of the paper's by
default; kernels are 4x4, not 5x5, so that transposed convolutions tile evenly; z is normal,
not uniform; `reconstruct` inverts the generator by gradient descent on z (Creswell & Bharath
2018), which the paper does not do.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import (
    Batch,
    Config,
    DataSpec,
    GenerativeModel,
    OptimizerConfig,
    Phase,
    Positive,
    from_signed,
    randn,
    to_signed,
)
from models.nn import BatchNorm2d, Upsample, pyramid


class DCGANConfig(Config):
    latent_dim: Positive = 64
    width: Positive = 32  # channels beside the image; doubled at each halving
    inversion_steps: Positive = 300  # of Adam on z, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class DCGAN(GenerativeModel):
    """Generator and discriminator, two phases a step."""

    Config = DCGANConfig
    paper = "Radford et al. 2016, arXiv:1511.06434"
    reconstruction = "inversion"
    config: DCGANConfig

    def __init__(self, config: DCGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        channels, height, width = data.shape
        sizes = pyramid((height, width), smallest=4 if min(height, width) > 8 else 2)
        widths = [config.width * 2**i for i in range(len(sizes) - 1)] or [config.width]

        generator: list[nn.Module] = [
            nn.Linear(config.latent_dim, widths[-1] * math.prod(sizes[-1]), bias=False),
            nn.Unflatten(1, (widths[-1], *sizes[-1])),
            BatchNorm2d(widths[-1]),
            nn.ReLU(),
        ]
        for i in range(len(sizes) - 2, 0, -1):
            generator += [
                Upsample(widths[i], widths[i - 1], sizes[i], bias=False),
                BatchNorm2d(widths[i - 1]),
                nn.ReLU(),
            ]
        generator += [Upsample(widths[0], channels, sizes[0]), nn.Tanh()]
        self.generator = nn.Sequential(*generator)

        discriminator: list[nn.Module] = [_down(channels, widths[0], sizes[0])]
        discriminator.append(nn.LeakyReLU(0.2))
        for (outer, inner), size in zip(pairwise(widths), sizes[1:], strict=False):
            discriminator += [
                _down(outer, inner, size, bias=False),
                BatchNorm2d(inner),
                nn.LeakyReLU(0.2),
            ]
        features = widths[-1] * math.prod(sizes[-1])
        self.discriminator = nn.Sequential(*discriminator, nn.Flatten(), nn.Linear(features, 1))
        self.apply(_initialise)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        z = randn((len(batch.x), self.config.latent_dim), batch.x.device)
        if phase == "generator":
            logit = self.discriminator(self.generator(z)).float()
            return {"loss": F.softplus(-logit).mean()}
        with torch.no_grad():
            fake_images = self.generator(z)
        real = self.discriminator(to_signed(batch.x, self.data.levels)).float()
        fake = self.discriminator(fake_images).float()
        return {
            "loss": F.softplus(-real).mean() + F.softplus(fake).mean(),
            "real_probability": real.sigmoid().mean(),
            "fake_probability": fake.sigmoid().mean(),
        }

    def reconstruct(self, x: Tensor) -> Tensor:
        """Invert the generator: Adam on z from the prior's mean, squared error in pixels."""
        target = to_signed(x, self.data.levels)
        with torch.enable_grad():
            z = torch.zeros(len(x), self.config.latent_dim, device=x.device, requires_grad=True)
            descent = torch.optim.Adam([z], lr=0.05)
            for _ in range(self.config.inversion_steps):
                error = (self.generator(z) - target).square().flatten(1).sum(1).sum()
                (z.grad,) = torch.autograd.grad(error, [z])
                descent.step()
        with torch.no_grad():
            return from_signed(self.generator(z), self.data.levels)

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        if z is None:
            z = temperature * randn((n, self.config.latent_dim), self.device)
        return from_signed(self.generator(z), self.data.levels)


def _down(inputs: int, outputs: int, size: tuple[int, int], *, bias: bool = True) -> nn.Module:
    """Convolution (kernel 4, stride 2) that halves `size`, rounding up where a side is odd."""
    odd_h, odd_w = (side % 2 for side in size)
    conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
    return nn.Sequential(nn.ZeroPad2d((0, odd_w, 0, odd_h)), conv) if odd_h or odd_w else conv


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
