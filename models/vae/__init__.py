"""Variational autoencoder: Kingma & Welling 2014, "Auto-Encoding Variational Bayes".

    encoder   x [B, C, H, W] or points [B, 2] -> mean, log_var [B, latent_dim]
    decoder   z [N, latent_dim] -> per value a Bernoulli logit (two levels: the paper's), or a
              mixture of discretised logistics (Salimans et al. 2017): nats of the discrete levels
    loss      -E_q[log p(x|z)] + beta * KL(q(z|x) || p(z)), nats per example

`body: mlp` is the paper's fully connected network, `body: conv` follows the image's size;
`auto` is the one for points and the other for images.
Options beyond the paper, all off by default: `train_samples` > 1 is the importance-weighted bound
of Burda et al. 2016 (`log_prob(x, samples=K)` is that bound with K samples, always);
`kl_warmup_steps` raises the weight of the KL from 0 to beta (Sønderby et al. 2016), under the
importance-weighted bound that of log p(z) - log q(z|x); `pseudo_inputs` makes the prior the
mixture of the posteriors at that many learned inputs (Tomczak & Welling 2018, VampPrior), whose
KL is then estimated from the samples.

Deviations from the paper: SiLU where it has tanh; dropout, after the fully connected layers;
`sample` shows the mean of an image under the decoder, as the paper's figures do, not a draw of
pixel noise around it (points without given latents are drawn: their noise is part of what they
look like). From the VampPrior's: no gates in the network, pseudo-inputs clamped to the range of
the data, and, at temperatures below 1, the latents shrink towards the prior's mean.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.nn import Dropout, Upsample, discretised_logistic_log_prob, log_mean_exp, pyramid
from models.noise import noise_shard, rand, randn

AT_ONCE = 512  # decodings per chunk of `log_prob`: they still fit a processor's cache


class VAEConfig(Config):
    body: Literal["auto", "conv", "mlp"] = "auto"  # mlp: fully connected; auto: mlp for points
    latent_dim: Positive = 32
    width: Positive = 32  # conv: channels after the first halving; doubled at each one after it
    hidden: Positive = 256  # units of a fully connected layer
    layers: Positive = 2  # mlp: hidden layers on either side of z (conv has one)
    dropout: float = Field(0.0, ge=0, lt=1)  # after each fully connected layer
    mixture: Positive = 3  # discretised logistics per value; not used where there are 2 levels
    beta: float = Field(1.0, ge=0)  # 1: the evidence lower bound; else Higgins et al. 2017
    kl_warmup_steps: int = Field(0, ge=0)  # linear from 0 to beta
    train_samples: Positive = 1  # K of the training objective; 1: ELBO, more: IWAE
    pseudo_inputs: int = Field(0, ge=0)  # components of the VampPrior; 0: standard normal
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)

    @model_validator(mode="after")
    def _one_objective(self) -> VAEConfig:
        if self.train_samples > 1 and self.beta != 1:
            raise ValueError("beta other than 1 needs train_samples: 1 (IWAE has no KL to weigh)")
        return self


class VAE(GenerativeModel):
    """VAE with a convolutional or a fully connected body."""

    Config = VAEConfig
    paper = "Kingma & Welling 2014, arXiv:1312.6114"
    modalities = frozenset({"image", "points"})
    likelihood = "bound"
    reconstruction = "encode-decode"
    training_only = ("steps",)
    channels_last = True
    config: VAEConfig
    steps: Tensor

    def __init__(self, config: VAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.modality == "points" and config.body == "conv":
            raise ValueError("points have no neighbourhood to convolve: they need body: mlp")
        # points are images of one pixel with two channels
        self.canvas = (2, 1, 1) if data.modality == "points" else data.shape
        self.bernoulli = data.levels == 2 and data.modality == "image"
        per_value = 1 if self.bernoulli else 3 * config.mixture
        dense = config.body == "mlp" or data.modality == "points"
        build = self._mlp if dense else self._conv
        self.encoder, self.decoder = build(per_value)
        if config.pseudo_inputs:
            shape = (config.pseudo_inputs, *data.shape)
            self.pseudo = nn.Parameter(0.5 * torch.randn(shape))  # in [-1, 1] where it counts
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _dense(self, *sizes: int) -> list[nn.Module]:
        """Hidden layers from the first size over the others."""
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.SiLU(), Dropout(self.config.dropout)]
        return layers

    def _mlp(self, per_value: int) -> tuple[nn.Sequential, nn.Sequential]:
        config, (channels, height, width) = self.config, self.canvas
        hidden = [config.hidden] * config.layers
        encoder = [nn.Flatten(), *self._dense(self.data.dimensions, *hidden)]
        encoder.append(nn.Linear(config.hidden, 2 * config.latent_dim))
        decoder = self._dense(config.latent_dim, *hidden)
        decoder.append(nn.Linear(config.hidden, self.data.dimensions * per_value))
        shape = (channels * per_value, height, width)
        return nn.Sequential(*encoder), nn.Sequential(*decoder, nn.Unflatten(1, shape))

    def _conv(self, per_value: int) -> tuple[nn.Sequential, nn.Sequential]:
        config, (channels, height, width) = self.config, self.canvas
        sizes = pyramid((height, width))
        widths = [config.width * 2**i for i in range(len(sizes) - 1)] or [config.width]
        flat = widths[-1] * math.prod(sizes[-1])
        encoder: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
        decoder: list[nn.Module] = []
        for inner, outer, size in zip(widths, [widths[0], *widths], sizes[:-1], strict=False):
            encoder += [nn.Conv2d(outer, inner, 3, stride=2, padding=1), nn.SiLU()]
            decoder = [Upsample(inner, outer, size), nn.SiLU(), *decoder]
        encoder += [nn.Flatten(), *self._dense(flat, config.hidden)]
        encoder.append(nn.Linear(config.hidden, 2 * config.latent_dim))
        decoder = [nn.Unflatten(1, (widths[-1], *sizes[-1])), *decoder]
        decoder = [*self._dense(config.latent_dim, config.hidden, flat), *decoder]
        decoder.append(nn.Conv2d(widths[0], channels * per_value, 3, padding=1))
        return nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each `[B, latent_dim]`."""
        return self._posterior(to_signed(x, self.data.levels))

    def _posterior(self, signed: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encoder(signed).float().chunk(2, 1)
        return mean, log_var.clamp(-12, 12)

    def _prior(self) -> tuple[Tensor, Tensor]:
        """Means and log-variances of the prior's equally likely components, `[M, latent_dim]`."""
        if not self.config.pseudo_inputs:
            zero = torch.zeros(1, self.config.latent_dim, device=self.device)
            return zero, zero
        with noise_shard(0, 1):  # they are no batch: every worker needs the same dropout
            return self._posterior(self.pseudo.clamp(-1, 1))

    def _mixture(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mixture logits, means (levels span [-1, 1]) and log-scales, `[N, C, K, H, W]`."""
        channels, height, width = self.canvas
        # whatever the layout of the weights
        out = self.decoder(z).to(torch.float32, memory_format=torch.contiguous_format)
        out = out.view(len(z), channels, 3, self.config.mixture, height, width)
        logits, means, log_scales = out.unbind(2)
        return logits, means, (log_scales - 2).clamp(-7, 3)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of x `[B, *shape]` at K latents each, z `[B, K, latent_dim]`: `[B, K]`."""
        flat = z.flatten(0, 1)
        if self.bernoulli:
            logits = self.decoder(flat).float().reshape(*z.shape[:2], -1)
            right = (2.0 * x.flatten(1) - 1)[:, None] * logits
            # logsigmoid; its log1p would take three times as long, for the 8th digit
            return (right.clamp(max=0) - torch.log(1 + torch.exp(-logits.abs()))).sum(2)
        rows = x.view(len(x), *self.canvas).float().repeat_interleave(z.shape[1], 0)
        parts = discretised_logistic_log_prob(rows, *self._mixture(flat), self.data.levels)
        return parts.view(*z.shape[:2], -1).sum(2)

    def _latents(
        self, mean: Tensor, log_var: Tensor, prior: tuple[Tensor, Tensor], k: int
    ) -> tuple[Tensor, Tensor]:
        """K latents of each q(z|x), `[B, K, latent_dim]`, and their log p(z) - log q(z|x)."""
        noise = randn((len(mean), k, mean.shape[1]), mean.device)
        z = mean[:, None] + torch.exp(0.5 * log_var)[:, None] * noise
        log_q = -0.5 * (noise.square() + log_var[:, None]).sum(2)
        with torch.autocast(z.device.type, enabled=False):  # the squares cancel
            centre, precision = prior[0], torch.exp(-prior[1])
            square = z.square() @ precision.T - 2 * z @ (centre * precision).T
            constant = (centre.square() * precision + prior[1]).sum(1)
            log_p = log_mean_exp(-0.5 * (square + constant), 2)
        return z, log_p - log_q

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Importance-weighted lower bound with `samples` draws (Burda et al. 2016, eq. 8)."""
        mean, log_var = self.encode(x)
        prior, chunk = self._prior(), max(1, AT_ONCE // len(x))
        total = torch.full((len(x),), -math.inf, device=mean.device)
        for start in range(0, samples, chunk):  # memory must not grow with K
            z, log_ratio = self._latents(mean, log_var, prior, min(chunk, samples - start))
            weights = self._log_likelihood(x, z) + log_ratio
            total = torch.logaddexp(total, torch.logsumexp(weights, 1))
        return total - math.log(samples)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        mean, log_var = self.encode(batch.x)
        z, log_ratio = self._latents(mean, log_var, self._prior(), self.config.train_samples)
        likelihood = self._log_likelihood(batch.x, z)
        rate, ramp = -log_ratio.mean(), self.config.kl_warmup_steps
        weight = self.config.beta * ((self.steps / ramp).clamp(max=1) if ramp else 1)
        if not self.config.pseudo_inputs:  # less noise in closed form
            rate = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        distortion = -likelihood.mean()
        loss = distortion + weight * rate
        if self.config.train_samples > 1:
            loss = -log_mean_exp(likelihood + weight * log_ratio, 1).mean()
        return {"loss": loss, "reconstruction_nats": distortion, "kl_nats": rate}

    def after_step(self, phase: str) -> None:
        self.steps += 1

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z), floats `[B, *shape]` in [-1, 1]."""
        if self.bernoulli:
            return 2 * torch.sigmoid(self.decoder(z).float()) - 1
        logits, means, _ = self._mixture(z)
        return (logits.softmax(2) * means.clamp(-1, 1)).sum(2).view(len(z), *self.data.shape)

    def _draw(self, z: Tensor, temperature: float) -> Tensor:
        """A draw of p(x|z), its spread times `temperature`; floats `[B, *shape]`."""
        logits, means, log_scales = self._mixture(z)
        gumbel = -torch.log(-torch.log(rand(logits.shape, z.device).clamp(1e-6, 1 - 1e-6)))
        chosen = (logits + gumbel).argmax(2, keepdim=True)
        mean, scale = means.gather(2, chosen), log_scales.gather(2, chosen).exp()
        noise = torch.logit(rand(mean.shape, z.device).clamp(1e-6, 1 - 1e-6))
        return (mean + temperature * scale * noise).view(len(z), *self.data.shape)

    def reconstruct(self, x: Tensor) -> Tensor:
        return from_signed(self.decode(self.encode(x)[0]), self.data.levels)

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
            means, log_vars = self._prior()
            rows = (rand((n,), self.device) * len(means)).long()
            noise = randn((n, self.config.latent_dim), self.device)
            z, centre = means[rows] + torch.exp(0.5 * log_vars[rows]) * noise, means.mean(0)
            z = centre + temperature * (z - centre)
            if self.data.modality == "points" and temperature:
                return from_signed(self._draw(z, temperature), self.data.levels)
        return from_signed(self.decode(z), self.data.levels)
