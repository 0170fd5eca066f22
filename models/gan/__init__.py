"""GAN: Goodfellow et al. 2014, "Generative Adversarial Nets".

    generator      z [B, latent_dim] -> ReLU layers -> tanh -> [B, C, H, W] in [-1, 1]
    discriminator  [B, C, H, W] -> LeakyReLU layers with dropout -> logit [B, 1]
    losses         discriminator: -log D(x) - log(1 - D(G(z))), the negative of eq. 1
                   generator, "nonsaturating": -log D(G(z))
                   generator, "minimax":       log(1 - D(G(z))), eq. 1

Both networks are fully connected and without normalisation, as the paper's for MNIST. The
non-saturating loss is the paper's own advice (end of section 3) and what it trained with.

Deviations: LeakyReLU (0.2) instead of maxout in the discriminator; tanh, which is the paper's
sigmoid on the scale [-1, 1] (with weights twice as large); Adam instead of SGD with rising
momentum and falling rate, its rate chosen for 2,000 steps (for many more, lower it); z is
normal, not uniform; torch's default initial weights; one size for all hidden layers;
`reconstruct` inverts the generator by gradient descent on z (Creswell & Bharath 2018).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.adversarial import UnconditionalGAN, discriminator_loss, generator_loss
from models.base import Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.nn import Dropout
from models.noise import randn


class GANConfig(Config):
    latent_dim: Positive = 64
    hidden: Positive = 256  # units of each hidden layer, of both networks
    layers: Positive = 2  # hidden layers of each network
    dropout: float = Field(0.3, ge=0, lt=1)  # after each hidden layer of the discriminator
    loss: Literal["minimax", "nonsaturating"] = "nonsaturating"  # the generator's
    inversion_steps: Positive = 300  # of Adam on z, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.5, 0.999))


class GAN(UnconditionalGAN):
    """Two fully connected networks, two phases a step."""

    Config = GANConfig
    paper = "Goodfellow et al. 2014, arXiv:1406.2661"
    config: GANConfig

    def __init__(self, config: GANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        pixels = math.prod(data.shape)
        widths = [config.hidden] * config.layers
        generator: list[nn.Module] = []
        discriminator: list[nn.Module] = [nn.Flatten()]
        for i, width in enumerate(widths):
            inner = width if i else config.latent_dim
            generator += [nn.Linear(inner, width), nn.ReLU()]
            inner = width if i else pixels
            discriminator += [nn.Linear(inner, width), nn.LeakyReLU(0.2), Dropout(config.dropout)]
        self.generator = nn.Sequential(
            *generator, nn.Linear(config.hidden, pixels), nn.Tanh(), nn.Unflatten(1, data.shape)
        )
        self.discriminator = nn.Sequential(*discriminator, nn.Linear(config.hidden, 1))

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        z = randn((len(batch.x), self.config.latent_dim), batch.x.device)
        if phase == "generator":
            fake = self.discriminator(self.generator(z))
            return minimax_loss(fake) if self.config.loss == "minimax" else generator_loss(fake)
        with torch.no_grad():
            fake = self.generator(z)
        real = to_signed(batch.x, self.data.levels)
        return discriminator_loss(self.discriminator(real), self.discriminator(fake))


def minimax_loss(fake: Tensor) -> dict[str, Tensor]:
    """log(1 - D(G(z))) of logits: the generator's side of eq. 1, flat where D is sure."""
    return {"loss": -F.softplus(fake.float()).mean()}
