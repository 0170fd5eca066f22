"""Translation: how near the outputs come to the true images, and what doing nothing would score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.data import DataSpec, SourceSpec
from tasks.data.derive import resized
from tasks.evaluation import reconstruction
from tasks.evaluation.features import Extractor

Images = NDArray[np.uint8]
KINDS = {
    "pair": "translation",
    "edges": "translation",
    "low_resolution": "super-resolution",
    "masked": "in-painting",
}
FLOORS = {
    "pair": "copy of the input",
    "edges": "copy of the input",
    "low_resolution": "bicubic",
    "masked": "mean fill",
}


def naive(source: Images, spec: SourceSpec, data: DataSpec) -> Images:
    """What costs nothing, in the images' shape: the input copied, or enlarged, or its hole filled
    with the mean of the pixels that are known."""
    if spec.kind == "masked":
        image, hole = source[:, :-1].astype(np.float64), source[:, -1:] > 0
        known = np.broadcast_to(~hole, image.shape)
        mean = (image * known).sum((2, 3)) / known.sum((2, 3)).clip(1)
        return np.where(hole, mean[..., None, None].round(), image).astype(np.uint8)
    height, width = data.shape[1:]
    fitted = resized(source, (height, width)) if source.shape[2:] != (height, width) else source
    return _in_channels(fitted, data.shape[0])


def measure(
    outputs: Images, truth: Images, source: Images, data: DataSpec, extractor: Extractor
) -> tuple[dict[str, Any], dict[str, str]]:
    """PSNR, SSIM and perceptual distance against the truth, each with its floor; and what is
    not applicable, with the reason.

    The perceptual distance is the mean Euclidean distance of the extractor's features. PSNR is of
    the whole image; where pixels were missing, `psnr_hole` is of those alone.
    """
    assert data.source is not None
    floor = naive(source, data.source, data)
    features = extractor(truth)
    metrics: dict[str, Any] = {
        "reconstruction_kind": KINDS[data.source.kind],
        "reconstruction_images": len(outputs),
        "reconstruction_floor_kind": FLOORS[data.source.kind],
        "ssim_window": reconstruction.ssim_window(truth.shape[-2:]),
    }
    reasons = {}
    for ending, images in (("", outputs), ("_floor", floor)):
        value = reconstruction.psnr(truth, images, data.levels)
        if math.isfinite(value):
            metrics[f"psnr{ending}"] = value
        else:
            reasons[f"psnr{ending}"] = "infinite: every image is exactly the true one"
        metrics[f"ssim{ending}"] = reconstruction.ssim(truth, images, data.levels)
        apart = np.linalg.norm(extractor(images) - features, axis=1)
        metrics[f"perceptual_distance{ending}"] = float(apart.mean())
    if data.source.kind == "masked":
        hole = np.broadcast_to(source[:, -1:] > 0, truth.shape)
        for ending, images in (("", outputs), ("_floor", floor)):
            value = reconstruction.psnr(truth[hole], images[hole], data.levels)
            if math.isfinite(value):
                metrics[f"psnr_hole{ending}"] = value
    return metrics, reasons


def _in_channels(images: Images, channels: int) -> Images:
    """Grey repeated for colour, colour averaged for grey (ITU-R 601 where it is RGB)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 3:
        planes = [Image.fromarray(i.transpose(1, 2, 0)).convert("L") for i in images]
        images = np.stack([np.asarray(plane) for plane in planes])[:, None]
    return np.repeat(images[:, :1], channels, 1)
