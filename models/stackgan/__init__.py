"""StackGAN: Zhang et al. 2017, "StackGAN: Text to Photo-realistic Image Synthesis with Stacked
Generative Adversarial Networks".

    text encoder      bytes [B, T] -> e [B, text_dim]
    augmentation      e -> c ~ N(mu(e), sigma(e)^2), [B, condition_dim]; one for each stage
    generator 1       c, z [B, latent_dim] -> image of half the size, [B, C, h, w] in [-1, 1]
    generator 2       c, that image -> [B, C, H, W]: down, c joined in space, residual blocks, up
    discriminators    image, e -> logit [B]: image features joined with the compressed e
    losses            discriminator: -log D(x, e) - (log(1 - D(x, e')) + log(1 - D(G, e))) / 2
                      with e' another row's text, the matching-aware loss of Reed et al. 2016
                      generator: -log D(G, e) + kl_weight * KL(N(mu, sigma^2) || N(0, I))

As in the paper: nearest-neighbour upsampling and 3x3 convolutions; batch norm after every
convolution but a network's first or last; 4x4 convolutions of stride 2 on the
way down; stage II takes no z and has an augmentation of its own; stage II comes down to 16x16
before c is joined (to half of stage I's size where that is smaller, and not below 4x4).

Deviations:
    - The paper's text embedding is a char-CNN-RNN trained beforehand (Reed et al. 2016). Ours
      is learned with the model, in stage I's two phases: embedded bytes, convolutions over the
      characters (dilated in place of the pooling and the recurrence), max and mean over the
      caption, layer norm. In the generator's phase the discriminator's view of the text is
      held fixed, so that no embedding is learned for fooling it.
    - The paper trains stage I first, then stage II. Here both go on side by side, in one loop;
      the gradient of stage II reaches neither stage I nor the text encoder.
    - Stage I has half the sides of stage II (the paper: a quarter); depth follows the image's
      size; two residual blocks, as in the paper at 128x128 (four at 256x256); narrower
      networks and vectors (c 32, not 128; z 64, not 100).
    - The paper's formulas have no mismatch term, only its text; the halves are Reed's.
      A row whose neighbour has the same caption is left out of it.
    - The generators' loss is the non-saturating one; the paper writes log(1 - D).
    - kl_weight (lambda, 1 in the paper) weighs the mean over c's dimensions, not their sum.
    - The learning rate is constant; the paper halves it every 100 epochs and
      names no beta1; ours is 0.5.
    - With given latents `sample` takes c = mu(e), so that they decide the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.adversarial import generator_loss
from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import gather_batch
from models.noise import randn, shard
from models.stackgan.networks import Discriminator, StageOne, StageTwo, TextEncoder


class StackGANConfig(Config):
    latent_dim: Positive = 64
    width: Positive = 16  # channels at the image's full size; doubled at each halving
    text_dim: Positive = 128  # the text's embedding
    condition_dim: Positive = 32  # c, and the text that the discriminators see
    residual_blocks: Positive = 2  # of stage II
    kl_weight: float = Field(1.0, ge=0)  # of the KL's mean over the dimensions of c
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999))


class StackGAN(GenerativeModel):
    """Two conditional GANs, the second on top of the first; four phases a step."""

    Config = StackGANConfig
    paper = "Zhang et al. 2017, arXiv:1612.03242"
    conditions = frozenset({"text"})
    config: StackGANConfig

    def __init__(self, config: StackGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        channels, height, width = data.shape
        size, self.half_size = (height, width), ((height + 1) // 2, (width + 1) // 2)
        self.text_encoder = TextEncoder(config.text_dim)
        dims = {"text_dim": config.text_dim, "condition_dim": config.condition_dim}
        half, width, blocks = self.half_size, config.width, config.residual_blocks
        self.generator_1 = StageOne(channels, half, 2 * width, latent_dim=config.latent_dim, **dims)
        self.generator_2 = StageTwo(channels, half, size, width, residual_blocks=blocks, **dims)
        self.discriminator_1 = Discriminator(channels, half, 2 * width, **dims)
        self.discriminator_2 = Discriminator(channels, size, width, **dims)

    def phases(self) -> tuple[Phase, ...]:
        d, g = self.config.discriminator_optimizer, self.config.generator_optimizer
        return (
            Phase("discriminator_1", (self.discriminator_1, self.text_encoder), d),
            Phase("generator_1", (self.generator_1, self.text_encoder), g),
            Phase("discriminator_2", (self.discriminator_2,), d),
            Phase("generator_2", (self.generator_2,), g),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        assert batch.text is not None
        judge = self.discriminator_1 if phase.endswith("_1") else self.discriminator_2
        if phase.startswith("generator"):
            e = self._encode(batch.text, phase)
            fake, kl = self._generate(e, phase)
            values = generator_loss(judge(judge.features(fake), e.detach()))
            return {
                "loss": values["loss"]
                + self.config.kl_weight * kl.mean() / self.config.condition_dim,
                "adversarial": values["loss"],
                "kl_nats": kl.mean(),
            }
        before, differs = self._neighbour(batch.text)
        both = self._encode(torch.cat([before, batch.text]), phase)
        wrong, e = both[:-1], both[1:]
        with torch.no_grad():
            fake, _ = self._generate(e, phase)
        real = to_signed(batch.x, self.data.levels)
        if phase == "discriminator_1":
            real = F.adaptive_avg_pool2d(real, self.half_size)
        features = judge.features(real)
        return matching_aware_loss(
            judge(features, e), judge(features, wrong), judge(judge.features(fake), e), differs
        )

    def _encode(self, text: Tensor, phase: str) -> Tensor:
        if phase.endswith("_1"):
            return self.text_encoder(text)
        with torch.no_grad():
            return self.text_encoder(text)

    def _generate(self, e: Tensor, phase: str) -> tuple[Tensor, Tensor]:
        """The image that the phase is about, and the KL of its stage's augmentation, `[B]`."""
        z = randn((len(e), self.config.latent_dim), e.device)
        if phase.endswith("_1"):
            return self.generator_1(e, z)
        with torch.no_grad():
            image, _ = self.generator_1(e, z)
        return self.generator_2(e, image)

    def _neighbour(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The row before this worker's first `[1, T]`, and each row's weight `[B]` in the
        mismatch term: 0 where the row before has the same caption; its mean over all workers
        is 1, or 0 where no caption differs."""
        everyone, rank = gather_batch(text), shard()[0]
        before = everyone.roll(1, 0)
        differs = (before != everyone).any(1).float()
        weight = differs / differs.mean().clamp(min=1 / len(everyone))
        mine = slice(rank * len(text), (rank + 1) * len(text))
        return before[mine][:1], weight[mine]

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
        e, image, spread = self._first(n, text, z, temperature)
        return from_signed(self.generator_2(e, image, spread)[0], self.data.levels)

    def stage_one(
        self, n: int, *, text: Tensor, z: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Stage I's samples at the full size (bilinear), uint8 levels `[n, C, H, W]`; seeded
        alike, what `sample` builds upon."""
        _, image, _ = self._first(n, text, z, temperature)
        large = F.interpolate(image.float(), self.data.shape[1:], mode="bilinear")
        return from_signed(large, self.data.levels)

    def _first(
        self, n: int, text: Tensor | None, z: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor, float]:
        """Embedding, stage I's image, and the temperature of the augmentations."""
        if text is None:
            raise ValueError("stackgan draws from captions: give text, [n, T] bytes")
        spread = temperature if z is None else 0.0
        if z is None:
            z = temperature * randn((n, self.config.latent_dim), self.device)
        e = self.text_encoder(text)
        return e, self.generator_1(e, z, spread)[0], spread


def matching_aware_loss(
    real: Tensor, wrong: Tensor, fake: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Of logits `[B]`: real image and its text, real image and another's, fake image and its
    text (Reed et al. 2016, algorithm 1); `weight` `[B]` is the mismatch term's."""
    mismatch = (weight * F.softplus(wrong)).mean()
    return {
        "loss": F.softplus(-real).mean() + 0.5 * (mismatch + F.softplus(fake).mean()),
        "real_probability": real.sigmoid().mean(),
        "mismatch_loss": mismatch,
        "fake_probability": fake.sigmoid().mean(),
    }
