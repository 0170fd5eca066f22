"""pix2pix: Isola, Zhu, Zhou & Efros 2017, "Image-to-Image Translation with Conditional
Adversarial Networks".

    generator      source [B, S, H, W] -> image [B, C, H, W] in [-1, 1]: a U-Net, strided
                   convolutions with LeakyReLU(0.2) down, transposed ones with ReLU up, the
                   features of each scale handed across
    discriminator  source beside image [B, S + C, H, W] -> a logit for each patch [B, 1, h, w]
    losses         discriminator: half of -log D(s, x) - log(1 - D(s, G(s)))
                   generator: -log D(s, G(s)) + 100 |x - G(s)|

As in the paper: dropout in the inner decoder layers is the only noise, and stays on when
sampling; batch norm in all layers but the first and the last of both networks; weights from
N(0, 0.02), Adam with lr 2e-4 and beta1 0.5. The source may have other channels than the image.

Deviations: depth follows the image's size, down to 2 pixels (the paper's ends at 1, where
batch norm has nothing to average); `width` is half of the paper's by default; patches are 34
pixels wide, not 70, for images are smaller than the paper's 256; batch norm samples with its
running statistics, not with the test batch's own, so that an image does not depend on its
neighbours; pairs are neither jittered nor mirrored. `temperature` scales dropout's deviation
from its mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.adversarial import discriminator_loss, down, generator_loss, initialise
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import BatchNorm2d, Dropout, Upsample, pyramid

SMALLEST = 5  # pixels a side that leave the discriminator at least one patch


class Pix2PixConfig(Config):
    width: Positive = 32  # channels after the first halving; doubled at each, up to eightfold
    patch_layers: Positive = 2  # halvings before the discriminator's logits: 16, 34, 70 pixels
    dropout: float = Field(0.5, ge=0, lt=1)  # of up to three inner decoder layers
    l1_weight: float = Field(100.0, ge=0)
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class UNet(nn.Module):
    """`[B, inputs, *size] -> [B, outputs, *size]` in [-1, 1]."""

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], width: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = pyramid(size, smallest=2)
        widths = [width * 2 ** min(i, 3) for i in range(len(sizes) - 1)]
        deepest = len(widths) - 1
        self.encoder = nn.ModuleList([down(inputs, widths[0], sizes[0])])
        for i in range(1, len(widths)):
            conv = down(widths[i - 1], widths[i], sizes[i], bias=False)
            self.encoder.append(nn.Sequential(nn.LeakyReLU(0.2), conv, BatchNorm2d(widths[i])))
        self.decoder = nn.ModuleList()
        for i in range(deepest, 0, -1):
            doubled = widths[i] * (1 if i == deepest else 2)
            up = Upsample(doubled, widths[i - 1], sizes[i], bias=False)
            self.decoder.append(nn.Sequential(nn.ReLU(), up, BatchNorm2d(widths[i - 1])))
        doubled = widths[0] * (2 if deepest else 1)
        self.decoder.append(nn.Sequential(nn.ReLU(), Upsample(doubled, outputs, sizes[0])))
        self.dropout = Dropout(dropout, always=True)
        self.noisy = min(3, deepest)  # never the outermost layer: its noise would be in pixels

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)
        for i, layer in enumerate(self.decoder):
            skip = skips.pop()
            x = layer(torch.cat([x, skip], 1) if i else skip)
            if i < self.noisy and temperature:
                x = torch.lerp(x, self.dropout(x), temperature)
        return x.tanh()


class PatchDiscriminator(nn.Sequential):
    """`[B, inputs, *size] -> [B, 1, h, w]`, a logit for each patch."""

    def __init__(self, inputs: int, size: tuple[int, int], width: int, halvings: int) -> None:
        sizes = pyramid(size, smallest=3)[:-1][:halvings]
        layers: list[nn.Module] = [down(inputs, width, sizes[0]), nn.LeakyReLU(0.2)]
        for i, side in enumerate(sizes[1:], 1):
            conv = down(width * 2 ** (i - 1), width * 2**i, side, bias=False)
            layers += [conv, BatchNorm2d(width * 2**i), nn.LeakyReLU(0.2)]
        inner = width * 2 ** len(sizes)
        super().__init__(
            *layers,
            nn.Conv2d(inner // 2, inner, 4, padding=1, bias=False),
            BatchNorm2d(inner),
            nn.LeakyReLU(0.2),
            nn.Conv2d(inner, 1, 4, padding=1),
        )


class Pix2Pix(GenerativeModel):
    """Translation learnt from aligned pairs."""

    Config = Pix2PixConfig
    paper = "Isola et al. 2017, arXiv:1611.07004"
    conditions = frozenset({"source"})
    config: Pix2PixConfig

    def __init__(self, config: Pix2PixConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        assert data.source is not None
        (channels, height, width), inputs = data.shape, data.source.shape[0]
        size = (height, width)
        self.generator = UNet(inputs, channels, size, config.width, config.dropout)
        self.discriminator = PatchDiscriminator(
            inputs + channels, size, config.width, config.patch_layers
        )
        self.apply(initialise)

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if data.source is None:
            return super().unsuited(data)
        if not data.source.aligned:
            return "it learns from pairs, and the data hides them (set dataset.paired: true)"
        if data.source.shape[1:] != data.shape[1:]:
            return "source and image must have the same height and width"
        if min(data.shape[1:]) < SMALLEST:
            return f"its discriminator needs images of at least {SMALLEST} pixels a side"
        return super().unsuited(data)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("discriminator", (self.discriminator,), self.config.discriminator_optimizer),
            Phase("generator", (self.generator,), self.config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        assert batch.source is not None
        source = to_signed(batch.source, self.data.levels)
        real = to_signed(batch.x, self.data.levels)
        if phase == "generator":
            fake = self.generator(source)
            adversarial = generator_loss(self._judge(source, fake))["loss"]
            l1 = F.l1_loss(fake.float(), real)
            loss = adversarial + self.config.l1_weight * l1
            return {"loss": loss, "adversarial": adversarial, "l1": l1}
        with torch.no_grad():
            fake = self.generator(source)
        found = discriminator_loss(self._judge(source, real), self._judge(source, fake))
        return {**found, "loss": found["loss"] / 2}  # the paper's, to slow the discriminator

    def _judge(self, source: Tensor, image: Tensor) -> Tensor:
        return self.discriminator(torch.cat([source, image], 1))

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
            raise ValueError("pix2pix needs a source to translate")
        if z is not None:
            raise ValueError("pix2pix has no latents: its noise is dropout")
        image = self.generator(to_signed(source, self.data.levels), temperature)
        return from_signed(image, self.data.levels)
