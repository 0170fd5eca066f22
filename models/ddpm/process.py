"""The diffusion process: its schedule, what it does to an image, and what its steps have in common
with the model's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.data import to_signed
from models.noise import rand


class Predicted(NamedTuple):
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


class Process(nn.Module):
    """The steps of noise between an image of `levels` levels, at t = 0, and almost nothing of it,
    at t = `steps`; `first_noise` as in the configuration. No parameters."""

    alpha_bar: Tensor
    proposal: Tensor  # of t, where not all are drawn: `[T]`, of 1 .. T

    def __init__(self, schedule: str, steps: int, levels: int, first_noise: float) -> None:
        super().__init__()
        self.steps, self.levels = steps, levels
        abar = alpha_bars(schedule, steps, first_noise * 2 / (levels - 1))
        self.register_buffer("alpha_bar", abar, persistent=False)
        # the bound's terms fall about as 1/t: half of the draws of t follow that
        early = 1 / torch.arange(1, steps + 1, dtype=torch.float64)
        share = 0.5 / steps + 0.5 * early / early.sum()
        self.register_buffer("proposal", share, persistent=False)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), `[B, 1, 1, 1]` for `t` `[B]`."""
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt().float(), (1 - a).sqrt().float()

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_t|x_0)."""
        signal, spread = self.at(t)
        return signal * x0 + spread * noise

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

    def term(self, levels: Tensor, x0: Tensor, x: Tensor, t: Tensor, found: Predicted) -> Tensor:
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
            top = self.levels
            nats = torch.where(
                first, -discretised_gaussian_log_prob(levels, mean, log_variance, top), nats
            )
        return nats.flatten(1).sum(1)

    def last_term(self, x0: Tensor) -> Tensor:
        """L_T, the KL of q(x_T|x_0) to the prior, nats `[B]`."""
        last = self.alpha_bar[-1]
        square = (last.float() * x0.square()).flatten(1).sum(1)
        rest = -(last + torch.log1p(-last)).float() * x0[0].numel()
        return 0.5 * (square + rest)

    def stratum(self, k: int, count: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The k-th of `count` draws of t for each of `n` images, `[n]`, each from its stratum of
        the proposal, and their weights; with `count` >= T all t in turn, of weight 1."""
        if count >= self.steps:
            return torch.full((n,), k + 1, device=device), torch.ones(n, device=device)
        at = (k + rand((n,), device).double()) / count
        t = torch.searchsorted(self.proposal.cumsum(0), at).clamp(max=self.steps - 1) + 1
        return t, (1 / (count * self.proposal[t - 1])).float()

    def times(self, steps: int) -> list[int]:
        """`steps` times of 1 .. T, evenly spread, descending, then 0; all where steps >= T."""
        if steps < 1:
            raise ValueError(f"steps: {steps} is less than 1")
        total = self.steps
        steps = min(steps, total)
        rising = [1 + (2 * i + 1) * total // (2 * steps) for i in range(steps)]
        return [*rising[::-1], 0]

    def ddim(
        self, found: Predicted, x: Tensor, t: Tensor, s: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_s given x_t (Song et al. 2021, eq. 12 and 16)."""
        kept, spread = self.at(s)
        if eta == 0:  # no noise: the posterior is not asked, and sqrt(spread^2) is spread
            return kept * found.x0 + spread * found.noise, torch.zeros_like(spread)
        _, variance = self.posterior(found.x0, x, t, s)
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
