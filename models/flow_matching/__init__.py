"""Flow matching: Lipman et al. 2023 (arXiv:2210.02747); minibatch optimal transport: Tong et al.
2024 (arXiv:2302.00482), Pooladian et al. 2023 (arXiv:2304.14772).

    path      x_t = (1 - (1 - sigma_min) t) x_0 + t x_1, noise x_0 ~ N(0, I), data x_1 in
              [-1, 1) (uniformly dequantised), `[B, *shape]`
    network   v(x_t, t): a U-Net for images, a multi-layer perceptron for points `[B, 2]`
    loss      |v(x_t, t) - (x_1 - (1 - sigma_min) x_0)|^2, mean over dimensions, t ~ U[0, 1]
    sampling  dx/dt = v(x, t) from t = 0 to 1: euler, heun (2nd order, two evaluations a step)
              in equal steps, or dopri5 (adaptive, by `rtol` and `atol`)
    density   log p(x_1) = log N(x_0) - integral of div v along the same path, backwards by
              dopri5 (Chen et al. 2018); images: Hutchinson's estimate of div v with one fixed
              probe per solution (Grathwohl et al. 2019), points: exact

The latent z is x_0 (`latent_dim` = dimensions); reconstruction integrates back and forth.

With `pairing: optimal_transport` each x_1 of a batch gets the x_0 that an exact assignment
(squared distance) over the whole batch of all workers gives it, instead of its own. That is
the default: on the digits it is better in likelihood and in few steps than `independent`,
which is Lipman et al.

Deviations from the papers: a small U-Net (see `models/unet.py`); levels are dequantised in
training too, since that is the density whose likelihood is measured; heun instead of
Lipman et al.'s dopri5 as the default sampler. `log_prob` of images is the mean over its
draws (dequantisation noise and probe) of the estimated log-density, not the log of a mean:
Hutchinson's noise inside an exponential would raise it above the truth. More draws make it
more precise, not tighter; for points it is the log of the mean, and tighter with more.
The solver's error is judged over the rows of a chunk together, as everywhere with torchdiffeq.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, Fraction, OptimizerConfig, Positive
from models.data import Batch, DataSpec, from_unit
from models.flow_matching.divergence import exact_trace, hutchinson
from models.flow_matching.networks import Perceptron
from models.nn import gather_batch
from models.noise import dequantise, rand, randn, shard
from models.unet import UNet


class FlowMatchingConfig(Config):
    width: Positive = 32  # images: channels at full size; twice as many at all others
    blocks: Positive = 1  # images: residual blocks per size, on the way down and again up
    attention: int = Field(49, ge=0)  # images: self-attention at sizes of at most so many pixels
    dropout: Fraction = 0.0  # images
    hidden: Positive = 128  # points: width of the perceptron
    layers: Positive = 3  # points: hidden layers
    pairing: Literal["independent", "optimal_transport"] = "optimal_transport"
    sigma_min: float = Field(1e-4, ge=0, lt=1)  # spread of the path's end around a data point
    probe: Literal["rademacher", "gaussian"] = "rademacher"  # of Hutchinson's estimator
    likelihood_draws: Positive = 1  # images: at most so many in `log_prob`, whatever is asked for
    rtol: float = Field(1e-3, gt=0)  # of dopri5, in likelihood, reconstruction and sampling
    atol: float = Field(1e-3, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup_steps=100, clip_grad_norm=1.0)


class FlowMatching(GenerativeModel):
    """A continuous flow, trained without solving it."""

    Config = FlowMatchingConfig
    paper = "Lipman et al. 2023, arXiv:2210.02747"
    modalities = frozenset({"image", "points"})
    likelihood = "ode"
    reconstruction = "encode-decode"
    requirements = ("torchdiffeq",)
    config: FlowMatchingConfig

    def __init__(self, config: FlowMatchingConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.most_draws = None if data.modality == "points" else config.likelihood_draws
        self.net: nn.Module
        if data.modality == "points":
            self.net = Perceptron(data.dimensions, config.hidden, config.layers)
        else:
            self.net = UNet(
                data.shape,
                data.shape[0],
                width=config.width,
                blocks=config.blocks,
                attention=config.attention,
                dropout=config.dropout,
            )

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt at time `t`, one number or one per row."""
        return self.net(x, 1000 * t.to(x.dtype).expand(len(x)))

    # -- training -------------------------------------------------------------------------------

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        end = 2 * dequantise(batch.x, self.data.levels)[0] - 1
        start = randn(end.shape, end.device)
        if self.config.pairing == "optimal_transport":
            start = transported(start, end)
        t = rand((len(end),), end.device)
        left = 1 - self.config.sigma_min
        at = t.view(-1, *[1] * (end.ndim - 1))
        x = (1 - left * at) * start + at * end
        error = self.velocity(x, t).float() - (end - left * start)
        return {"loss": error.square().mean()}

    # -- likelihood -----------------------------------------------------------------------------

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density at `y` `[B, *shape]` of [-1, 1], nats `[B]`: estimated for images."""
        exact = self.data.modality == "points"
        probe = None if exact else self._probe(y)

        def backwards(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = state[0].detach().requires_grad_()
                v = self.velocity(x, t)
                trace = exact_trace(v, x) if probe is None else hutchinson(v, x, probe)
            return v.detach(), trace

        noise, change = self._solve(backwards, (y, y.new_zeros(len(y))), (1.0, 0.0))
        prior = -0.5 * (noise.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return prior + change

    def _probe(self, y: Tensor) -> Tensor:
        if self.config.probe == "gaussian":
            return randn(y.shape, y.device).to(y.dtype)
        return (rand(y.shape, y.device) < 0.5).to(y.dtype) * 2 - 1

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Points: log of the mean of the density over `samples` dequantisations. Images: mean of
        its logarithm over min(samples, likelihood_draws) of them, each with a probe of its own."""
        images = self.data.modality != "points"
        draws = min(samples, self.config.likelihood_draws) if images else samples
        total: Tensor | None = None
        for _ in range(draws):
            y, volume = dequantise(x, self.data.levels)
            # the density over y is that over 2 y - 1, times 2 per dimension
            nats = self.log_density(2 * y - 1) + volume + self.data.dimensions * math.log(2)
            if total is None:
                total = nats
            else:
                total = total + nats if images else torch.logaddexp(total, nats)
        assert total is not None
        return total / draws if images else total - math.log(draws)

    @property
    def likelihood_note(self) -> str:
        config = self.config
        solver = f"dopri5, rtol {config.rtol:g}, atol {config.atol:g}"
        if self.data.modality == "points":
            return f"{solver}, exact trace, log of the mean over uniform dequantisations"
        return (
            f"{solver}, 1 {config.probe} probe for each uniform dequantisation, mean of at most "
            f"{config.likelihood_draws}"
        )

    # -- sampling -------------------------------------------------------------------------------

    @property
    def latent_dim(self) -> int:
        return self.data.dimensions

    def _solve(
        self, field: Callable[..., Any], state: tuple[Tensor, ...], span: tuple[float, float]
    ) -> tuple[Tensor, ...]:
        from torchdiffeq import odeint

        t = torch.tensor(span, dtype=state[0].dtype, device=state[0].device)
        settings = {"rtol": self.config.rtol, "atol": self.config.atol, "method": "dopri5"}
        return tuple(path[-1] for path in odeint(field, state, t, **settings))

    def flow(self, x: Tensor, span: tuple[float, float], *, steps: int, solver: str) -> Tensor:
        """`x` at the first time of `span`, moved to the second.

        Raises:
            ValueError: a solver other than euler, heun and dopri5, or `steps` below 1.
        """
        if solver == "dopri5":
            return self._solve(lambda t, state: (self.velocity(state[0], t),), (x,), span)[0]
        if solver not in ("euler", "heun") or steps < 1:
            raise ValueError(f"solver: euler, heun or dopri5, not {solver}; steps: at least 1")
        times = torch.linspace(*span, steps + 1, dtype=x.dtype, device=x.device)
        for t, after in pairwise(times):
            v = self.velocity(x, t)
            if solver == "heun":
                v = (v + self.velocity(x + (after - t) * v, after)) / 2
            x = x + (after - t) * v
        return x

    def reconstruct(self, x: Tensor) -> Tensor:
        """From the middle of each level's bin to the latents and back: exact up to the solver."""
        y = (x.to(torch.get_default_dtype()) + 0.5) * (2 / self.data.levels) - 1
        z = self.flow(y, (1.0, 0.0), steps=1, solver="dopri5")
        return self._levels(self.flow(z, (0.0, 1.0), steps=1, solver="dopri5"))

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        steps: int = 8,
        solver: str = "heun",
    ) -> Tensor:
        if z is None:
            z = temperature * randn((n, self.data.dimensions), self.device)
        x = z.view(n, *self.data.shape)
        return self._levels(self.flow(x, (0.0, 1.0), steps=steps, solver=solver))

    def _levels(self, y: Tensor) -> Tensor:
        return from_unit((y.float() + 1) / 2, self.data.levels)


def transported(start: Tensor, end: Tensor) -> Tensor:
    """The noise for each row of `end`: what an exact assignment of the whole batch gives it.

    `start` and `end` `[B, ...]` are this worker's rows; every worker solves the same problem.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        sources, targets = gather_batch(start), gather_batch(end)
        cost = torch.cdist(targets.flatten(1).double(), sources.flatten(1).double()).square()
        _, chosen = linear_sum_assignment(cost.cpu().numpy())
        rank, world = shard()
        mine = torch.from_numpy(chosen).to(start.device)
        mine = mine[rank * len(start) : (rank + 1) * len(start)] if world > 1 else mine
        return sources[mine]
