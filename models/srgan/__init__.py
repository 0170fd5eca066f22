"""SRGAN: Ledig et al. 2017, "Photo-Realistic Single Image Super-Resolution Using a Generative
Adversarial Network".

    generator      small [B, C, h, w] -> [B, C, r h, r w], r = 2 or 4: SRResNet, residual blocks
                   of batch norm and PReLU, a skip around them all, one sub-pixel convolution
                   (Shi et al. 2016) for each doubling
    discriminator  [B, C, H, W] -> logit [B, 1]: pairs of 3x3 convolutions as in VGG, the
                   second with stride 2, LeakyReLU(0.2), batch norm in all but the first
    losses         discriminator: -log D(x) - log(1 - D(G(s)))
                   generator: content + 1e-3 * -log D(G(s))

With `adversarial_weight: 0` it is SRResNet: content alone, no discriminator, one phase.

The content is the squared (or absolute) error of pixels in [-1, 1]: the paper's SRGAN-MSE
and SRResNet, not its SRGAN-VGG, whose loss is in features of a network trained on ImageNet.
Other deviations: generator and discriminator start together, where the paper first trains
SRResNet for a million steps; 4 residual blocks and 32 channels, not 16 and 64; Adam with
lr 1e-3 for the generator and 2e-4 for the discriminator, not 1e-4, for training is a
thousandth of the paper's; the number of strided convolutions follows the image's size; the
small image is what the data says, whatever made it small, and is scaled to [-1, 1], not [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.adversarial import discriminator_loss, generator_loss
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import BatchNorm2d, pyramid


class SRGANConfig(Config):
    width: Positive = 32  # channels of the generator, and of the discriminator's first layer
    blocks: Positive = 4  # residual blocks
    content: Literal["mse", "l1"] = "mse"
    adversarial_weight: float = Field(1e-3, ge=0)  # 0: SRResNet, there is no discriminator
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SRResNet(nn.Module):
    """`[B, C, h, w] -> [B, C, 2^doublings h, 2^doublings w]`."""

    def __init__(self, channels: int, width: int, blocks: int, doublings: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(channels, width, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(
            *[ResidualBlock(width) for _ in range(blocks)],
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
        )
        layers: list[nn.Module] = []
        for _ in range(doublings):
            layers += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]
        self.tail = nn.Sequential(*layers, nn.Conv2d(width, channels, 9, padding=4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


class VGGDiscriminator(nn.Sequential):
    """`[B, *shape] -> [B, 1]`."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        channels, height, breadth = shape
        sizes = pyramid((height, breadth), smallest=2)[:5]  # the paper halves four times
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        ins = width
        for i in range(len(sizes) - 1):
            outs = width * 2**i
            if i:
                layers += _block(ins, outs, 1)
            layers += _block(outs, outs, 2)
            ins = outs
        flat, hidden = ins * math.prod(sizes[-1]), 16 * width
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, BatchNorm2d(outputs), nn.LeakyReLU(0.2)]


class SRGAN(GenerativeModel):
    """Super-resolution by 2 or 4, whichever the data asks for."""

    Config = SRGANConfig
    paper = "Ledig et al. 2017, arXiv:1609.04802"
    conditions = frozenset({"source"})
    config: SRGANConfig

    def __init__(self, config: SRGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        assert data.source is not None
        doublings = int(math.log2(data.shape[1] // data.source.shape[1]))
        self.generator = SRResNet(data.shape[0], config.width, config.blocks, doublings)
        if config.adversarial_weight:
            self.discriminator = VGGDiscriminator(data.shape, config.width)

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if data.modality != "image":
            return super().unsuited(data)
        if data.source is None or data.source.kind != "low_resolution":
            return "it enlarges small images (set dataset.derive: low_resolution)"
        if not data.source.aligned:
            return "it learns from pairs, and the data hides them (set dataset.paired: true)"
        channels, *small = data.source.shape
        if channels != data.shape[0]:
            return "the small image must have the channels of the large one"
        if not any(data.shape[1:] == tuple(r * side for side in small) for r in (2, 4)):
            return f"it enlarges by exactly 2 or 4, not {tuple(small)} to {data.shape[1:]}"
        return super().unsuited(data)

    def phases(self) -> tuple[Phase, ...]:
        generator = Phase("generator", (self.generator,), self.config.generator_optimizer)
        if not self.config.adversarial_weight:
            return (generator,)
        options = self.config.discriminator_optimizer
        return (Phase("discriminator", (self.discriminator,), options), generator)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        assert batch.source is not None
        small = to_signed(batch.source, self.data.levels)
        real = to_signed(batch.x, self.data.levels)
        if phase == "discriminator":
            with torch.no_grad():
                fake = self.generator(small)
            return discriminator_loss(self.discriminator(real), self.discriminator(fake))
        fake = self.generator(small)
        distance = F.mse_loss if self.config.content == "mse" else F.l1_loss
        content = distance(fake.float(), real)
        if not self.config.adversarial_weight:
            return {"loss": content, "content": content}
        adversarial = generator_loss(self.discriminator(fake))["loss"]
        loss = content + self.config.adversarial_weight * adversarial
        return {"loss": loss, "content": content, "adversarial": adversarial}

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
            raise ValueError("srgan needs a source to enlarge")
        if z is not None:
            raise ValueError("srgan has no latents: the small image decides the large one")
        return from_signed(self.generator(to_signed(source, self.data.levels)), self.data.levels)
