"""How close a reconstruction comes to its original: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity


def psnr(real: NDArray[np.uint8], other: NDArray[np.uint8], levels: int) -> float:
    """Peak signal-to-noise ratio in dB of the squared error pooled over all images.

    Levels `[N, C, H, W]`; the peak is `levels - 1`. Infinite where all is equal.
    """
    error = np.square(real.astype(np.float64) - other.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10((levels - 1) ** 2 / error)


def ssim(real: NDArray[np.uint8], other: NDArray[np.uint8], levels: int) -> float:
    """Structural similarity (Wang et al. 2004), mean over images.

    The paper's Gaussian window (11 x 11, sigma 1.5); images with a side under 11 have a
    uniform 7 x 7 one, or the largest odd one that fits (see `ssim_window`).
    """
    options = _window_options(real.shape[-2:])
    values = [
        structural_similarity(a, b, data_range=levels - 1, channel_axis=0, **options)
        for a, b in zip(real.astype(np.float64), other.astype(np.float64), strict=True)
    ]
    return float(np.mean(values))


def ssim_window(size: tuple[int, ...]) -> str:
    """Which window `ssim` uses for images of that size."""
    options = _window_options(size)
    return (
        "gaussian 11x11"
        if "sigma" in options
        else f"uniform {options['win_size']}x{options['win_size']}"
    )


def _window_options(size: tuple[int, ...]) -> dict[str, float]:
    if min(size) >= 11:
        return {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return {"win_size": min(7, (min(size) - 1) // 2 * 2 + 1)}
