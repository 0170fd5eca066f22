"""What stands in for a likelihood of families that have a decoder but no density.

Annealed importance sampling with the bidirectional gap, and the historical kernel density
estimate under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, Positive
from models.data import from_signed, to_signed
from tasks.evaluation import ais

Images = NDArray[np.uint8]
TUNED_ON = 32  # images whose chains set the step sizes
FITTED_ON = 128  # validation images whose inversion sets the noise
KERNEL_IMAGES = 1_000  # of either split
DEVIATIONS = [0.02 * 50 ** (i / 15) for i in range(16)]  # of kernels, where levels span [0, 1]


class AISConfig(Config):
    """`evaluation.ais`: annealed importance sampling of decoders without a density."""

    images: int = Field(64, ge=0)  # of the test split; 0: leave it out
    chains: Positive = 4  # for each image
    steps: Positive = 200  # inverse temperatures
    leapfrog: Positive = 10  # gradient evaluations in each step


def annealed(
    model: GenerativeModel,
    validation: Images,
    test: Images,
    config: AISConfig,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """`ais_nats` of the discrete test images under the decoder with Gaussian noise around it.

    The noise is what inverting validation images leaves over. `ais_gap_nats`: how far apart the
    lower and the upper estimate are on images that the model made; the error of `ais_nats` is
    of that order.
    """
    device, levels, dim = model.device, model.data.levels, model.latent_dim
    assert dim is not None
    x = torch.from_numpy(test[: config.images]).to(device)
    known = torch.from_numpy(validation[:FITTED_ON]).to(device)
    residual = to_signed(known, levels) - to_signed(model.reconstruct(known), levels)
    sigma = max(float(residual.square().mean().sqrt()), 1.0 / (levels - 1))

    def observed(images: Tensor) -> ais.LogLikelihood:
        rows = images.repeat_interleave(config.chains, 0)
        return ais.gaussian(model.decode, rows, levels, sigma)

    def prior(n: int) -> Tensor:
        return torch.randn(n * config.chains, dim, device=device)

    few = x[:TUNED_ON]
    schedule = ais.tuned(observed(few), prior(len(few)), config.steps, leapfrog=config.leapfrog)
    say(f"annealing {len(x)} test images, sigma {sigma:.3f}")
    found = ais.estimate(ais.forward(observed(x), prior(len(x)), schedule), config.chains)
    say(f"annealing {len(x)} images of its own, both ways")
    z = torch.randn(len(x), dim, device=device)
    mean = model.decode(z)
    made = from_signed(mean + sigma * torch.randn_like(mean), levels)
    log_likelihood = observed(made)
    below = ais.estimate(ais.forward(log_likelihood, prior(len(x)), schedule), config.chains)
    start = z.repeat_interleave(config.chains, 0)
    above = -ais.estimate(ais.backward(log_likelihood, start, schedule), config.chains)
    nats = -float(found.mean())
    return {
        "ais_nats": nats,
        "ais_nats_std_error": float(found.std()) / math.sqrt(len(x)),
        "ais_bits_per_dim": nats / (model.data.dimensions * math.log(2)),
        "ais_gap_nats": float((above - below).mean()),
        "ais_sigma": sigma,
        **{f"ais_{name}": float(value) for name, value in config.model_dump().items()},
    }


def kernel_density(
    samples: Images, validation: Images, test: Images, levels: int
) -> dict[str, float]:
    """`kde_log_density`: the Parzen window estimate of Goodfellow et al. 2014. Historical.

    Mean log-density of the test images, scaled to [0, 1], under Gaussians around the samples,
    whose deviation is the best on the validation images. It is a density, not a probability of
    levels, and it ranks models wrongly (Theis et al. 2016): it is here to be compared with old
    papers, and with nothing else.
    """
    tried = _parzen(samples, validation[:KERNEL_IMAGES], levels, DEVIATIONS)
    best = DEVIATIONS[int(tried.argmax())]
    found = _parzen(samples, test[:KERNEL_IMAGES], levels, [best])
    return {"kde_log_density": float(found[0]), "kde_deviation": best}


def _parzen(samples: Images, x: Images, levels: int, deviations: Sequence[float]) -> Tensor:
    """Mean log-density of `x` for each deviation."""
    centres, rows = (
        torch.from_numpy(part.reshape(len(part), -1)).double() / (levels - 1)
        for part in (samples, x)
    )
    total = torch.zeros(len(deviations), dtype=torch.float64)
    for part in rows.split(128):
        squared = torch.cdist(part, centres).square()
        for i, deviation in enumerate(deviations):
            total[i] += torch.logsumexp(squared / (-2 * deviation**2), 1).sum()
    widths = torch.tensor(deviations, dtype=torch.float64)
    constant = math.log(len(centres)) + rows.shape[1] * (widths * math.sqrt(2 * math.pi)).log()
    return total / len(rows) - constant
