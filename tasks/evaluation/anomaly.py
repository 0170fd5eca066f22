"""Anomaly detection: does the likelihood tell the data from letters of the same size?

Plain likelihood is known to fail at it (Nalisnick et al. 2019, "Do deep generative models know
what they don't know?"): simple images outside the data can be likelier than the data. So a
typicality score stands beside it (Nalisnick et al. 2019, "Detecting out-of-distribution inputs
using typicality"): how far the negative log-likelihood of an image is from its mean over data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from models.base import GenerativeModel
from models.data import DataSpec
from tasks.evaluation.likelihood import nats, taken

Images = NDArray[np.uint8]
LETTERS = "ABCDEFGHJKLMNPQRTUVWXY"  # without I, O, S and Z: they are the digits 1, 0, 5 and 2
DRAWS = 16  # at most, for one score: the comparison needs no tight bound
CANVAS = 96


def measure(
    model: GenerativeModel, validation: Images, test: Images, draws: dict[str, int]
) -> dict[str, float]:
    """`anomaly_auroc` of -log P, `anomaly_auroc_typicality` of its distance to the mean.

    AUROC: the probability that a letter scores higher than a test image; 0.5 is chance, and what
    is below it calls the letters more normal than the data. As many letters as test images.
    """
    from sklearn.metrics import roc_auc_score

    k = min(DRAWS, taken(model, draws))
    usual = nats(model, validation, k).numpy()
    scores = np.concatenate(
        [nats(model, x, k).numpy() for x in (test, letters(len(test), model.data))]
    )
    outside = np.repeat([0, 1], len(test))
    finite = np.nan_to_num(scores, posinf=np.finfo(np.float64).max / 4)  # impossible is abnormal
    typical = abs(finite - usual[np.isfinite(usual)].mean())
    return {
        "anomaly_auroc": float(roc_auc_score(outside, finite)),
        "anomaly_auroc_typicality": float(roc_auc_score(outside, typical)),
        "anomaly_images": float(len(test)),
    }


def letters(n: int, data: DataSpec, seed: int = 0) -> Images:
    """Capital letters, light on dark, each turned, scaled and shifted a little: levels
    `[n, C, H, W]`. The font is the one inside Pillow."""
    channels, height, width = data.shape
    random = np.random.default_rng(seed)
    images = np.empty((n, channels, height, width), np.uint8)
    for row in range(n):
        size = random.uniform(0.65, 0.9) * CANVAS
        canvas = Image.new("L", (CANVAS, CANVAS))
        place = CANVAS / 2 + random.uniform(-0.06, 0.06, 2) * CANVAS
        ImageDraw.Draw(canvas).text(
            (float(place[0]), float(place[1])),
            LETTERS[row % len(LETTERS)],
            fill=255,
            font=ImageFont.load_default(size),
            anchor="mm",
            stroke_width=int(random.integers(1, 5)),
        )
        turned = canvas.rotate(float(random.uniform(-15, 15)), Image.Resampling.BICUBIC)
        small = np.asarray(turned.resize((width, height), Image.Resampling.BOX), np.float64)
        images[row] = np.round(small / 255 * (data.levels - 1))
    return images
