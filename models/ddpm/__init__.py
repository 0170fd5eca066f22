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
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, Fraction, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_signed, to_signed
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


class _Predicted(NamedTuple):
    x0: Tensor  # clipped where asked
    noise: Tensor  # the epsilon that belongs to this x0
    raw: Tensor  # what the loss compares: epsilon or v
    mix: Tensor | None  # of log beta and the posterior's log-variance; 1: beta


def alpha_bars(schedule: str, steps: int, least: float = 0.0) -> Tensor:
    """abar_0 .. abar_T, `[T + 1]`, float64; abar_0 = 1. `least`: of the noise's spread at t = 1,
    where the schedule then begins."""
    t = torch.arange(steps + 1, dtype=torch.float64)
    if schedule == "cosine":  # Nichol & Dhariwal, eq. 17, betas clipped at 0.999
        f = torch.cos((t / steps + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:  # Ho et al., section 4, stretched where T is not 1000
        scale = 1000 / steps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
        beta = beta.clamp(max=0.999)
    log_abar = torch.log1p(-beta).cumsum(0)  # at t = 1 .. T
    begin = int((torch.expm1(log_abar) > -(least**2)).sum())
    at = torch.linspace(min(begin, steps - 2), steps - 1, steps, dtype=torch.float64)
    low = at.long().clamp(max=steps - 2)
    abar = torch.lerp(log_abar[low], log_abar[low + 1], at - low).exp()
    return torch.cat([torch.ones(1, dtype=torch.float64), abar])


class DDPM(GenerativeModel):
    """Denoising diffusion in T discrete steps; pixels of [-1, 1]."""

    Config = DDPMConfig
    paper = "Ho et al. 2020, arXiv:2006.11239"
    likelihood = "bound"
    reconstruction = "encode-decode"
    config: DDPMConfig
    alpha_bar: Tensor
    proposal: Tensor

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
        steps = config.timesteps
        least = config.first_noise * 2 / (data.levels - 1)
        abar = alpha_bars(config.schedule, steps, least)
        self.register_buffer("alpha_bar", abar, persistent=False)
        # the bound's terms fall about as 1/t: half of the draws of t follow that
        early = 1 / torch.arange(1, steps + 1, dtype=torch.float64)
        share = 0.5 / steps + 0.5 * early / early.sum()
        self.register_buffer("proposal", share, persistent=False)

    # -- the two processes ----------------------------------------------------------------------

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), `[B, 1, 1, 1]` for `t` `[B]`."""
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt().float(), (1 - a).sqrt().float()

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_t|x_0)."""
        signal, spread = self._at(t)
        return signal * x0 + spread * noise

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        *,
        guidance: float = 1.0,
        clip: bool = True,
    ) -> _Predicted:
        """What the network makes of x_t; `label` None is the null label."""
        out = self._network(x, t, label, guidance)
        raw, mix = out, None
        if self.config.learned_variance:
            raw, fraction = out.chunk(2, 1)
            mix = (fraction + 1) / 2
        signal, spread = self._at(t)
        if self.config.prediction == "epsilon":
            x0, noise = (x - spread * raw) / signal, raw
        else:
            x0, noise = signal * x - spread * raw, spread * x + signal * raw
        if clip:
            x0 = x0.clamp(-1, 1)
            noise = (x - signal * x0) / spread
        return _Predicted(x0, noise, raw, mix)

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

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of q(x_s|x_t, x_0), s < t, and its variance `[B, 1, 1, 1]` (Ho et al., eq. 7)."""
        a, b = self.alpha_bar[t].view(-1, 1, 1, 1), self.alpha_bar[s].view(-1, 1, 1, 1)
        beta = 1 - a / b
        mean = (b.sqrt() * beta / (1 - a)).float() * x0
        mean = mean + ((a / b).sqrt() * (1 - b) / (1 - a)).float() * x
        return mean, (beta * (1 - b) / (1 - a)).float()

    def log_variance(self, t: Tensor, s: Tensor, mix: Tensor | None) -> Tensor:
        """Of p(x_s|x_t): `[B, 1, 1, 1]`, or `[B, C, H, W]` where it is learned (their eq. 15).

        Where s = 0 the posterior has no variance; that of the step from 2 to 1 stands in.
        """
        a, b = self.alpha_bar[t], self.alpha_bar[s]
        large = (1 - a / b).log().float().view(-1, 1, 1, 1)
        if mix is None:
            return large
        one, two = self.alpha_bar[1], self.alpha_bar[2]
        small = (1 - a / b) * (1 - b) / (1 - a)
        small = torch.where(s == 0, (1 - two / one) * (1 - one) / (1 - two), small)
        return mix * large + (1 - mix) * small.log().float().view(-1, 1, 1, 1)

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
        x = self.diffuse(x0, t, noise)
        found = self.predict(x, t, label)
        signal, spread = self._at(t)
        wanted = noise if self.config.prediction == "epsilon" else signal * noise - spread * x0
        simple = (found.raw - wanted).square().mean()
        if found.mix is None:
            return {"loss": simple}
        frozen = found._replace(x0=found.x0.detach())
        term = self._term(batch.x, x0, x, t, frozen).mean() * self.config.timesteps
        bits = term / (self.data.dimensions * math.log(2))
        return {"loss": simple + self.config.vlb_weight * bits, "simple": simple, "vlb_bits": bits}

    def _term(self, levels: Tensor, x0: Tensor, x: Tensor, t: Tensor, found: _Predicted) -> Tensor:
        """L_{t-1} given x_t, nats `[B]`: the decoder's where t = 1, else the KL (Ho et al., eq. 5).

        `levels` and `x0` are the same image, before and after scaling.
        """
        mean, _ = self.posterior(found.x0, x, t, t - 1)
        true_mean, true_variance = self.posterior(x0, x, t, t - 1)
        log_variance = self.log_variance(t, t - 1, found.mix)
        ratio = true_variance.clamp(min=1e-20).log() - log_variance
        apart = (true_mean - mean).square() * torch.exp(-log_variance)
        nats = 0.5 * (ratio.exp() - 1 - ratio + apart)
        first = (t == 1).view(-1, 1, 1, 1)
        if first.any():
            top = self.data.levels
            nats = torch.where(
                first, -discretised_gaussian_log_prob(levels, mean, log_variance, top), nats
            )
        return nats.flatten(1).sum(1)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """The bound, unbiased: `samples` draws of t for each image, one in each stratum of a
        proposal, weighted by its inverse; or every t once, where `samples` >= T. More than
        `likelihood_draws` are not taken: each is a run of the network and none tightens the bound,
        as importance samples would, it only steadies the estimate."""
        samples = min(samples, self.config.likelihood_draws)
        x0, steps = to_signed(x, self.data.levels), self.config.timesteps
        n, device = len(x0), x0.device
        last = self.alpha_bar[-1]
        square = (last.float() * x0.square()).flatten(1).sum(1)
        rest = -(last + torch.log1p(-last)).float() * self.data.dimensions
        total = 0.5 * (square + rest)  # L_T
        edges = self.proposal.cumsum(0)
        for k in range(min(samples, steps)):
            if samples >= steps:
                t, weight = torch.full((n,), k + 1, device=device), torch.ones(n, device=device)
            else:
                at = (k + rand((n,), device).double()) / samples
                t = torch.searchsorted(edges, at).clamp(max=steps - 1) + 1
                weight = (1 / (samples * self.proposal[t - 1])).float()
            noised = self.diffuse(x0, t, randn(x0.shape, device))
            total = total + weight * self._term(x, x0, noised, t, self.predict(noised, t))
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

    def times(self, steps: int) -> list[int]:
        """`steps` times of 1 .. T, evenly spread, descending, then 0; all where steps >= T."""
        if steps < 1:
            raise ValueError(f"steps: {steps} is less than 1")
        total = self.config.timesteps
        steps = min(steps, total)
        rising = [1 + (2 * i + 1) * total // (2 * steps) for i in range(steps)]
        return [*rising[::-1], 0]

    def encode(self, x: Tensor, *, steps: int | None = None) -> Tensor:
        """The latents `[B, dimensions]` whose deterministic sample is `x`: DDIM backwards
        (Song et al. 2021, section 4.3), exact in the limit of many steps."""
        y = to_signed(x, self.data.levels)
        times = self.times(steps or self.config.inversion_steps)[::-1]
        for s, t in pairwise(times):
            here, there = torch.full((len(x),), s, device=x.device), torch.tensor([t])
            noise = self.predict(y, here.clamp(min=1), clip=False).noise
            (signal, spread), (fade, fog) = self._at(here), self._at(there.to(x.device))
            y = fade / signal * y + (fog - fade / signal * spread) * noise
        return y.flatten(1)

    def reconstruct(self, x: Tensor) -> Tensor:
        y = self.encode(x).view(x.shape)
        y = self._denoise(y, self.times(self.config.inversion_steps), None)
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
        x = self._denoise(x, self.times(steps), label, guidance, eta, temperature)
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
            mean, sigma = self.ddim(found, x, t, s, eta)
            x = mean + temperature * sigma * randn(x.shape, x.device) if after and eta else mean
        return x

    def ddim(
        self, found: _Predicted, x: Tensor, t: Tensor, s: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_s given x_t (Song et al. 2021, eq. 12 and 16)."""
        _, variance = self.posterior(found.x0, x, t, s)
        kept, spread = self._at(s)
        away = (spread.square() - eta**2 * variance).clamp(min=0).sqrt()
        sigma = variance.sqrt()
        if found.mix is not None:
            sigma = torch.exp(0.5 * self.log_variance(t, s, found.mix))
        return kept * found.x0 + away * found.noise, eta * sigma


def discretised_gaussian_log_prob(
    x: Tensor, mean: Tensor, log_variance: Tensor, levels: int
) -> Tensor:
    """Log of a Gaussian's mass in the bins of integer levels, which span [-1, 1]; nats, of x's
    shape. The first and the last bin reach to infinity (Ho et al., eq. 13)."""
    half_bin, inverse = 1.0 / (levels - 1), torch.exp(-0.5 * log_variance)
    centred = to_signed(x, levels) - mean
    upper, lower = inverse * (centred + half_bin), inverse * (centred - half_bin)
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): in the lower tail nothing cancels
    flip = centred > 0
    b, a = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_b, log_a = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    middle = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-7)))
    first, last = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x == 0, first, torch.where(x == levels - 1, last, middle))
