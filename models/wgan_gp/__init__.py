"""WGAN-GP: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", algorithm 1.

    generator  z [B, latent_dim] -> [B, C, H, W] in [-1, 1], DCGAN's, with batch norm
    critic     [B, C, H, W] -> f(x) [B, 1], no sigmoid, no normalisation
    losses     critic: E[f(G(z))] - E[f(x)] + penalty * E[(|grad f(x')| - 1)^2]
               x' = e x + (1 - e) G(z), one e ~ U[0, 1] for each example
               generator: -E[f(G(z))]

The critic's E[f(x)] - E[f(G(z))] is logged as `wasserstein_estimate`, the unweighted penalty
as `gradient_penalty`. As in the paper: penalty 10, n_critic 5, Adam with betas 0 and 0.9, and
a critic without batch norm, for the penalty is of one example's gradient.

Deviations: the learning rate is 1e-3, not 1e-4, which suits 2,000 steps (longer training wants
the paper's); nothing replaces batch norm, where the paper recommends layer norm; the critic
has no last bias, which would cancel; depth, kernels, z and initial weights as in
`models.adversarial`; `reconstruct` inverts the generator by gradient descent on z (Creswell &
Bharath 2018), which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from models.adversarial import (
    ConvDiscriminator,
    ConvGenerator,
    UnconditionalGAN,
    initialise,
    uncompiled,
)
from models.base import Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.noise import rand, randn


class WGANGPConfig(Config):
    latent_dim: Positive = 64
    width: Positive = 32  # channels beside the image; doubled at each halving
    penalty: float = Field(10.0, ge=0)  # the paper's lambda
    n_critic: Positive = 5  # critic steps to each one of the generator
    inversion_steps: Positive = 300  # of Adam on z, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.9))
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.9))


class WGANGP(UnconditionalGAN):
    """Generator and a critic whose gradient is held near norm one; the critic's phase repeats."""

    Config = WGANGPConfig
    paper = "Gulrajani et al. 2017, arXiv:1704.00028"
    channels_last = True
    config: WGANGPConfig

    def __init__(self, config: WGANGPConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.generator = ConvGenerator(config.latent_dim, config.width, data.shape)
        self.critic = ConvDiscriminator(config.width, data.shape, norm=None, bias=False)
        self.apply(initialise)

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
        penalty = gradient_penalty(self.critic, real, fake)
        return {
            "loss": -estimate + self.config.penalty * penalty,
            "wasserstein_estimate": estimate,
            "gradient_penalty": penalty,
        }


@uncompiled
def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Mean of (|gradient of f at x'| - 1)^2, x' on the lines from `fake` to `real`; a scalar.

    Outside of autocast: the square of a difference of norms near one has no digits to spare.
    """
    share = rand((len(real), *[1] * (real.ndim - 1)), real.device).to(real.dtype)
    between = torch.lerp(fake, real, share).requires_grad_()
    with torch.autocast(real.device.type, enabled=False):
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
