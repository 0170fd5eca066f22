"""Variational autoencoder: Kingma & Welling 2014, "Auto-Encoding Variational Bayes".

    encoder   x [B, C, H, W] -> mean, log_var [B, latent_dim]
    decoder   z [B, latent_dim] -> mixture of discretised logistics per pixel
    loss      -E_q[log p(x|z)] + beta * KL(q(z|x) || N(0, I)), nats per example

With `train_samples` > 1 (and beta 1) the loss is the importance-weighted bound of Burda et
al. 2016; `log_prob(x, samples=K)` is that bound with K samples.

Deviations from the paper: convolutional networks; the decoder's likelihood is a mixture of
discretised logistics (Salimans et al. 2017), so that the bound is in nats of the discrete
levels (with two levels it is the paper's Bernoulli); `sample` shows the decoder's mean, as
the paper's figures do, not a draw of pixel noise around it.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.base import (
    Batch,
    Config,
    DataSpec,
    GenerativeModel,
    OptimizerConfig,
    Positive,
    from_signed,
    log_mean_exp,
    randn,
    to_signed,
)
from models.nn import Upsample, discretised_logistic_log_prob, pyramid


class VAEConfig(Config):
    latent_dim: Positive = 32
    width: Positive = 32  # channels after the first halving; doubled at each one after it
    hidden: Positive = 256  # the fully connected layer on either side of z
    mixture: Positive = 3  # discretised logistics per pixel
    beta: float = Field(1.0, ge=0)  # 1: the evidence lower bound; else Higgins et al. 2017
    train_samples: Positive = 1  # K of the training objective; 1: ELBO, more: IWAE
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)

    @model_validator(mode="after")
    def _one_objective(self) -> VAEConfig:
        if self.train_samples > 1 and self.beta != 1:
            raise ValueError("beta other than 1 needs train_samples: 1 (IWAE has no KL to weigh)")
        return self


class VAE(GenerativeModel):
    """Convolutional VAE whose depth follows the image's size."""

    Config = VAEConfig
    paper = "Kingma & Welling 2014, arXiv:1312.6114"
    likelihood = "bound"
    reconstruction = "encode-decode"
    config: VAEConfig

    def __init__(self, config: VAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        channels, height, width = data.shape
        sizes = pyramid((height, width))
        widths = [config.width * 2**i for i in range(len(sizes) - 1)] or [config.width]
        flat = widths[-1] * math.prod(sizes[-1])

        encoder: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
        decoder: list[nn.Module] = []
        outs = 3 * config.mixture * channels
        for inner, outer, size in zip(widths, [widths[0], *widths], sizes[:-1], strict=False):
            encoder += [nn.Conv2d(outer, inner, 3, stride=2, padding=1), nn.SiLU()]
            decoder = [Upsample(inner, outer, size), nn.SiLU(), *decoder]
        decoder.append(nn.Conv2d(widths[0], outs, 3, padding=1))
        self.encoder = nn.Sequential(
            *encoder,
            nn.Flatten(),
            nn.Linear(flat, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, 2 * config.latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, flat),
            nn.SiLU(),
            nn.Unflatten(1, (widths[-1], *sizes[-1])),
            *decoder,
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each `[B, latent_dim]`."""
        mean, log_var = self.encoder(to_signed(x, self.data.levels)).float().chunk(2, 1)
        return mean, log_var.clamp(-12, 12)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mixture logits, means (levels span [-1, 1]) and log-scales, `[B, C, K, H, W]`."""
        channels, height, width = self.data.shape
        out = self.decoder(z).float()
        out = out.view(len(z), channels, 3, self.config.mixture, height, width)
        logits, means, log_scales = out.unbind(2)
        return logits, means, (log_scales - 2).clamp(-7, 3)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), nats, `[B]`."""
        parts = discretised_logistic_log_prob(x.float(), *self.decode(z), self.data.levels)
        return parts.flatten(1).sum(1)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        x = batch.x
        mean, log_var = self.encode(x)
        if self.config.train_samples > 1:
            weights = [self._log_weight(x, mean, log_var) for _ in range(self.config.train_samples)]
            return {"loss": -log_mean_exp(torch.stack(weights)).mean()}
        z = mean + torch.exp(0.5 * log_var) * randn(mean.shape, mean.device)
        distortion = -self._log_likelihood(x, z).mean()
        rate = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return {
            "loss": distortion + self.config.beta * rate,
            "reconstruction_nats": distortion,
            "kl_nats": rate,
        }

    def _log_weight(self, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) for one z ~ q(z|x): nats, `[B]`."""
        noise = randn(mean.shape, mean.device)
        z = mean + torch.exp(0.5 * log_var) * noise
        log_ratio = 0.5 * (noise.square() + log_var - z.square()).sum(1)
        return self._log_likelihood(x, z) + log_ratio

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Importance-weighted lower bound with `samples` draws (Burda et al. 2016, eq. 8)."""
        mean, log_var = self.encode(x)
        total: Tensor | None = None  # running log-sum, so that memory does not grow with K
        for _ in range(samples):
            weight = self._log_weight(x, mean, log_var)
            total = weight if total is None else torch.logaddexp(total, weight)
        assert total is not None
        return total - math.log(samples)

    def _mean_image(self, z: Tensor) -> Tensor:
        logits, means, _ = self.decode(z)
        mixed = (logits.softmax(2) * means.clamp(-1, 1)).sum(2)
        return from_signed(mixed, self.data.levels)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self._mean_image(self.encode(x)[0])

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
        if z is None:
            z = temperature * randn((n, self.config.latent_dim), self.device)
        return self._mean_image(z)
