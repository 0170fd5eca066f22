"""The protocol: what is measured of every family, in the same way, on the test split.

Each group returns its numbers; a number that does not apply is absent, and the reason stands
under `not_applicable`. What would make every number meaningless raises `Unmeasurable`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import GenerativeModel
from models.data import counting_nans
from tasks.data.shards import Split
from tasks.evaluation import (
    anomaly,
    classes,
    conditions,
    decoder,
    likelihood,
    memorisation,
    quality,
    rendering,
)
from tasks.evaluation import usefulness as useful
from tasks.evaluation.measured import Measured, Unmeasurable
from tasks.evaluation.quality import Yardstick

# 4: `kid_std_error`, `frechet_distance_train`, `inception_score`, distances by class, memorisation;
#    usefulness (`cas`, `small_set_gain`); no Fréchet distance where rows do not outnumber
#    features; a family whose weights or samples are not numbers fails; the rarest class is one
#    that the test split has
PROTOCOL_VERSION = 4
UNTRAINED = 2_000  # samples of the untrained network: its distance needs no precision


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
    usefulness: useful.UsefulnessConfig,
    seed: int,
    say: Callable[[str], None] = print,
) -> Measured:
    """Measure `model`, which is on its device and in evaluation mode.

    Samples are asked for with the conditions of the test split, row by row. `untrained` is the
    same family as it was before training: how far it came.

    Raises:
        Unmeasurable: the weights, or values behind samples, are not numbers; sampling fails.
    """
    check_weights(model)
    found, test, source = Measured(), yardstick.test, model.data.source
    found.conditional = bool(model.conditions)
    found.truth = "source" not in model.conditions or (source is not None and source.truth)
    torch.manual_seed(seed)
    begun = time.perf_counter()
    if source is not None:  # a translator has no more: the distance falls with their number
        samples = min(samples, len(test.x), len(test.source if test.source is not None else test.x))
    drawn = _drawn(model, test, samples, batch_size, say)
    found.metrics["sample_images_per_second"] = len(drawn) / (time.perf_counter() - begun)
    found.metrics["samples"] = len(drawn)
    found.samples = drawn
    if yardstick.extractor is None:
        found.not_applicable |= quality.none(model.data.modality)
    else:
        before = _untrained(untrained, yardstick, min(samples, UNTRAINED), batch_size)
        say("fidelity")
        _fidelity(found, drawn.numpy(), before, yardstick)
    say("likelihood")
    # where the entropy is known the error of the difference is what counts: all points
    measured = test.x if yardstick.entropy is not None else test.x[:likelihood_examples]
    found.add(likelihood.measure(model, measured, likelihood_draws, yardstick.entropy, say))
    _anomaly(found, model, yardstick, anomaly_images, likelihood_draws)
    _decoder(found, model, yardstick, ais, say)
    say("reconstruction")
    rendering.measure(found, model, yardstick, reconstruction_images)
    say("usefulness")
    found.add(useful.measure(model, yardstick.train, test, usefulness, seed))
    _only_numbers(found)
    return found


def check_weights(model: GenerativeModel) -> None:
    """Raises Unmeasurable, with the tensor's name, where a weight is not finite.

    Buffers may hold infinities (the logarithm of a probability 0, a mask), but no NaN.
    """
    weights = ((name, tensor, ~tensor.isfinite()) for name, tensor in model.named_parameters())
    buffers = ((name, tensor, tensor.isnan()) for name, tensor in model.named_buffers())
    for name, tensor, bad in chain(weights, buffers):
        if bad.any():
            raise Unmeasurable(
                f"{int(bad.sum())} of {tensor.numel()} weights in {name} are not finite"
            )


def _drawn(
    model: GenerativeModel,
    test: Split,
    n: int,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """Samples; Unmeasurable where drawing them fails, or where they are no levels of anything."""
    with counting_nans() as spoilt:
        try:
            drawn = conditions.draw(model, test, n, batch_size, say)
        except Exception as error:  # whatever a family's code raises: its evaluation ends here
            raise Unmeasurable(f"sampling failed: {type(error).__name__}: {error}") from error
    if any(spoilt):
        bad = min(sum(spoilt), len(drawn))
        raise Unmeasurable(f"{bad:,} of {len(drawn):,} samples hold values that are not numbers")
    if int(drawn.max()) >= model.data.levels:
        raise Unmeasurable(f"samples hold level {int(drawn.max())}, of {model.data.levels}")
    return drawn


def _untrained(
    model: GenerativeModel, yardstick: Yardstick, n: int, batch_size: int
) -> NDArray[np.float32] | None:
    """Features of an untrained network's samples; None where those are not even numbers."""
    assert yardstick.extractor is not None
    try:
        features = yardstick.extractor(_drawn(model, yardstick.test, n, batch_size))
    except Unmeasurable:
        return None
    return features if np.isfinite(features).all() else None


def _only_numbers(found: Measured) -> None:
    """No infinity and no NaN among the metrics, whatever group it came from."""
    for name, value in list(found.metrics.items()):
        if isinstance(value, float) and not math.isfinite(value):
            del found.metrics[name]
            found.not_applicable[name] = f"the value is {value}"


def _fidelity(
    found: Measured,
    samples: NDArray[np.uint8],
    before: NDArray[np.float32] | None,
    yardstick: Yardstick,
) -> None:
    """Samples against the real splits: distances, classes, copies."""
    seen, label = quality.look(samples, yardstick), yardstick.test.label
    spoilt = quality.spoilt(seen)
    found.not_applicable |= spoilt
    found.add(memorisation.measure(seen, yardstick, finite=not spoilt))
    if spoilt:
        return
    found.neighbours = memorisation.neighbours(seen, yardstick)
    found.add(quality.measure(seen, before, yardstick))
    asked = None
    if found.conditional and found.truth and label is not None:
        asked = label[np.arange(len(samples)) % len(label)]
    found.add(classes.measure(seen, yardstick, asked))
    if "condition_accuracy" not in found.metrics:
        reason = "the dataset has no classes"
        if not found.conditional:
            reason = "the family takes no condition"
        elif seen.answers is not None:
            reason = "the classes of the sources are not known"
        found.not_applicable["condition_accuracy"] = reason


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
