"""DCGAN: Radford, Metz & Chintala 2016, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks".

    generator      z [B, latent_dim] -> [B, C, H, W] in [-1, 1], batch norm and ReLU
    discriminator  [B, C, H, W] -> logit [B, 1], batch norm in all but the first layer
    losses         discriminator: -log D(x) - log(1 - D(G(z)))
                   generator: -log D(G(z)), the non-saturating loss of Goodfellow et al. 2014

As in the paper: weights from N(0, 0.02), Adam with lr 2e-4 and beta1 0.5, real and fake
batches separately through the discriminator. Deviations: depth follows the image's size (at
64x64 it is the paper's, 4x4 and four upsamplings); `width` is a quarter of the paper's by
default; kernels are 4x4 (see `models.adversarial`, where both networks are); z is normal, not
uniform; `reconstruct` inverts the generator by gradient descent on z (Creswell & Bharath
2018), which the paper does not do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.adversarial import (
    ConvDiscriminator,
    ConvGenerator,
    UnconditionalGAN,
    discriminator_loss,
    generator_loss,
    initialise,
)
from models.base import Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.noise import randn


class DCGANConfig(Config):
    latent_dim: Positive = 64
    width: Positive = 32  # channels beside the image; doubled at each halving
    inversion_steps: Positive = 300  # of Adam on z, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class DCGAN(UnconditionalGAN):
    """Generator and discriminator, two phases a step."""

    Config = DCGANConfig
    paper = "Radford et al. 2016, arXiv:1511.06434"
    channels_last = True
    config: DCGANConfig

    def __init__(self, config: DCGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.generator = ConvGenerator(config.latent_dim, config.width, data.shape)
        self.discriminator = ConvDiscriminator(config.width, data.shape)
        self.apply(initialise)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        z = randn((len(batch.x), self.config.latent_dim), batch.x.device)
        if phase == "generator":
            return generator_loss(self.discriminator(self.generator(z)))
        with torch.no_grad():
            fake = self.generator(z)
        real = to_signed(batch.x, self.data.levels)
        return discriminator_loss(self.discriminator(real), self.discriminator(fake))
