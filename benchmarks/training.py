"""Training throughput against the libraries that people use, one family after the other.

    .venv-bench/bin/python -m benchmarks.training --json training.json
    .venv-bench/bin/python -m benchmarks.training --families vae dcgan --seconds 2 --rounds 2

Same data, same sizes of layers, same batch size, same optimiser, two threads. Ours is the loop as
a worker runs it, with its moving average, its clipping, its log; the peers run in their own
trainers or in the loop that their documentation shows (`peers`, `plain.py`), in fp32 as it is
there. Ours is measured in fp32 and, where the processor has it, in bf16, which is then what
`train.precision: auto` trains in. Each family has a process of its own, in which the contenders
take turns; what starts a training is not counted, on either side.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import digits, peers, plain
from benchmarks.pairs import Contender, Row, alternate, arguments, report, versions
from benchmarks.peers.denoising_diffusion import denoising_diffusion
from benchmarks.peers.normflows import normflows
from benchmarks.peers.pythae import pythae
from benchmarks.peers.torchcfm import torchcfm
from models import store
from models.base import GenerativeModel
from models.data import DataSpec
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tasks.training.optim import resolve_precision, set_up_torch

BINARY = {"vae", "pixelcnn", "transformer"}  # levels of their data: what the peer can model too
PEERS: dict[str, Callable[..., peers.Peer]] = {
    "vae": pythae,
    "realnvp": normflows,
    "glow": normflows,
    "flow_matching": torchcfm,
    "flow_matching/own": partial(torchcfm, own=True),
    "ddpm": denoising_diffusion,
    "ddpm/own": partial(denoising_diffusion, own=True),
    "dcgan": plain.dcgan,
    "wgan_gp": plain.wgan_gp,
    "pixelcnn": plain.pixelcnn,
    "transformer": plain.transformer,
}
GOALS = {"fp32": 1.3, "bf16": 2.0}
WARM = 12  # steps of the first, uncounted training of each


def ours(model: GenerativeModel, data: TrainData, batch: int, precision: str, steps: int) -> float:
    """Images per second of the loop's own records, by the clock on the wall between them."""
    every = max(1, min(20, steps // 4))
    config = TrainConfig(
        batch_size=batch,
        budget=Budget(steps=steps),
        precision=precision,
        log_every=every,
        validate_every=10**9,
        checkpoint_every=10**9,
    )
    seen: list[tuple[float, int]] = []

    def note(record: dict[str, Any]) -> None:
        seen.append((time.perf_counter(), record["images"]))

    with tempfile.TemporaryDirectory() as folder:
        train(model, data, config, Path(folder), on_record=note)
    (begun, first), (ended, last) = seen[0], seen[-1]
    return (last - first) / (ended - begun)


def serve(name: str, side: str, options: argparse.Namespace) -> None:
    """One side of one family, in a process of its own: answers a contender with images/s."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    family = name.partition("/")[0]
    binary = family in BINARY
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        told: dict[str, Any] = {"data": digits.lay_out(root, options.mnist)}
        spec = DataSpec(shape=(1, 28, 28), levels=2 if binary else 256)
        model = store.build(family, {}, spec.model_dump(mode="json"))
        runs: dict[str, Callable[[int], float]]
        if side == "theirs":
            peer = PEERS[name](model, root, options.batch)
            told |= {"peer": peer.name, "parameters": peer.parameters}
            runs = {"theirs": peer.train}
        else:
            set_up_torch(options.threads)  # as a worker does
            data = TrainData(*digits.levels(root, binary=binary))
            told["parameters"] = peers.count(model)
            precisions = {"fp32", resolve_precision("auto", torch.device("cpu"))}
            runs = {p: partial(ours, model, data, options.batch, p) for p in sorted(precisions)}
        steps = told["steps"] = {}
        for contender, run in runs.items():  # warms up, and says how long a step takes
            per_second = run(WARM) / options.batch
            steps[contender] = max(WARM, round(options.seconds * per_second))
        Contender.serve(told, lambda contender: runs[contender](steps[contender]))


def measure(name: str, words: list[str], rounds: int) -> dict[str, Any]:
    """All contenders of one family; images per second in each round, and parameters."""
    mine, other = (
        Contender("benchmarks.training", f"--child={name}", f"--side={side}", *words)
        for side in ("ours", "theirs")
    )
    turns = {p: partial(mine.ask, p) for p in reversed(mine.told["steps"])}
    rates = alternate({"theirs": partial(other.ask, "theirs"), **turns}, rounds, name)
    for contender in (mine, other):
        contender.end()
    return {
        "rates": rates,
        "steps": mine.told["steps"] | other.told["steps"],
        "peer": other.told["peer"],
        "parameters": {"ours": mine.told["parameters"], "theirs": other.told["parameters"]},
        "data": mine.told["data"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4, help="of each training")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.child, options.side, options)
        return
    words = [f"--{name}={getattr(options, name)}" for name in ("threads", "batch")]
    words.append(f"--seconds={options.seconds}")
    words += [f"--mnist={options.mnist}"] if options.mnist else []
    rows, data = [], ""
    for name in options.families:
        found = measure(name, words, options.rounds)
        data, (mine, other) = found["data"], found["parameters"].values()
        for precision in (p for p in GOALS if p in found["rates"]):
            rows.append(
                Row(
                    f"{name.partition('/')[0]}, {precision}",
                    "images/s",
                    found["rates"][precision],
                    found["rates"]["theirs"],
                    GOALS[precision],
                    f"{found['peer']}, fp32",
                    note=f"{mine:,} and {other:,} parameters",
                    details={"steps": found["steps"]},
                )
            )
        known = versions("torch", "pythae", "normflows", "torchcfm", "denoising-diffusion-pytorch")
        title = f"Training: batches of {options.batch}, {data}"
        report(title, rows, options, versions=known)  # after each, so that a stop loses nothing


if __name__ == "__main__":
    main()
