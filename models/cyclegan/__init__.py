"""CycleGAN: Zhu, Park, Isola & Efros 2017, "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks".

    G              source domain [B, S, H, W] -> image domain [B, C, H, W], in [-1, 1]
    F              image domain -> source domain; both are ResNets with instance norm and
                   reflection padding
    discriminators one for each domain, image -> a number for each patch [B, 1, h, w]
    losses         discriminators: half of (D(x) - 1)^2 + D(fake)^2, for both domains
                   generators: (D(fake) - 1)^2 for both, + 10 * (|F(G(s)) - s| + |G(F(x)) - x|)
                   + 0.5 * 10 * (|G(x) - x| + |F(s) - s|)

As in the paper: the discriminators see fakes from a pool of the last 50, weights from
N(0, 0.02), Adam with lr 2e-4 and beta1 0.5. No pair is ever seen: the rows of `x` and of
`source` have nothing to do with each other. `reconstruct` is the cycle G(F(x)).

Deviations: the identity loss is there wherever both domains have the same channels (the
paper uses it for some tasks), and nowhere else, for it is not defined there; images under 13
pixels a side are halved once or not at all before the residual blocks, not twice; 2 residual
blocks and 16 channels by default, not 6 or 9 and 64; discriminator patches are 34 pixels wide,
not 70, for images are smaller than the paper's 256; batches are larger than 1, so the pool
turns over within a step, and the fakes that join it are made anew by the generators just updated;
the learning rate does not decay, weights are averaged instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.adversarial import initialise
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.cyclegan.networks import PatchDiscriminator, ResNetGenerator
from models.cyclegan.pool import ImagePool
from models.data import Batch, DataSpec, from_signed, to_signed

SMALLEST = 5  # pixels a side that leave a discriminator at least one patch


class CycleGANConfig(Config):
    width: Positive = 16  # channels of a generator's first layer; doubled at each halving
    residual_blocks: Positive = 2
    discriminator_width: Positive = 32  # channels after the first halving; doubled at each
    patch_layers: Positive = 2  # halvings before the discriminators' output: 16, 34, 70 pixels
    cycle_weight: float = Field(10.0, ge=0)
    identity_weight: float = Field(0.5, ge=0)  # times cycle_weight; needs equal channels
    pool: int = Field(50, ge=0)  # fakes of earlier steps kept for each discriminator; 0: none
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class CycleGAN(GenerativeModel):
    """Translation learnt from two domains without a single pair."""

    Config = CycleGANConfig
    paper = "Zhu et al. 2017, arXiv:1703.10593"
    reconstruction = "cycle"
    conditions = frozenset({"source"})
    training_only = ("image_pool.", "source_pool.")
    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        assert data.source is not None
        (channels, height, width), others = data.shape, data.source.shape[0]
        size = (height, width)
        blocks, wide = config.residual_blocks, config.discriminator_width
        self.to_image = ResNetGenerator(others, channels, size, config.width, blocks)
        self.to_source = ResNetGenerator(channels, others, size, config.width, blocks)
        self.judge_image = PatchDiscriminator(channels, size, wide, config.patch_layers)
        self.judge_source = PatchDiscriminator(others, size, wide, config.patch_layers)
        self.image_pool = ImagePool(config.pool, data.shape)
        self.source_pool = ImagePool(config.pool, data.source.shape)
        self.with_identity = config.identity_weight > 0 and channels == others
        self.apply(initialise)

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if data.modality != "image":
            return super().unsuited(data)
        if data.source is None:
            return "it needs two domains (dataset.name: paired_folder, or dataset.derive)"
        if data.source.aligned:
            return "it learns from two unpaired domains: set dataset.paired: false"
        if data.source.shape[1:] != data.shape[1:]:
            return "both domains must have the same height and width"
        if min(data.shape[1:]) < SMALLEST:
            return f"its discriminators need images of at least {SMALLEST} pixels a side"
        return super().unsuited(data)

    def phases(self) -> tuple[Phase, ...]:
        generators = (self.to_image, self.to_source)
        discriminators = (self.judge_image, self.judge_source)
        return (
            Phase("generators", generators, self.config.generator_optimizer),
            Phase("discriminators", discriminators, self.config.discriminator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        assert batch.source is not None
        image = to_signed(batch.x, self.data.levels)
        source = to_signed(batch.source, self.data.levels)
        if phase == "generators":
            return self._generator_losses(image, source)
        with torch.no_grad():
            fake_image = self.image_pool(self.to_image(source))
            fake_source = self.source_pool(self.to_source(image))
        found: dict[str, Tensor] = {}
        for name, judge, real, fake in (
            ("image", self.judge_image, image, fake_image),
            ("source", self.judge_source, source, fake_source),
        ):
            on_real, on_fake = judge(real).float(), judge(fake).float()
            found[f"{name}_real"], found[f"{name}_fake"] = on_real.mean(), on_fake.mean()
            found[name] = ((on_real - 1).square().mean() + on_fake.square().mean()) / 2
        return {"loss": found["image"] + found["source"], **found}

    def _generator_losses(self, image: Tensor, source: Tensor) -> dict[str, Tensor]:
        n, found = len(image), {}
        if self.with_identity:
            # in one pass with the translation: no layer looks at more than one image
            fake_image, same_image = self.to_image(torch.cat([source, image])).split([n, n])
            fake_source, same_source = self.to_source(torch.cat([image, source])).split([n, n])
            found["identity_image"] = F.l1_loss(same_image.float(), image)
            found["identity_source"] = F.l1_loss(same_source.float(), source)
        else:
            fake_image, fake_source = self.to_image(source), self.to_source(image)
        found["cycle_image"] = F.l1_loss(self.to_image(fake_source).float(), image)
        found["cycle_source"] = F.l1_loss(self.to_source(fake_image).float(), source)
        found["adversarial_image"] = (self.judge_image(fake_image).float() - 1).square().mean()
        found["adversarial_source"] = (self.judge_source(fake_source).float() - 1).square().mean()
        cycle = self.config.cycle_weight
        weights = {"adversarial": 1.0, "cycle": cycle}
        weights["identity"] = cycle * self.config.identity_weight
        parts = [weights[name.split("_")[0]] * value for name, value in found.items()]
        return {"loss": torch.stack(parts).sum(), **found}

    def reconstruct(self, x: Tensor) -> Tensor:
        """There and back again: image to source domain to image."""
        other = self.to_source(to_signed(x, self.data.levels))
        return from_signed(self.to_image(other), self.data.levels)

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
            raise ValueError("cyclegan needs a source to translate")
        if z is not None:
            raise ValueError("cyclegan has no latents: the source decides the image")
        return from_signed(self.to_image(to_signed(source, self.data.levels)), self.data.levels)
