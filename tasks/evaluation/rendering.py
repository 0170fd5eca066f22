"""The reconstruction group: test images encoded and decoded, inverted, or translated."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from models.base import GenerativeModel
from models.data import counting_nans
from tasks.evaluation import classifier, reconstruction, translation
from tasks.evaluation.measured import Measured
from tasks.evaluation.quality import Yardstick

Images = NDArray[np.uint8]
CHUNK = 128  # images at a time


def measure(found: Measured, model: GenerativeModel, yardstick: Yardstick, images: int) -> None:
    """PSNR and SSIM of the first `images` of the test split, or of all the translations drawn."""
    test = yardstick.test.x[:images]
    if "source" in model.conditions:
        _translation(found, model, yardstick)
        _cycle(found, model, test)
    else:
        _reconstruction(found, model, test)


def _translation(found: Measured, model: GenerativeModel, yardstick: Yardstick) -> None:
    data, test = model.data, yardstick.test
    assert data.source is not None
    assert test.source is not None
    assert yardstick.extractor is not None
    assert found.samples is not None
    if not data.source.truth:
        reason = "the true image of a source is not known"
        found.not_applicable |= {"psnr": reason, "ssim": reason, "perceptual_distance": reason}
        return
    drawn = found.samples.numpy()
    n = len(drawn)
    found.add(translation.measure(drawn, test.x[:n], test.source[:n], data, yardstick.extractor))
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
    rendered = _rendered(found, model, test, "cycle_psnr", "cycle_ssim")
    if rendered is None:
        return
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
    rendered = _rendered(found, model, test, "psnr", "ssim")
    if rendered is None:
        return
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


def _rendered(found: Measured, model: GenerativeModel, test: Images, *names: str) -> Images | None:
    """Reconstructions of `test`; None, with the reason under `names`, where any is no image."""
    x = torch.from_numpy(test).to(model.device)
    with counting_nans() as spoilt:
        rendered = torch.cat([model.reconstruct(part).cpu() for part in x.split(CHUNK)])
    if any(spoilt):
        bad = min(sum(spoilt), len(test))
        reason = f"{bad} of {len(test)} reconstructions hold values that are not numbers"
        found.not_applicable |= dict.fromkeys(names, reason)
        return None
    found.pairs = (x[:32].cpu(), rendered[:32])
    return rendered.numpy()
