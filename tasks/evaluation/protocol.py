"""The protocol: what is measured of every family, in the same way, on the test split.

Each group returns its numbers; a number that does not apply is absent, and the reason stands
under `not_applicable`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import GenerativeModel
from tasks.evaluation import classifier, fidelity, reconstruction
from tasks.evaluation.features import Extractor

PROTOCOL_VERSION = 1
CHUNK = 128  # images at a time, for likelihood and reconstruction

Images = NDArray[np.uint8]


@dataclass
class Measured:
    """What one family's evaluation found.

    Attributes:
        metrics: flat, name -> number or short text.
        not_applicable: name -> why there is no number.
        samples: the first of the drawn samples, levels `[n, C, H, W]`.
        pairs: originals and their reconstructions, or None.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    samples: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None


@dataclass
class Yardstick:
    """What every family is held against: real images, and the networks that look at them."""

    train: Images
    test: Images
    extractor: Extractor
    judge: classifier.Classifier  # sorts samples into the dataset's classes


@torch.no_grad()
def measure(
    model: GenerativeModel,
    yardstick: Yardstick,
    *,
    samples: int,
    batch_size: int,
    likelihood_images: int,
    likelihood_samples: int,
    reconstruction_images: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Measured:
    """Measure `model`, which is on its device and in evaluation mode."""
    found = Measured()
    torch.manual_seed(seed)
    begun = time.perf_counter()
    drawn = _draw(model, samples, batch_size, say)
    found.metrics["sample_images_per_second"] = samples / (time.perf_counter() - begun)
    found.metrics["samples"] = samples
    found.samples = drawn[:64]
    say("fidelity")
    _fidelity(found, drawn.numpy(), yardstick)
    say("likelihood")
    _likelihood(found, model, yardstick.test[:likelihood_images], likelihood_samples)
    say("reconstruction")
    _reconstruction(found, model, yardstick.test[:reconstruction_images])
    return found


def _draw(model: GenerativeModel, n: int, size: int, say: Callable[[str], None]) -> Tensor:
    parts, shown = [], time.monotonic()
    for start in range(0, n, size):
        parts.append(model.sample(min(size, n - start)).cpu())
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"sampled {start + len(parts[-1]):,}/{n:,}")
    return torch.cat(parts)


def _fidelity(found: Measured, samples: Images, yardstick: Yardstick) -> None:
    """Fréchet distance and KID against the test split, the train-vs-test floor beside them."""
    extract, metrics = yardstick.extractor, found.metrics
    fake, train, test = extract(samples), extract(yardstick.train), extract(yardstick.test)
    metrics["features"], metrics["features_sha256"] = extract.name, extract.sha256
    metrics["frechet_distance"] = fidelity.frechet_distance(fake, test)
    metrics["frechet_distance_std"] = fidelity.frechet_distance_spread(fake, test)
    metrics["frechet_distance_floor"] = fidelity.frechet_distance(train, test)
    metrics["kid"], metrics["kid_std"] = fidelity.kid(fake, test)
    metrics["kid_floor"], _ = fidelity.kid(train, test)
    if yardstick.judge.task == "classes":
        shares = classifier.class_shares(yardstick.judge, samples)
        metrics["class_share_min"] = float(shares.min())
        metrics["class_shares"] = [round(float(s), 4) for s in shares]
    else:
        found.not_applicable["class_share_min"] = "the dataset has no classes"


def _likelihood(found: Measured, model: GenerativeModel, test: Images, draws: int) -> None:
    if model.likelihood == "none":
        reason = "the family has no likelihood"
        found.not_applicable |= {"nats": reason, "bits_per_dim": reason}
        return
    x = torch.from_numpy(test).to(model.device)
    nats = torch.cat([-model.log_prob(part, samples=draws) for part in x.split(CHUNK)])
    mean = float(nats.double().mean())
    if not math.isfinite(mean):
        reason = f"{int((~nats.isfinite()).sum())} of {len(x)} test images have none that is finite"
        found.not_applicable |= {"nats": reason, "bits_per_dim": reason}
        return
    per_dim = model.data.dimensions * math.log(2)
    found.metrics |= {
        "nats": mean,
        "bits_per_dim": mean / per_dim,
        "bits_per_dim_std_error": float(nats.double().std()) / math.sqrt(len(x)) / per_dim,
        "likelihood_kind": model.likelihood,
        "likelihood_draws": draws,
        "likelihood_images": len(x),
    }


def _reconstruction(found: Measured, model: GenerativeModel, test: Images) -> None:
    if model.reconstruction == "none":
        reason = "the family cannot reconstruct"
        found.not_applicable |= {"psnr": reason, "ssim": reason}
        return
    x = torch.from_numpy(test).to(model.device)
    rendered = torch.cat([model.reconstruct(part).cpu() for part in x.split(CHUNK)])
    found.pairs = (x[:32].cpu(), rendered[:32])
    found.metrics["reconstruction_kind"] = model.reconstruction
    found.metrics["reconstruction_images"] = len(x)
    levels = model.data.levels
    value = reconstruction.psnr(test, rendered.numpy(), levels)
    if math.isfinite(value):
        found.metrics["psnr"] = value
    else:
        found.not_applicable["psnr"] = "infinite: every image is reconstructed exactly"
    found.metrics["ssim"] = reconstruction.ssim(test, rendered.numpy(), levels)
    found.metrics["ssim_window"] = reconstruction.ssim_window(test.shape[-2:])
