"""Mixture of Gaussians: Dempster, Laird & Rubin 1977, "Maximum likelihood from incomplete data".

    density   p(y) = sum_k weight_k N(y; mean_k, Sigma_k), y in [0, 1) the dequantised levels
    state     weight [K], mean [K, D], whiten = the Cholesky factor P of each inverse covariance:
              full [K, D, D], tied [D, D], diag [K, D], spherical [K]; Sigma^-1 = P P^T
    training  each `fit` is one iteration of EM by scikit-learn's GaussianMixture, which starts
              from k-means; converged when the mean log-likelihood gains less than `tol`
    loss      -log P(x) <= -log p(x + u), nats per example, before the iteration's M-step

The likelihood is exact in the sense of a normalising flow: the density is, and P(x) is the mean
of it over uniform dequantisation noise (Theis et al. 2016), a bound for a finite number of draws.

Deviations from the paper: every variance has `reg_covar` added, so EM climbs the likelihood only
up to that; the train split is dequantised once, `noise_draws` times over, and EM sees always the
same noise (and the same part, where that is more than `fit_values`), so that it converges. What
the Gaussians put outside of [0, 1) is lost to the likelihood, and clamped in samples.
`covariance: auto` is full up to 256 values in an example and diag above: over 60,000 images of
28 x 28 an iteration of full covariance takes a minute or more, one of diag two seconds (and
k-means before the first half a minute).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel, Phase
from models.config import Config, Positive
from models.data import Batch, DataSpec, from_unit
from models.noise import dequantise, rand, randn

FULL = 256  # values in an example up to which `auto` takes full covariances


class GMMConfig(Config):
    components: Positive = 10
    covariance: Literal["auto", "full", "tied", "diag", "spherical"] = "auto"
    reg_covar: float = Field(0.05, gt=0)  # added to every variance, in squared levels
    noise_draws: Positive = 2  # dequantised copies of each example in the data that EM sees
    fit_values: Positive = 50_000_000  # of them all, at most; a random part of more than that
    tol: float = Field(1e-3, ge=0)  # nats per example that an iteration must gain
    iterations: Positive = 200  # of EM, at most


class GMM(GenerativeModel):
    """Gaussians over whole examples."""

    Config = GMMConfig
    paper = "Dempster et al. 1977, doi:10.1111/j.2517-6161.1977.tb01600.x"
    modalities = frozenset({"image", "points"})
    likelihood = "exact"
    config: GMMConfig
    weight: Tensor
    mean: Tensor
    whiten: Tensor
    seed: Tensor
    iteration: Tensor
    bound: Tensor
    done: Tensor

    def __init__(self, config: GMMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        k, d = config.components, data.dimensions
        kind = config.covariance
        self.kind = ("full" if d <= FULL else "diag") if kind == "auto" else kind
        unit = {
            "full": torch.eye(d).expand(k, d, d),
            "tied": torch.eye(d),
            "diag": torch.ones(k, d),
            "spherical": torch.ones(k),
        }[self.kind]
        # double precision: scikit-learn's own, so that an iteration resumes where it was
        self.register_buffer("weight", torch.full((k,), 1 / k, dtype=torch.float64))
        self.register_buffer("mean", torch.full((k, d), 0.5, dtype=torch.float64))
        self.register_buffer("whiten", (unit / 0.3).double())  # broad, over the whole range
        self.register_buffer("seed", torch.zeros((), dtype=torch.long))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.register_buffer("bound", torch.zeros((), dtype=torch.float64))
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))

    def phases(self) -> tuple[Phase, ...]:
        return ()

    def fit(self, data: Batch) -> dict[str, Tensor]:
        import numpy as np
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        first = int(self.iteration) == 0
        if first:
            self.seed.copy_(torch.randint(2**31, ()))
        estimator = GaussianMixture(
            self.config.components,
            covariance_type=self.kind,
            tol=0.0,
            reg_covar=self.config.reg_covar / self.data.levels**2,
            max_iter=1,
            warm_start=True,
            random_state=np.random.RandomState(int(self.seed)),
        )
        if not first:  # these make a fitted estimator of it, from which warm_start goes on
            estimator.weights_ = self.weight.cpu().numpy()
            estimator.means_ = self.mean.cpu().numpy()
            estimator.precisions_cholesky_ = self.whiten.cpu().numpy()
            estimator.lower_bound_, estimator.converged_ = float(self.bound), False
        y, volume = self._dequantised(data.x.cpu())
        with warnings.catch_warnings():  # one iteration never converges
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(y.numpy())
        self.weight.copy_(torch.from_numpy(estimator.weights_))
        self.mean.copy_(torch.from_numpy(estimator.means_))
        self.whiten.copy_(torch.from_numpy(estimator.precisions_cholesky_))
        bound = float(estimator.lower_bound_)
        stalled = not first and bound - float(self.bound) < self.config.tol
        self.bound.fill_(bound)
        self.iteration += 1
        self.done.fill_(stalled or int(self.iteration) >= self.config.iterations)
        return {"loss": torch.tensor(-bound - volume)}

    def _dequantised(self, x: Tensor) -> tuple[Tensor, float]:
        """The train split, up to `[N * noise_draws, D]`, as EM sees it at every iteration alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.seed))
            x = x.repeat(self.config.noise_draws, *[1] * (x.ndim - 1))
            limit = max(2, self.config.components, self.config.fit_values // self.data.dimensions)
            if len(x) > limit:
                x = x[rand((len(x),), x.device).argsort()[:limit]]
            y, volume = dequantise(x, self.levels)
        return y.flatten(1).double(), volume

    @property
    def levels(self) -> int:
        return self.data.levels

    @property
    def converged(self) -> bool:
        return bool(self.done)

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of `y` in [0, 1), `[B, D]`: nats, `[B]`, in double precision."""
        y, d = y.double(), self.data.dimensions
        parts = []
        for k, mean in enumerate(self.mean):
            factor = self.whiten if self.kind == "tied" else self.whiten[k]
            if factor.ndim == 2:
                white, log_det = (y - mean) @ factor, factor.diagonal().log().sum()
            else:
                white, log_det = (y - mean) * factor, factor.log().expand(d).sum()
            parts.append(log_det - 0.5 * white.square().sum(1))
        log_weight = self.weight.log() - 0.5 * d * math.log(2 * math.pi)
        return torch.logsumexp(torch.stack(parts, 1) + log_weight, 1)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """log P(x) >= log of the mean of p(x + u) over `samples` draws of dequantisation noise."""
        total: Tensor | None = None  # a running log-sum, so that memory does not grow with samples
        for _ in range(samples):
            y, volume = dequantise(x, self.levels)
            part = self.log_density(y.flatten(1)) + volume
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return (total - math.log(samples)).float()

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
        """Temperature scales the deviations from the means; 0: the heaviest component's mean."""
        if z is not None:
            raise ValueError("a mixture of Gaussians has no continuous latents to be given")
        if temperature == 0:
            chosen = self.weight.argmax().expand(n)
        else:
            steps = self.weight.cumsum(0)[:-1].contiguous()
            chosen = torch.searchsorted(steps, rand((n,), self.device).double(), right=True)
        noise = temperature * randn((n, self.data.dimensions), self.device).double()
        y = torch.empty_like(noise)
        for k, mean in enumerate(self.mean):
            rows = (chosen == k).nonzero()[:, 0]
            factor = self.whiten if self.kind == "tied" else self.whiten[k]
            if factor.ndim == 2:  # y - mean = P^-T noise
                apart = torch.linalg.solve_triangular(factor.T, noise[rows].T, upper=False).T
            else:
                apart = noise[rows] / factor
            y[rows] = mean + apart
        return from_unit(y, self.levels).view(n, *self.data.shape)
