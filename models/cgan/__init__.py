"""Conditional GAN: Mirza & Osindero 2014, "Conditional Generative Adversarial Nets", on DCGAN's
body (Radford et al. 2016).

    y              class numbers [B] as one-hot rows, or attributes [B, A] as they are
    generator      z and an embedding of y, concatenated [B, latent_dim + embedding_dim]
                   -> [B, C, H, W] in [-1, 1]
    discriminator  [B, C, H, W] and y -> logit [B, 1], by `conditioning`:
                   "projection": head(phi(x)) + <embed(y), phi(x)> (Miyato & Koyama 2018, eq. 3)
                   "embedding":  y embedded as one more map of the image, as Mirza & Osindero
                                 feed y to the discriminator as an input
    losses         discriminator: -log D(x|y) - log(1 - D(G(z|y)|y)), eq. 2 of the paper
                   generator: -log D(G(z|y)|y), non-saturating

An embedding is a linear map of y, so that classes and attributes are served alike; fake images
are made for the labels of the real batch, so both follow the data's distribution of labels.

Deviations: convolutional networks with batch norm instead of fully connected ones with maxout;
z is normal, not uniform; Adam instead of SGD, its rate chosen for 2,000 steps; the projection,
the default, is not this paper's. Miyato & Koyama sum phi over positions and normalise
spectrally; here phi is flattened (its mean over positions learned the classes too slowly),
and batch norm is DCGAN's. Depth and kernels as in `models.adversarial`; there is no reconstruction.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adversarial import (
    ConvDiscriminator,
    ConvGenerator,
    discriminator_loss,
    generator_loss,
    initialise,
)
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.noise import randn, random_labels


class CGANConfig(Config):
    latent_dim: Positive = 64
    embedding_dim: Positive = 16  # of the label, beside z
    width: Positive = 32  # channels beside the image; doubled at each halving
    conditioning: Literal["projection", "embedding"] = "projection"  # of the discriminator
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.5, 0.999))


class CGAN(GenerativeModel):
    """Two networks that both see the label, two phases a step."""

    Config = CGANConfig
    paper = "Mirza & Osindero 2014, arXiv:1411.1784"
    conditions = frozenset({"label"})
    config: CGANConfig

    def __init__(self, config: CGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.generator = ConditionalGenerator(config, data)
        self.discriminator = ConditionalDiscriminator(config, data)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if batch.label is None:
            raise ValueError("training needs a label with each image")
        y = label_rows(batch.label, self.data)
        z = randn((len(batch.x), self.config.latent_dim), batch.x.device)
        if phase == "generator":
            return generator_loss(self.discriminator(self.generator(z, y), y))
        with torch.no_grad():
            fake = self.generator(z, y)
        real = to_signed(batch.x, self.data.levels)
        return discriminator_loss(self.discriminator(real, y), self.discriminator(fake, y))

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
        if label is None:
            label = random_labels(n, self.data, self.device)
        if z is None:
            z = temperature * randn((n, self.config.latent_dim), self.device)
        y = label_rows(label.to(self.device), self.data)
        return from_signed(self.generator(z, y), self.data.levels)


class ConditionalGenerator(nn.Module):
    """z `[B, latent_dim]`, y `[B, Y]` -> `[B, C, H, W]` in [-1, 1]."""

    def __init__(self, config: CGANConfig, data: DataSpec) -> None:
        super().__init__()
        # far below z: a label's gradients agree from step to step while those of z cancel, and
        # at the scale of z the label soon drowns it: one image for each class
        self.embed = _embedding(data, config.embedding_dim, std=0.1)
        inputs = config.latent_dim + config.embedding_dim
        self.body = ConvGenerator(inputs, config.width, data.shape).apply(initialise)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.body(torch.cat([z, self.embed(y)], 1))


class ConditionalDiscriminator(nn.Module):
    """x `[B, C, H, W]`, y `[B, Y]` -> logit `[B, 1]`."""

    def __init__(self, config: CGANConfig, data: DataSpec) -> None:
        super().__init__()
        channels, *side = data.shape
        self.projects = config.conditioning == "projection"
        extra = 0 if self.projects else 1
        body = ConvDiscriminator(config.width, (channels + extra, *side))
        self.body = body.apply(initialise)
        if self.projects:
            self.embed = _embedding(data, body.width_out, std=0.02)
        else:
            self.embed = _embedding(data, math.prod(side), std=1.0)  # the scale of pixels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.projects:
            extra_map = self.embed(y).view(len(x), 1, *x.shape[2:])
            return self.body(torch.cat([x, extra_map], 1))
        phi = self.body.features(x)
        match = (self.embed(y).float() * phi.float()).sum(1, keepdim=True)
        return self.body[-1](phi).float() + match


def label_rows(label: Tensor, data: DataSpec) -> Tensor:
    """Labels as rows of 0 and 1, float `[B, Y]`: one-hot classes, or attributes as they are."""
    if not data.attributes:
        label = F.one_hot(label, len(data.classes))
    return label.to(torch.get_default_dtype())


def _embedding(data: DataSpec, outputs: int, *, std: float) -> nn.Linear:
    """A linear map of a label's row, initially from N(0, std)."""
    embed = nn.Linear(len(data.attributes) or len(data.classes), outputs, bias=False)
    nn.init.normal_(embed.weight, 0.0, std)
    return embed
