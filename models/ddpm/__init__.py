"""Diffusion: Ho, Jain & Abbeel 2020 (arXiv:2006.11239), improved by Nichol & Dhariwal 2021
(arXiv:2102.09672); sampled by DDIM (Song et al. 2021, arXiv:2010.02502).

    forward   q(x_t|x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), x_0 [B, C, H, W] in [-1, 1],
              t = 1 .. T; abar from the cosine (or linear) schedule
    network   eps(x_t, t, label) [B, C, H, W], a U-Net (or v, Salimans & Ho 2022)
    loss      |eps - eps(x_t, t)|^2, mean over dimensions, t uniform ("simple"); with
              `learned_variance` + vlb_weight * (bound in bits per dimension), whose gradient
              reaches the variance alone (Nichol & Dhariwal, eq. 16, the paper's 0.001)
    bound     log P(x) >= -(L_0 + sum_t L_t + L_T), nats: a discretised Gaussian decoder at
              t = 1, KL between Gaussians at 2 .. T, KL to the prior

`sample(steps=, eta=, guidance=)`: DDIM on a subsequence of the T times. eta 0 has no noise but
the start x_T, which is the latent z (`latent_dim` = dimensions); eta 1 is ancestral sampling,
with the learned variance where there is one; then, with all T steps, it is the very model whose
bound `log_prob` gives. Reconstruction runs the deterministic DDIM backwards and forwards.

With `class_conditional`, guidance w predicts eps(null) + w (eps(label) - eps(null)) (Ho &
Salimans 2022, whose weight is w - 1): 1 is the conditional model, 0 the unconditional one,
which is also the one whose likelihood is measured.

Deviations from the papers: a small U-Net (see `models/unet.py`); with fewer levels than 256
the schedule begins where its noise is `first_noise` of the distance between two levels
(Nichol & Dhariwal set their first noise by the bin too, but know only 8 bits): less would make
the network learn the grid of the levels; the fixed variance is beta_t in the bound, and the
posterior's in sampling at eta 1, as DDIM has it (Ho et al. found the two alike); x_0 is
clipped to [-1, 1] in sampling and bound alike (Ho et al. do so in sampling), but not in DDIM
encoding; fewer steps are the middles of T's equal parts, so the last time, where x_T holds no
signal, is left out; t is uniform in training, not resampled by loss.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, Fraction, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
from models.ddpm.process import Predicted, Process
from models.noise import rand, randn, random_labels
from models.unet import UNet


class DDPMConfig(Config):
    width: Positive = 32  # channels at full size; twice as many at all others
    blocks: Positive = 1  # residual blocks per size, on the way down and again up
    attention: int = Field(49, ge=0)  # self-attention at sizes of at most so many pixels
    dropout: Fraction = 0.0
    timesteps: int = Field(1000, ge=2)  # T
    schedule: Literal["cosine", "linear"] = "cosine"
    # least spread of the noise at t = 1, in distances between two levels; 0: the schedule's own
    first_noise: float = Field(0.3, ge=0, le=0.4)
    prediction: Literal["epsilon", "v"] = "epsilon"
    learned_variance: bool = False  # between beta and the posterior's, by the hybrid loss
    vlb_weight: float = Field(1e-3, ge=0)  # of the bound in the hybrid loss
    class_conditional: bool = False
    label_dropout: Fraction = 0.1  # share of labels replaced by the null label
    inversion_steps: Positive = 50  # of DDIM, each way, in `reconstruct`
    likelihood_draws: Positive = 64  # of t, at most, in `log_prob`, whatever is asked for
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup_steps=100, clip_grad_norm=1.0)


class DDPM(GenerativeModel):
    """Denoising diffusion in T discrete steps; pixels of [-1, 1]."""

    Config = DDPMConfig
    paper = "Ho et al. 2020, arXiv:2006.11239"
    likelihood = "bound"
    reconstruction = "encode-decode"
    config: DDPMConfig

    def __init__(self, config: DDPMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.most_draws = config.likelihood_draws
        if config.class_conditional:
            if not data.classes:
                raise ValueError("class_conditional needs labels, and the data has no classes")
            self.conditions = frozenset({"label"})
        self.net = UNet(
            data.shape,
            data.shape[0] * (2 if config.learned_variance else 1),
            width=config.width,
            blocks=config.blocks,
            attention=config.attention,
            dropout=config.dropout,
            classes=len(data.classes) + 1 if config.class_conditional else 0,
        )
        self.process = Process(config.schedule, config.timesteps, data.levels, config.first_noise)

    # -- the network ----------------------------------------------------------------------------

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        *,
        guidance: float = 1.0,
        clip: bool = True,
    ) -> Predicted:
        """What the network makes of x_t; `label` None is the null label."""
        out = self._network(x, t, label, guidance)
        raw, mix = out, None
        if self.config.learned_variance:
            raw, fraction = out.chunk(2, 1)
            mix = (fraction + 1) / 2
        signal, spread = self.process.at(t)
        if self.config.prediction == "epsilon":
            x0, noise = (x - spread * raw) / signal, raw
        else:
            x0, noise = signal * x - spread * raw, spread * x + signal * raw
        if clip:
            x0 = x0.clamp(-1, 1)
            noise = (x - signal * x0) / spread
        return Predicted(x0, noise, raw, mix)

    def _network(self, x: Tensor, t: Tensor, label: Tensor | None, guidance: float) -> Tensor:
        time = t.to(x.dtype) * (1000 / self.config.timesteps)
        if not self.config.class_conditional:
            return self.net(x, time)
        null = torch.full_like(t, len(self.data.classes))
        if label is None or guidance == 0:
            return self.net(x, time, null)
        if guidance == 1:
            return self.net(x, time, label)
        without, within = self.net(
            torch.cat([x, x]), torch.cat([time, time]), torch.cat([null, label])
        ).chunk(2)
        return without + guidance * (within - without)

    # -- training and likelihood ----------------------------------------------------------------

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        x0, label = to_signed(batch.x, self.data.levels), None
        n, device = len(x0), x0.device
        if self.config.class_conditional:
            assert batch.label is not None
            keep = rand((n,), device) >= self.config.label_dropout
            label = torch.where(keep, batch.label, len(self.data.classes))
        t = (rand((n,), device) * self.config.timesteps).long() + 1
        noise = randn(x0.shape, device)
        x = self.process.diffuse(x0, t, noise)
        found = self.predict(x, t, label)
        signal, spread = self.process.at(t)
        wanted = noise if self.config.prediction == "epsilon" else signal * noise - spread * x0
        simple = (found.raw - wanted).square().mean()
        if found.mix is None:
            return {"loss": simple}
        frozen = found._replace(x0=found.x0.detach())
        term = self.process.term(batch.x, x0, x, t, frozen).mean() * self.config.timesteps
        bits = term / (self.data.dimensions * math.log(2))
        return {"loss": simple + self.config.vlb_weight * bits, "simple": simple, "vlb_bits": bits}

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """The bound, unbiased: `samples` draws of t for each image, one in each stratum of a
        proposal, weighted by its inverse; or every t once, where `samples` >= T. More than
        `likelihood_draws` are not taken: each is a run of the network and none tightens the bound,
        as importance samples would, it only steadies the estimate."""
        samples = min(samples, self.config.likelihood_draws)
        x0 = to_signed(x, self.data.levels)
        total = self.process.last_term(x0)
        for k in range(min(samples, self.config.timesteps)):
            t, weight = self.process.stratum(k, samples, len(x0), x0.device)
            noised = self.process.diffuse(x0, t, randn(x0.shape, x0.device))
            total = total + weight * self.process.term(x, x0, noised, t, self.predict(noised, t))
        return -total

    @property
    def likelihood_note(self) -> str:
        null = ", null label" if self.config.class_conditional else ""
        return (
            f"variational bound over T = {self.config.timesteps} steps, unbiased, from at most "
            f"{self.config.likelihood_draws} stratified draws of t{null}"
        )

    # -- sampling -------------------------------------------------------------------------------

    @property
    def latent_dim(self) -> int:
        return self.data.dimensions

    def encode(self, x: Tensor, *, steps: int | None = None) -> Tensor:
        """The latents `[B, dimensions]` whose deterministic sample is `x`: DDIM backwards
        (Song et al. 2021, section 4.3), exact in the limit of many steps."""
        y = to_signed(x, self.data.levels)
        times = self.process.times(steps or self.config.inversion_steps)[::-1]
        for s, t in pairwise(times):
            here, there = torch.full((len(x),), s, device=x.device), torch.tensor([t])
            noise = self.predict(y, here.clamp(min=1), clip=False).noise
            signal, spread = self.process.at(here)
            fade, fog = self.process.at(there.to(x.device))
            y = fade / signal * y + (fog - fade / signal * spread) * noise
        return y.flatten(1)

    def reconstruct(self, x: Tensor) -> Tensor:
        y = self.encode(x).view(x.shape)
        y = self._denoise(y, self.process.times(self.config.inversion_steps), None)
        return from_signed(y, self.data.levels)

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        steps: int = 16,
        eta: float = 0.0,
        guidance: float = 1.0,
    ) -> Tensor:
        """`z` is x_T; with `eta` > 0 the noise on the way is not part of it.

        Raises:
            ValueError: guidance other than 1 without classes, or `steps` below 1.
        """
        if self.config.class_conditional:
            label = random_labels(n, self.data, self.device) if label is None else label
        elif guidance != 1:
            raise ValueError("guidance needs class_conditional: true")
        x = temperature * randn((n, self.data.dimensions), self.device) if z is None else z
        x = x.view(n, *self.data.shape)
        x = self._denoise(x, self.process.times(steps), label, guidance, eta, temperature)
        return from_signed(x, self.data.levels)

    def _denoise(
        self,
        x: Tensor,
        times: list[int],
        label: Tensor | None,
        guidance: float = 1.0,
        eta: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """x_0 from x at the first of `times`, which descend to 0; all `[B, C, H, W]`."""
        for time, after in pairwise(times):
            t = torch.full((len(x),), time, device=x.device)
            s = torch.full_like(t, after)
            found = self.predict(x, t, label, guidance=guidance)
            mean, sigma = self.process.ddim(found, x, t, s, eta)
            x = mean + temperature * sigma * randn(x.shape, x.device) if after and eta else mean
        return x
