"""StyleGAN2: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"; its
adaptive augmentation: Karras et al. 2020b, "Training GANs with Limited Data".

    mapping        z [B, latent_dim], normalised -> w [B, latent_dim]
    synthesis      ws [B, styles, latent_dim] -> [B, C, H, W], around [-1, 1]: a learned constant,
                   demodulated convolutions with noise inputs, colours summed on the way up
    discriminator  [B, C, H, W] -> logit [B, 1]: residual blocks, minibatch standard deviation
    losses         discriminator: -log D(x) - log(1 - D(G(z))); generator: -log D(G(z))
                   r1, every 16 steps: 16 gamma/2 E |dD/dx|^2 (Mescheder et al. 2018)
                   path_length, every 4: 4 weight E (|J^T y| - a)^2, a the running mean

As in the paper: equalised learning rate (0.01 of it in the mapping), the filter [1, 3, 3, 1],
style mixing, lazy regularisation with corrected Adam, shared by a network's phases; truncation.
Deviations: depth follows the image's size (sides halve, rounding up; crops where odd), and widths
suit a CPU. Each example has its own crossover of styles. The learning rate is 8e-3, not 2e-3, for
short runs. Path lengths are scaled as in the authors' code (noise over sqrt(H W), mean over
layers), on the whole batch, not half; their running mean starts at the first batch's, not at 0,
which would collapse a short run. gamma does not follow the resolution. Minibatch groups are
neighbours, the largest divisor of the batch up to 4, so workers form the groups of one worker if
each has a multiple of 4 rows. `temperature` is psi, and scales the noise inputs too: 0 leaves the
mean image. Given `z` decides the sample: noise inputs are off. `reconstruct` is the projection onto
w of appendix D, by squared error for LPIPS, noise inputs off. "ada" has mirroring (optional),
integer translation, brightness, contrast, cutout: no geometric warps (grid_sample has no second
derivative, which R1 needs), hues, filters or pixel noise; p follows each batch, not four, and ten
times as fast, for short runs.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.adversarial import discriminator_loss, generator_loss, invert, uncompiled
from models.base import GenerativeModel, Phase
from models.config import Config, Fraction, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import global_mean, pyramid
from models.noise import rand, randn, shard
from models.stylegan2.augmentation import augment
from models.stylegan2.networks import Equal, Normalise, Synthesis, discriminator
from models.stylegan2.regularisers import lazily, path_lengths, r1_penalty


class StyleGAN2Config(Config):
    latent_dim: Positive = 64  # of z and of w
    mapping_layers: Positive = 4
    width: Positive = 32  # channels beside the image; doubled at each halving, up to
    max_width: Positive = 128
    style_mixing: Fraction = 0.9  # probability of a second style from some layer on
    r1_gamma: float = Field(0.3, ge=0)
    r1_every: Positive = 16
    path_length_weight: float = Field(2.0, ge=0)
    path_length_every: Positive = 4
    augment: Literal["none", "ada"] = "none"
    augment_mirror: bool = False  # left for right, too; not for digits
    augment_images: Positive = 50_000  # real images in which p can go from 0 to 1
    inversion_steps: Positive = 300  # of Adam on w, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=8e-3, betas=(0.0, 0.99))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=8e-3, betas=(0.0, 0.99))


class StyleGAN2(GenerativeModel):
    """Two main phases a step, and the two regularisers' now and then."""

    Config = StyleGAN2Config
    paper = "Karras et al. 2020, arXiv:1912.04958"
    reconstruction = "inversion"
    config: StyleGAN2Config
    w_mean: Tensor
    path_length_mean: Tensor
    augment_p: Tensor

    def __init__(self, config: StyleGAN2Config, data: DataSpec) -> None:
        super().__init__(config, data)
        channels, *side = data.shape
        sizes = pyramid((side[0], side[1]))
        widths = [min(config.width * 2**i, config.max_width) for i in range(len(sizes))]
        layers = [
            Equal(config.latent_dim, config.latent_dim, rate=0.01)
            for _ in range(config.mapping_layers)
        ]
        self.mapping = nn.Sequential(Normalise(), *layers)
        self.synthesis = Synthesis(config.latent_dim, widths[::-1], sizes[::-1], channels)
        self.discriminator = discriminator(widths, sizes, channels)
        self.register_buffer("w_mean", torch.zeros(config.latent_dim))
        for name in ("path_length_mean", "augment_p"):
            self.register_buffer(name, torch.zeros(()))

    def phases(self) -> tuple[Phase, ...]:
        c, g, d = self.config, (self.mapping, self.synthesis), (self.discriminator,)
        g_adam = lazily(c.generator_optimizer, c.path_length_every)
        d_adam = lazily(c.discriminator_optimizer, c.r1_every)
        return (
            Phase("generator", g, g_adam),
            Phase("path_length", g, g_adam, every=c.path_length_every),
            Phase("discriminator", d, d_adam),
            Phase("r1", d, d_adam, every=c.r1_every),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        real = to_signed(batch.x, self.data.levels)
        if phase in ("r1", "path_length"):  # gradients of gradients, in full precision
            with torch.autocast(real.device.type, enabled=False):
                return self._r1_loss(real) if phase == "r1" else self._path_length_loss(len(real))
        if phase == "generator":
            return generator_loss(self._judge(self.synthesis(self._styles(len(real), track=True))))
        with torch.no_grad():
            fake = self.synthesis(self._styles(len(real)))
        logits = self._judge(real)
        losses = discriminator_loss(logits, self._judge(fake))
        if self.config.augment == "ada":
            certainty = global_mean(logits.sign().mean())  # r_t of Karras et al. 2020b
            step = len(real) * shard()[1] / self.config.augment_images
            self.augment_p += (certainty - 0.6).sign() * step
            self.augment_p.clamp_(0, 1)
            losses |= {"certainty": certainty, "augment_p": self.augment_p.clone()}
        return losses

    # Both add their networks' output times 0: where the penalty does not depend on a parameter,
    # its gradient is then 0 and not missing, and Adam takes the same step on any number of workers.

    @uncompiled
    def _r1_loss(self, real: Tensor) -> dict[str, Tensor]:
        penalty, logits = r1_penalty(self._judge, real)
        scale = 0.5 * self.config.r1_gamma * self.config.r1_every
        return {"loss": scale * penalty + 0 * logits.sum(), "penalty": penalty}

    @uncompiled
    def _path_length_loss(self, n: int) -> dict[str, Tensor]:
        y = randn((n, *self.data.shape), self.device)
        lengths, image = path_lengths(self.synthesis, self._styles(n), y)
        weight = torch.where(self.path_length_mean == 0, 1.0, 0.01)  # from the first batch's on
        self.path_length_mean.lerp_(global_mean(lengths.mean()), weight)
        penalty = (lengths - self.path_length_mean).square().mean()
        scale = self.config.path_length_weight * self.config.path_length_every
        loss = scale * penalty + 0 * image.sum()
        return {"loss": loss, "penalty": penalty, "length": lengths.mean()}

    def _judge(self, x: Tensor) -> Tensor:
        if self.config.augment == "ada":
            x = augment(x, self.augment_p, mirror=self.config.augment_mirror)
        return self.discriminator(x)

    def _styles(self, n: int, *, track: bool = False) -> Tensor:
        """Mixed styles for training, `[n, styles, latent_dim]`."""
        z = randn((n, 2 * self.config.latent_dim), self.device)
        w, other = (self.mapping(part) for part in z.chunk(2, 1))
        if track:
            self.w_mean.lerp_(global_mean(w.mean(0)), 0.005)
        u = rand((n, 2), self.device)
        return mix(w, other, u, self.config.style_mixing, self.synthesis.styles)

    def _image(self, w: Tensor, noise: float = 0.0) -> Tensor:
        return self.synthesis(w[:, None].expand(-1, self.synthesis.styles, -1), noise)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Project onto w: Adam from the mean of w, squared error in pixels."""
        target, config = to_signed(x, self.data.levels), self.config
        generate = lambda w: self._image(self.w_mean + w)  # noqa: E731
        w = invert(generate, target, config.latent_dim, config.inversion_steps)
        with torch.no_grad():
            return from_signed(generate(w), self.data.levels)

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
        noise = temperature if z is None else 0.0
        w = self.mapping(randn((n, self.config.latent_dim), self.device) if z is None else z)
        w = self.w_mean + temperature * (w - self.w_mean)
        return from_signed(self._image(w, noise), self.data.levels)


def mix(w: Tensor, other: Tensor, u: Tensor, probability: float, styles: int) -> Tensor:
    """`w` up to a crossover, `other` from there on: whether and where, the uniform `u` decides."""
    at = 1 + (u[:, 1] * (styles - 1)).long()  # 1 .. styles - 1: each has one layer at least
    crossover = torch.where(u[:, 0] < probability, at, styles)
    first = torch.arange(styles, device=w.device) < crossover[:, None]
    return torch.where(first[..., None], w[:, None], other[:, None])
