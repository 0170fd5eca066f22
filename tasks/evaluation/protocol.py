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

from models.base import PLURALS, GenerativeModel
from tasks.data.shards import Split
from tasks.evaluation import (
    anomaly,
    classifier,
    conditions,
    decoder,
    fidelity,
    likelihood,
    reconstruction,
    translation,
)
from tasks.evaluation.features import Extractor
from tasks.evaluation.manifold import manifold_metrics

PROTOCOL_VERSION = 3
CHUNK = 128  # images at a time, for reconstruction
UNTRAINED = 2_000  # samples of the untrained network: its distance needs no precision

Images = NDArray[np.uint8]


@dataclass
class Measured:
    """What one family's evaluation found.

    Attributes:
        metrics: flat, name -> number or short text.
        not_applicable: name -> why there is no number.
        samples: all drawn samples, levels `[n, *shape]`.
        pairs: originals and their reconstructions, or None.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    conditional: bool = False  # whether the samples were asked for with conditions
    truth: bool = True  # whether the label of a test row is what its sample was asked to be
    samples: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None


@dataclass
class Yardstick:
    """What every family is held against: real data, and the networks that look at them."""

    train: Images
    validation: Images
    test: Split
    extractor: Extractor | None  # None: not images, which is where features are known
    judge: classifier.Classifier | None  # sorts samples into the dataset's classes
    entropy: float | None = None  # of the density that the data were drawn from, nats


@torch.no_grad()
def measure(
    model: GenerativeModel,
    untrained: GenerativeModel,
    yardstick: Yardstick,
    *,
    samples: int,
    batch_size: int,
    likelihood_examples: int,
    likelihood_draws: dict[str, int],
    anomaly_images: int,
    ais: decoder.AISConfig,
    reconstruction_images: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Measured:
    """Measure `model`, which is on its device and in evaluation mode.

    Samples are asked for with the conditions of the test split, row by row. `untrained` is the
    same family as it was before training: how far it came.
    """
    found, test, source = Measured(), yardstick.test, model.data.source
    found.conditional = bool(model.conditions)
    found.truth = "source" not in model.conditions or (source is not None and source.truth)
    torch.manual_seed(seed)
    begun = time.perf_counter()
    if source is not None:  # a translator has no more: the distance falls with their number
        samples = min(samples, len(test.x), len(test.source if test.source is not None else test.x))
    drawn = conditions.draw(model, test, samples, batch_size, say)
    found.metrics["sample_images_per_second"] = len(drawn) / (time.perf_counter() - begun)
    found.metrics["samples"] = len(drawn)
    found.samples = drawn
    if yardstick.extractor is None:
        reason = f"there are no features of {PLURALS[model.data.modality]}"
        found.not_applicable |= {"frechet_distance": reason, "kid": reason, "coverage": reason}
    else:
        before = conditions.draw(untrained, test, min(samples, UNTRAINED), batch_size)
        say("fidelity")
        _fidelity(found, drawn.numpy(), before.numpy(), yardstick, yardstick.extractor)
    say("likelihood")
    # where the entropy is known the error of the difference is what counts: all points
    measured = test.x if yardstick.entropy is not None else test.x[:likelihood_examples]
    metrics, reasons = likelihood.measure(model, measured, likelihood_draws, yardstick.entropy)
    found.metrics |= metrics
    found.not_applicable |= reasons
    _anomaly(found, model, yardstick, anomaly_images, likelihood_draws)
    _decoder(found, model, yardstick, ais, say)
    say("reconstruction")
    if "source" in model.conditions:
        _translation(found, model, drawn.numpy(), yardstick)
        _cycle(found, model, test.x[:reconstruction_images])
    else:
        _reconstruction(found, model, test.x[:reconstruction_images])
    return found


def _fidelity(
    found: Measured, samples: Images, untrained: Images, yardstick: Yardstick, extract: Extractor
) -> None:
    """Samples against the test split on features, the train-vs-test floor beside each number."""
    metrics, test = found.metrics, yardstick.test
    fake, train, real = extract(samples), extract(yardstick.train), extract(test.x)
    metrics["features"], metrics["features_sha256"] = extract.name, extract.sha256
    metrics["frechet_distance"] = fidelity.frechet_distance(fake, real)
    metrics["frechet_distance_std"] = fidelity.frechet_distance_spread(fake, real)
    count = min(len(fake), len(train))  # the floors at the same number: they depend on it
    metrics["frechet_distance_floor"] = fidelity.frechet_distance(train[:count], real)
    metrics["frechet_distance_untrained"] = fidelity.frechet_distance(extract(untrained), real)
    metrics["kid"], metrics["kid_std"] = fidelity.kid(fake, real)
    metrics["kid_floor"], _ = fidelity.kid(train[:count], real)
    metrics["manifold_samples"] = count
    metrics |= manifold_metrics(real, fake[:count])
    floors = manifold_metrics(real, train[:count])
    metrics |= {f"{name}_floor": value for name, value in floors.items()}
    if yardstick.judge is not None and yardstick.judge.task == "classes":
        shares = classifier.class_shares(yardstick.judge, samples)
        metrics["class_share_min"] = float(shares.min())
        metrics["class_shares"] = [round(float(s), 4) for s in shares]
    else:
        found.not_applicable["class_share_min"] = "the dataset has no classes"
    _obedience(found, samples, fake, real, yardstick)


def _obedience(
    found: Measured,
    samples: Images,
    fake: NDArray[np.float32],
    real: NDArray[np.float32],
    yardstick: Yardstick,
) -> None:
    judge, test = yardstick.judge, yardstick.test
    if not found.conditional:
        found.not_applicable["condition_accuracy"] = "the family takes no condition"
    elif judge is None or judge.task == "rotations":
        found.not_applicable["condition_accuracy"] = "the dataset has no classes"
    elif not found.truth:
        found.not_applicable["condition_accuracy"] = "the classes of the sources are not known"
    else:
        found.metrics |= conditions.obedience(samples, test, judge, fake, real)


def _anomaly(
    found: Measured,
    model: GenerativeModel,
    yardstick: Yardstick,
    images: int,
    draws: dict[str, int],
) -> None:
    """Whether the likelihood knows the data from something else of the same size."""
    if "nats" not in found.metrics:
        found.not_applicable["anomaly_auroc"] = found.not_applicable["nats"]
    elif model.data.modality != "image":
        found.not_applicable["anomaly_auroc"] = "it is measured with images of letters"
    else:
        test = yardstick.test.x[:images]
        found.metrics |= anomaly.measure(model, yardstick.validation[:images], test, draws)


def _decoder(
    found: Measured,
    model: GenerativeModel,
    yardstick: Yardstick,
    config: decoder.AISConfig,
    say: Callable[[str], None],
) -> None:
    """Stand-ins for the likelihood of a family that has none, but has a decoder."""
    if model.likelihood != "none" or not model.decodes:
        return
    assert found.samples is not None
    validation, test = yardstick.validation, yardstick.test.x
    if config.images:
        found.metrics |= decoder.annealed(model, validation, test, config, say)
    found.metrics |= decoder.kernel_density(
        found.samples.numpy(), validation, test, model.data.levels
    )


def _translation(
    found: Measured, model: GenerativeModel, drawn: Images, yardstick: Yardstick
) -> None:
    data, test = model.data, yardstick.test
    assert data.source is not None
    assert test.source is not None
    assert yardstick.extractor is not None
    if not data.source.truth:
        reason = "the true image of a source is not known"
        found.not_applicable |= {"psnr": reason, "ssim": reason, "perceptual_distance": reason}
        return
    n = len(drawn)
    metrics, reasons = translation.measure(
        drawn, test.x[:n], test.source[:n], data, yardstick.extractor
    )
    found.metrics |= metrics
    found.not_applicable |= reasons
    if "condition_accuracy" in found.metrics and test.label is not None:
        # how much of it the untranslated sources have
        copied = translation.naive(test.source[:n], data.source, data)
        assert yardstick.judge is not None
        right = classifier.predict(yardstick.judge, copied) == test.label[:n]
        found.metrics["condition_accuracy_floor"] = float(right.mean())


def _cycle(found: Measured, model: GenerativeModel, test: Images) -> None:
    """There and back again, for a family that can go back."""
    if model.reconstruction != "cycle":
        return
    rendered = _rendered(found, model, test)
    value = reconstruction.psnr(test, rendered, model.data.levels)
    if math.isfinite(value):
        found.metrics["cycle_psnr"] = value
    else:
        found.not_applicable["cycle_psnr"] = "infinite: every image comes back exactly"
    found.metrics["cycle_ssim"] = reconstruction.ssim(test, rendered, model.data.levels)


def _reconstruction(found: Measured, model: GenerativeModel, test: Images) -> None:
    if model.reconstruction == "none" or model.data.modality != "image":
        reason = "the family cannot reconstruct"
        if model.data.modality != "image":
            reason = "it is a measure of images"
        found.not_applicable |= {"psnr": reason, "ssim": reason}
        return
    rendered = _rendered(found, model, test)
    found.metrics["reconstruction_kind"] = model.reconstruction
    found.metrics["reconstruction_images"] = len(test)
    levels = model.data.levels
    value = reconstruction.psnr(test, rendered, levels)
    if math.isfinite(value):
        found.metrics["psnr"] = value
    else:
        found.not_applicable["psnr"] = "infinite: every image is reconstructed exactly"
    found.metrics["ssim"] = reconstruction.ssim(test, rendered, levels)
    found.metrics["ssim_window"] = reconstruction.ssim_window(test.shape[-2:])


def _rendered(found: Measured, model: GenerativeModel, test: Images) -> Images:
    x = torch.from_numpy(test).to(model.device)
    rendered = torch.cat([model.reconstruct(part).cpu() for part in x.split(CHUNK)])
    found.pairs = (x[:32].cpu(), rendered[:32])
    return rendered.numpy()
