"""What the states kept from pixel to pixel save: PixelRNN sampling, cached against naive.

    .venv/bin/python benchmarks/sampling_pixelrnn.py

Naive is one whole pass of the network for each pixel. Random weights of the default size, 16
images of 28x28 with two levels, two threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from models.data import DataSpec
from models.pixelrnn import KINDS, PixelRNN, PixelRNNConfig

IMAGES, SIDE = 16, 28


def timed(sample: Callable[[int], Tensor]) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    begun = time.perf_counter()
    drawn = sample(IMAGES)
    return time.perf_counter() - begun, drawn


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    for layer in KINDS:
        torch.manual_seed(0)
        data = DataSpec(shape=(1, SIDE, SIDE), levels=2)
        model = PixelRNN(PixelRNNConfig(layer=layer), data).eval()
        model.sample(1)  # the first call sets things up
        cached, one = timed(model.sample)
        naive, two = timed(model.sample_naive)
        agree = float((one == two).double().mean())
        print(
            f"{layer}: naive {naive:.1f} s, cached {cached:.2f} s, {naive / cached:.0f} times "
            f"faster; {agree:.2%} of the pixels are equal"
        )


if __name__ == "__main__":
    main()
