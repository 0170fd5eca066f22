"""WGAN: Arjovsky, Chintala & Bottou 2017, "Wasserstein GAN", algorithm 1.

    generator  z [B, latent_dim] -> [B, C, H, W] in [-1, 1], DCGAN's, with batch norm
    critic     [B, C, H, W] -> f(x) [B, 1], no sigmoid; every weight within [-clip, clip]
    losses     critic: E[f(G(z))] - E[f(x)], `n_critic` steps to each one of the generator
               generator: -E[f(G(z))]

The critic's E[f(x)] - E[f(G(z))] is logged as `wasserstein_estimate`: up to the critic's
Lipschitz constant, which the clip bounds but nobody knows, it is the distance. As in the
paper: RMSprop, n_critic 5, and the clip covers all the critic's parameters, biases too, from
the first loss on.

Deviations: the clip is 0.05, not 0.01, for the critic of a small image has fewer layers to
grow in, and the learning rate 5e-4, not 5e-5: both suit 2,000 steps, and longer training
wants the paper's rate; the critic has neither batch norm, whose scales the clip would flatten,
nor a last bias, which would cancel; depth, kernels, z and initial weights as in
`models.adversarial`; `reconstruct` inverts the generator by gradient descent on z (Creswell &
Bharath 2018), which the paper does not do.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from models.adversarial import ConvDiscriminator, ConvGenerator, UnconditionalGAN, initialise
from models.base import Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.noise import randn


class WGANConfig(Config):
    latent_dim: Positive = 64
    width: Positive = 32  # channels beside the image; doubled at each halving
    clip: float = Field(0.05, gt=0)  # the critic's weights stay within [-clip, clip]
    n_critic: Positive = 5  # critic steps to each one of the generator
    inversion_steps: Positive = 300  # of Adam on z, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(name="rmsprop", lr=5e-4)
    critic_optimizer: OptimizerConfig = OptimizerConfig(name="rmsprop", lr=5e-4)


class WGAN(UnconditionalGAN):
    """Generator and clipped critic; the critic's phase repeats."""

    Config = WGANConfig
    paper = "Arjovsky et al. 2017, arXiv:1701.07875"
    channels_last = True
    config: WGANConfig

    def __init__(self, config: WGANConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.generator = ConvGenerator(config.latent_dim, config.width, data.shape)
        self.critic = ConvDiscriminator(config.width, data.shape, norm=None, bias=False)
        self.apply(initialise)
        with torch.no_grad():
            self.after_step("critic")  # the first loss, too, is of a clipped critic

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (
            Phase("critic", (self.critic,), config.critic_optimizer, repeats=config.n_critic),
            Phase("generator", (self.generator,), config.generator_optimizer),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        z = randn((len(batch.x), self.config.latent_dim), batch.x.device)
        if phase == "generator":
            return {"loss": -self.critic(self.generator(z)).float().mean()}
        with torch.no_grad():
            fake = self.generator(z).float()
        real = to_signed(batch.x, self.data.levels)
        # in one pass, which a critic without batch statistics does not notice
        f_real, f_fake = self.critic(torch.cat([real, fake])).float().chunk(2)
        estimate = f_real.mean() - f_fake.mean()
        return {"loss": -estimate, "wasserstein_estimate": estimate}

    def after_step(self, phase: str) -> None:
        if phase == "critic":
            for parameter in self.critic.parameters():
                parameter.clamp_(-self.config.clip, self.config.clip)
