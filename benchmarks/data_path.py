"""Batches for a training step: ours against a DataLoader over torchvision's MNIST.

    .venv-bench/bin/python -m benchmarks.data_path --json data_path.json

Both end at shuffled float batches in [-1, 1] with their labels; images/s over a second or more.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms

from benchmarks import digits
from benchmarks.pairs import Row, alternate, arguments, report
from benchmarks.peers import endless, loader
from models.data import to_signed
from tasks.training.comm import Comm
from tasks.training.data import TrainData


def ours(data: TrainData, batch: int, seconds: float) -> float:
    comm, total, number = Comm(), 0.0, 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        found = data.batch(number, batch, 0, comm)
        total += float(to_signed(found.x, 256)[0, 0, 0, 0])
        number += 1
    return number * batch / (time.perf_counter() - begun)


def theirs(batches: Any, batch: int, seconds: float) -> float:
    stream, total, number = endless(batches), 0.0, 0
    next(stream)  # the loader processes have started
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        x: Tensor = next(stream)[0]
        total += float(x[0, 0, 0, 0])
        number += 1
    return number * batch / (time.perf_counter() - begun)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    normalize = transforms.Normalize((0.5,), (0.5,))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        told = digits.lay_out(root, options.mnist)
        data = TrainData(*digits.levels(root))
        rows = []
        for workers in (0, 2):
            batches = loader(root, options.batch, normalize, workers=workers)
            turns = {
                "ours": lambda: ours(data, options.batch, options.seconds),
                "theirs": lambda b=batches: theirs(b, options.batch, options.seconds),
            }
            name = f"batches of {options.batch}, against {workers} loader processes"
            found = alternate(turns, options.rounds, name)
            rows.append(
                Row(name, "images/s", found["ours"], found["theirs"], 20, "torchvision's MNIST")
            )
            report(f"The way of the data: {told}", rows, options)


if __name__ == "__main__":
    main()
