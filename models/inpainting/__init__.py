"""Context encoder: Pathak, Krähenbühl, Donahue, Darrell & Efros 2016, "Context Encoders:
Feature Learning by Inpainting".

    source         the image with a hole and the hole's mask [B, C + 1, H, W]
    generator      encoder of strided convolutions -> a fully connected layer within each
                   channel, then a 1x1 convolution across them -> decoder of transposed
                   convolutions -> [B, C, H, W] in [-1, 1]
    completed      the source where it is known, the generator's output in the hole
    discriminator  completed image [B, C, H, W] -> logit [B, 1]
    losses         discriminator: -log D(x) - log(1 - D(completed))
                   generator: 0.999 squared error in the hole + 0.001 * -log D(completed)

As in the paper: the loss looks at the hole alone, the discriminator learns ten times more
slowly than the generator (2e-4 and 2e-3), and what is known is copied, never painted. The
hole may be anywhere; it is what the data says.

Deviations: the encoder also sees the mask, and the hole is black, not the mean image; each image
has one hole for the whole training, the data's, where the paper draws a new one each time;
its features are handed across to the decoder scale by scale, which the paper's bottleneck
forbids for the sake of feature learning, and which joins the hole's rim to its surroundings
(`skips: false` is the paper's); the squared error is the mean over each image's hole, so that
holes of any size weigh alike, and has no heavier rim; sizes follow the image's.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from models.adversarial import (
    ConvDiscriminator,
    discriminator_loss,
    down,
    generator_loss,
    initialise,
)
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import BatchNorm2d, Upsample, pyramid


class InpaintingConfig(Config):
    width: Positive = 32  # channels after the first halving; doubled at each, up to eightfold
    skips: bool = True  # hand the encoder's features across; false: the paper's bottleneck
    reconstruction_weight: float = Field(0.999, ge=0)
    adversarial_weight: float = Field(0.001, ge=0)
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class ChannelwiseLinear(nn.Module):
    """`[B, C, h, w] -> [B, C, h, w]`, fully connected within each channel (section 3.1)."""

    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        scale = 1 / math.sqrt(positions)
        self.weight = nn.Parameter(scale * torch.randn(channels, positions, positions))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bcp,cpq->bcq", x.flatten(2), self.weight).view_as(x)


class ContextEncoder(nn.Module):
    """`[B, C + 1, *size] -> [B, C, *size]` in [-1, 1]."""

    def __init__(self, channels: int, size: tuple[int, int], width: int, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        sizes = pyramid(size, smallest=4 if min(size) > 8 else 2)
        widths = [width * 2 ** min(i, 3) for i in range(len(sizes) - 1)]
        deepest = len(widths) - 1
        first = nn.Sequential(down(channels + 1, widths[0], sizes[0]), nn.LeakyReLU(0.2))
        self.encoder = nn.ModuleList([first])
        for i in range(1, len(widths)):
            conv = down(widths[i - 1], widths[i], sizes[i], bias=False)
            self.encoder.append(nn.Sequential(conv, BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)))
        self.middle = nn.Sequential(
            ChannelwiseLinear(widths[-1], math.prod(sizes[-1])),
            nn.Conv2d(widths[-1], widths[-1], 1, bias=False),
            BatchNorm2d(widths[-1]),
            nn.ReLU(),
        )
        self.decoder = nn.ModuleList()
        for i in range(deepest, 0, -1):
            up = Upsample((1 + skips) * widths[i], widths[i - 1], sizes[i], bias=False)
            self.decoder.append(nn.Sequential(up, BatchNorm2d(widths[i - 1]), nn.ReLU()))
        self.decoder.append(Upsample((1 + skips) * widths[0], channels, sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for layer in self.encoder:
            x = layer(x)
            features.append(x)
        x = self.middle(x)
        for layer in self.decoder:
            skip = features.pop()
            x = layer(torch.cat([x, skip], 1) if self.skips else x)
        return x.tanh()


class Inpainting(GenerativeModel):
    """Fills the hole that the data's mask marks."""

    Config = InpaintingConfig
    paper = "Pathak et al. 2016, arXiv:1604.07379"
    conditions = frozenset({"source"})
    config: InpaintingConfig

    def __init__(self, config: InpaintingConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        channels, height, width = data.shape
        self.generator = ContextEncoder(channels, (height, width), config.width, config.skips)
        self.discriminator = ConvDiscriminator(config.width, data.shape)
        self.apply(initialise)

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if data.modality != "image":
            return super().unsuited(data)
        if data.source is None or data.source.kind != "masked":
            return "it fills holes (set dataset.derive: masked)"
        if not data.source.aligned:
            return "it learns from pairs, and the data hides them (set dataset.paired: true)"
        if min(data.shape[1:]) < 4:
            return "its encoder needs images of at least 4 pixels a side"
        return super().unsuited(data)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def hole(self, source: Tensor) -> Tensor:
        """Where pixels are missing, bool `[B, 1, H, W]`."""
        return source[:, -1:] > (self.data.levels - 1) // 2

    def _completed(self, source: Tensor) -> Tensor:
        """The source where it is known, the generator's output elsewhere: floats in [-1, 1]."""
        known = to_signed(source, self.data.levels)
        return torch.where(self.hole(source), self.generator(known).float(), known[:, :-1])

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        assert batch.source is not None
        real = to_signed(batch.x, self.data.levels)
        if phase == "discriminator":
            with torch.no_grad():
                fake = self._completed(batch.source)
            return discriminator_loss(self.discriminator(real), self.discriminator(fake))
        fake, hole = self._completed(batch.source), self.hole(batch.source)
        squared = ((fake - real) * hole).square().flatten(1).sum(1)
        missing = hole.flatten(1).sum(1).clamp(min=1) * real.shape[1]
        reconstruction = (squared / missing).mean()
        adversarial = generator_loss(self.discriminator(fake))["loss"]
        loss = (
            self.config.reconstruction_weight * reconstruction
            + self.config.adversarial_weight * adversarial
        )
        return {"loss": loss, "reconstruction": reconstruction, "adversarial": adversarial}

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
        if source is None:
            raise ValueError("inpainting needs a source with a hole")
        if z is not None:
            raise ValueError("inpainting has no latents: what is known decides the rest")
        painted = from_signed(self.generator(to_signed(source, self.data.levels)), self.data.levels)
        # copied as levels: through floats and back a pixel could change
        return torch.where(self.hole(source), painted, source[:, :-1].to(torch.uint8))
