"""What the transformer's cache is worth: 16 samples of 784 tokens with it and without it.

    .venv/bin/python benchmarks/sampling_transformer.py

Default size, 28x28 with 256 levels, one token a pixel, two threads, weights as initialised
(time does not depend on them). Without the cache each token's logits are computed from the
tokens before it alone, not from a full-length sequence. The two alternate; medians.
"""

from __future__ import annotations

import statistics
import time

import torch

from models.data import DataSpec
from models.transformer import Transformer, TransformerConfig

SAMPLES, ROUNDS = 16, 3


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    data = DataSpec(shape=(1, 28, 28), levels=256)
    decoder = Transformer(TransformerConfig(), data).eval().decoder
    decoder.generate(2, 8)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS):
        drawn = []
        for cache in (True, False):
            torch.manual_seed(number)
            begun = time.perf_counter()
            drawn.append(decoder.generate(SAMPLES, data.dimensions, cache=cache))
            seconds[cache].append(time.perf_counter() - begun)
            print(f"round {number}, cache {cache}: {seconds[cache][-1]:.2f} s", flush=True)
        print(f"  equal tokens: {(drawn[0] == drawn[1]).float().mean():.2%}")
    cached, naive = (statistics.median(seconds[cache]) for cache in (True, False))
    print(f"cached {cached:.2f} s, naive {naive:.2f} s: {naive / cached:.1f} times as fast")


if __name__ == "__main__":
    main()
