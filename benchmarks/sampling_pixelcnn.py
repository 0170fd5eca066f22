"""How much faster PixelCNN samples from cached maps than with a whole pass for each value.

    .venv/bin/python benchmarks/sampling_pixelcnn.py

The default model, 28x28 with two levels, 16 images, two threads. Both ways draw the same
images (checked); they are timed in alternating pairs, and the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from models.data import DataSpec
from models.pixelcnn import PixelCNN, PixelCNNConfig


def timed(draw: Callable[[int], Tensor], images: int) -> tuple[float, Tensor]:
    """Seconds, and the images."""
    torch.manual_seed(0)
    begun = time.perf_counter()
    samples = draw(images)
    return time.perf_counter() - begun, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = PixelCNN(PixelCNNConfig(), DataSpec(shape=(1, 28, 28), levels=2)).eval()
    model.sample(options.images)  # warm
    cached, naive = [], []
    for pair in range(options.pairs):
        fast, mine = timed(model.sample, options.images)
        slow, theirs = timed(model.sample_naive, options.images)
        cached.append(fast)
        naive.append(slow)
        different = (mine != theirs).flatten(1).any(1).sum()
        print(
            f"pair {pair + 1}: cached {fast:.2f} s, naive {slow:.1f} s, {different} images differ"
        )
    fast, slow = statistics.median(cached), statistics.median(naive)
    print(f"median: cached {fast:.2f} s, naive {slow:.1f} s, {slow / fast:.0f} times faster")


if __name__ == "__main__":
    main()
