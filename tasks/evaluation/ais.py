"""Log-likelihood of a decoder with observation noise, by annealed importance sampling.

A GAN gives images without a density. With noise of deviation sigma around each it has one,
p(x) = E_z[p(x | G(z))], which Wu et al. 2017 ("On the quantitative analysis of decoder-based
generative models") estimate by annealing from the prior to the posterior of z with Hamiltonian
Monte Carlo. The estimate lies below the truth on average; run backwards from a z that made the
image, it lies above. On images that the model itself made, whose z is known, the two enclose the
truth: the bidirectional Monte Carlo gap (Grosse et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.nn import log_mean_exp

LogLikelihood = Callable[[Tensor], Tensor]  # z [N, D] -> log p(x_n | z_n), nats, [N]


class Schedule(NamedTuple):
    """Inverse temperatures from 0 to 1, and the leapfrog step size at each but the first."""

    betas: Tensor
    steps: Tensor
    leapfrog: int


def sigmoid_betas(n: int, device: torch.device, delta: float = 4.0) -> Tensor:
    """`n + 1` inverse temperatures from 0 to 1, denser at both ends (Wu et al., section 3.1)."""
    raw = torch.sigmoid(torch.linspace(-delta, delta, n + 1, device=device))
    return (raw - raw[0]) / (raw[-1] - raw[0])


def tuned(
    log_likelihood: LogLikelihood, z: Tensor, n: int, *, leapfrog: int = 10, target: float = 0.65
) -> Schedule:
    """Step sizes found in a run of its own, so that the chains that count keep detailed balance.

    `z` are draws from the prior; the step grows while more than `target` of the moves are
    accepted, and shrinks otherwise.
    """
    betas, steps, size = sigmoid_betas(n, z.device), [], 0.2
    for beta in betas[1:]:
        z, accepted = hamiltonian(log_likelihood, z, float(beta), size, leapfrog)
        steps.append(size)
        size = min(1.5, max(1e-4, size * (1.05 if accepted > target else 0.95)))
    return Schedule(betas, torch.tensor(steps), leapfrog)


def forward(log_likelihood: LogLikelihood, z: Tensor, schedule: Schedule) -> Tensor:
    """Log importance weights `[N]` of chains that start at draws `z` of the prior."""
    weights = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for i, size in enumerate(schedule.steps.tolist()):
        low, high = float(schedule.betas[i]), float(schedule.betas[i + 1])
        with torch.no_grad():
            weights += (high - low) * log_likelihood(z).double()
        z, _ = hamiltonian(log_likelihood, z, high, size, schedule.leapfrog)
    return weights


def backward(log_likelihood: LogLikelihood, z: Tensor, schedule: Schedule) -> Tensor:
    """Log weights `[N]` of the reversed chains, which start at draws `z` of the posterior.

    The mean of their exponentials estimates 1 / p(x).
    """
    weights = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for i, size in reversed(list(enumerate(schedule.steps.tolist()))):
        low, high = float(schedule.betas[i]), float(schedule.betas[i + 1])
        z, _ = hamiltonian(log_likelihood, z, high, size, schedule.leapfrog)
        with torch.no_grad():
            weights -= (high - low) * log_likelihood(z).double()
    return weights


def hamiltonian(
    log_likelihood: LogLikelihood, z: Tensor, beta: float, size: float, leapfrog: int
) -> tuple[Tensor, float]:
    """One step of Hamiltonian Monte Carlo for N(z; 0, I) p(x | z)^beta; the share accepted."""

    def energy(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = at.detach().requires_grad_(True)
            value = 0.5 * at.square().sum(1) - beta * log_likelihood(at)
            (slope,) = torch.autograd.grad(value.sum(), [at])
        return value.detach(), slope

    momentum = torch.randn_like(z)
    start, slope = energy(z)
    start = start + 0.5 * momentum.square().sum(1)
    moved, speed = z, momentum - 0.5 * size * slope
    for step in range(leapfrog):
        moved = moved + size * speed
        end, slope = energy(moved)
        speed = speed - (size if step < leapfrog - 1 else 0.5 * size) * slope
    end = end + 0.5 * speed.square().sum(1)
    accept = torch.rand_like(start).log() < start - end  # False where the end is not finite
    return torch.where(accept[:, None], moved, z), float(accept.float().mean())


def gaussian(
    decode: Callable[[Tensor], Tensor], x: Tensor, levels: int, sigma: float
) -> LogLikelihood:
    """log P(x | z) of integer levels under N(decode(z), sigma^2), both where levels span [-1, 1].

    The mass of a level is the integral over its bin; the outer bins reach to infinity.
    """
    half = 1.0 / (levels - 1)
    centre = x.float() * (2 * half) - 1
    top, bottom = x == levels - 1, x == 0

    def log_likelihood(z: Tensor) -> Tensor:
        apart = centre - decode(z).float()
        # by symmetry, in the tail where nothing cancels
        upper = torch.where(top, math.inf, (apart + half) / sigma)
        lower = torch.where(bottom, -math.inf, (apart - half) / sigma)
        flip = apart > 0
        a = torch.where(flip, -lower, upper)
        b = torch.where(flip, -upper, lower)
        return _log_difference(a, b).flatten(1).sum(1)

    return log_likelihood


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(Phi(a) - Phi(b)), a > b; gradients stay finite where either is infinite."""
    whole, none = torch.isinf(a), torch.isinf(b)
    high = torch.special.log_ndtr(torch.where(whole, 0.0, a)).where(~whole, 0.0)
    low = torch.special.log_ndtr(torch.where(none, 0.0, b))
    ratio = torch.exp((low - high).where(~none, -1.0)).clamp(max=1 - 1e-6)
    return high + torch.log1p(-ratio).where(~none, 0.0)


def estimate(weights: Tensor, chains: int) -> Tensor:
    """log of the mean weight of each example's chains, `[N]` of `[N * chains]`."""
    return log_mean_exp(weights.view(-1, chains), 1)
