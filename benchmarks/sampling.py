"""Cached sampling of the autoregressive families against a whole pass for each value.

    .venv/bin/python -m benchmarks.sampling --json sampling.json
    .venv/bin/python -m benchmarks.sampling --families pixelcnn --images 16 --rounds 1

Default models with random weights (time does not depend on them), 28x28. "Theirs" is the same
family's naive way: the whole network anew for each value; the transformer's is kinder, it computes
a token from those before it alone. Both ways begin each round with the same seed and must draw
the same images; where rounding tips a value over, the rest of its image is another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.pairs import Row, alternate, arguments, report
from models.data import DataSpec
from models.pixelcnn import PixelCNN, PixelCNNConfig
from models.pixelrnn import PixelRNN, PixelRNNConfig
from models.transformer import Transformer, TransformerConfig

Draw = Callable[[int], Tensor]


@dataclass
class Pair:
    """Two ways to the same images.

    Attributes:
        make: the cached way and the naive one.
        images: drawn at a time; few where naive takes long, which costs cached more than naive.
    """

    make: Callable[[], tuple[Draw, Draw]]
    images: int
    goal: float


def spec(levels: int) -> DataSpec:
    return DataSpec(shape=(1, 28, 28), levels=levels)


def pixelcnn() -> tuple[Draw, Draw]:
    model = PixelCNN(PixelCNNConfig(), spec(2)).eval()
    return model.sample, model.sample_naive


def pixelrnn(config: PixelRNNConfig) -> tuple[Draw, Draw]:
    model = PixelRNN(config, spec(2)).eval()
    return model.sample, model.sample_naive


def transformer() -> tuple[Draw, Draw]:
    """One token a pixel, of 256 levels."""
    data = spec(256)
    decoder = Transformer(TransformerConfig(), data).eval().decoder

    def draw(n: int, cache: bool) -> Tensor:
        return decoder.generate(n, data.dimensions, cache=cache)

    return partial(draw, cache=True), partial(draw, cache=False)


PAIRS = {
    "pixelcnn": Pair(pixelcnn, 4, 30),
    "pixelrnn, row LSTM": Pair(partial(pixelrnn, PixelRNNConfig(layer="row_lstm")), 8, 30),
    "pixelrnn, diagonal BiLSTM": Pair(
        partial(pixelrnn, PixelRNNConfig(layer="diagonal_bilstm")), 8, 30
    ),
    "transformer": Pair(transformer, 16, 20),
}


def measured(name: str, pair: Pair, images: int, rounds: int) -> Row:
    """Alternating rounds of both ways, with the seed of the round."""
    torch.manual_seed(0)
    ways = dict(zip(("ours", "theirs"), pair.make(), strict=True))
    drawn: dict[str, list[Tensor]] = {way: [] for way in ways}
    ways["ours"](1)  # the first call sets things up

    def seconds(way: str) -> float:
        torch.manual_seed(len(drawn[way]))
        begun = time.perf_counter()
        drawn[way].append(ways[way](images))
        return time.perf_counter() - begun

    found = alternate({way: partial(seconds, way) for way in ways}, rounds, name)
    mine, naive = (torch.cat(drawn[way]).flatten(1) for way in ways)
    differ = int((mine != naive).any(1).sum())
    return Row(
        f"{name}, {images} images",
        "s",
        found["ours"],
        found["theirs"],
        pair.goal,
        "naive",
        more_is_better=False,
        note=f"{differ} of {len(mine)} images differ",
        details={"images": images, "images_that_differ": differ},
    )


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="instead of each family's own number")
    parser.add_argument("--families", nargs="+", default=[], help="how their names begin")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {
        k: v
        for k, v in PAIRS.items()
        if not options.families or k.startswith(tuple(options.families))
    }
    rows = [
        measured(name, pair, options.images or pair.images, options.rounds)
        for name, pair in chosen.items()
    ]
    report("Cached sampling, 28x28, fp32", rows, options)
    if sum(row.details["images_that_differ"] for row in rows):
        print("Images differ: look whether that is rounding, at a value whose draw was a tie.")


if __name__ == "__main__":
    main()
