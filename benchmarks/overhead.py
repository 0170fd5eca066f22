"""What the loop costs: its steps against the bare forward, backward and optimiser step.

    .venv-bench/bin/python -m benchmarks.overhead --json overhead.json

The bare step has the batch at hand, the same autocast, and nothing besides: no shuffling, no
moving average, no clipping, no log, no check of the losses, no clock. One process for a family, in
which the two take turns; milliseconds for a step. `--memory` has the other question, the resident
size of a process that trains on MNIST: by the loop, with all that a Ray Train worker imports, and
bare.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import digits
from benchmarks.pairs import Row, alternate, arguments, child, report
from models import store
from models.base import GenerativeModel
from models.data import Batch, DataSpec

SPEC = DataSpec(shape=(1, 28, 28), levels=256)
MEBI = 2**20


def build(family: str) -> GenerativeModel:
    torch.manual_seed(0)
    return store.build(family, {}, SPEC.model_dump(mode="json"))


def native(precision: str) -> str:
    """What `auto` means here, without importing anything of the loop."""
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return ("bf16" if bf16 else "fp32") if precision == "auto" else precision


def bare(model: GenerativeModel, x: Any, batch: int, precision: str, steps: int) -> float:
    """Milliseconds of a step without a loop around it; families of one phase."""
    (phase,) = model.phases()
    settings = phase.optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    decay = settings.weight_decay
    optimizer = kind(model.parameters(), settings.lr, betas=settings.betas, weight_decay=decay)
    half = native(precision) == "bf16"
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    batches = [Batch(part) for part in x[: 32 * batch].split(batch)]
    model.train()
    begun = 0.0
    for number in range(steps + 1):
        with autocast:
            loss = model.losses(batches[number % 32], phase.name)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        begun = begun or time.perf_counter()  # the first step sets the optimiser up
    return (time.perf_counter() - begun) / steps * 1000


def looped(model: GenerativeModel, x: Any, batch: int, precision: str, steps: int) -> float:
    """Milliseconds of a step of the loop, all that it does between them included."""
    from tasks.training.config import Budget, TrainConfig
    from tasks.training.data import TrainData
    from tasks.training.loop import train

    every = max(1, min(20, steps // 2))
    config = TrainConfig(
        batch_size=batch,
        budget=Budget(steps=steps // every * every + every),
        precision=precision,
        log_every=every,
        validate_every=10**9,
        checkpoint_every=10**9,
    )
    seen: list[tuple[float, int]] = []

    def note(record: dict[str, Any]) -> None:
        seen.append((time.perf_counter(), record["step"]))

    with tempfile.TemporaryDirectory() as folder:
        train(model, TrainData(x), config, Path(folder), on_record=note)
    return (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1]) * 1000


def measure(family: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    x = _images(options)
    model, batch, precision = build(family), options.batch, options.precision
    per_step = bare(model, x, batch, precision, 10)
    steps = max(10, round(options.seconds * 1000 / per_step))
    turns = {
        "loop": lambda: looped(model, x, batch, precision, steps),
        "bare": lambda: bare(model, x, batch, precision, steps),
    }
    return {"ms": alternate(turns, options.rounds, family), "steps": steps}


def _images(options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        digits.lay_out(Path(folder), options.mnist)
        return digits.levels(Path(folder))[0]


def resident(how: str, options: argparse.Namespace) -> dict[str, float]:
    """MiB that a training process holds, at its end and at its most."""
    torch.set_num_threads(options.threads)
    if how == "loop":
        import_module("ray.train")
        import_module("tasks.training.worker")
    family, x = options.families[0], _images(options)
    run = looped if how == "loop" else bare
    run(build(family), x, options.batch, options.precision, 60)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"end": psutil.Process().memory_info().rss / MEBI, "peak": peak}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="+", default=["vae", "realnvp", "ddpm", "pixelcnn"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what = resident if options.memory else measure
        print(json.dumps(what(options.child, options)))
        return
    names = ("rounds", "threads", "batch", "precision", "seconds")
    words = [f"--{name}={getattr(options, name)}" for name in names]
    words += [f"--mnist={options.mnist}"] if options.mnist else []
    words += ["--memory"] if options.memory else []

    def run(who: str, family: str) -> dict[str, Any]:
        return child("benchmarks.overhead", f"--child={who}", f"--families={family}", *words)

    def peak(who: str, family: str) -> float:
        return float(run(who, family)["peak"])

    rows = []
    for family in options.families:
        if options.memory:
            turns = {who: partial(peak, who, family) for who in ("loop", "bare")}
            found, unit, goal, steps = alternate(turns, options.rounds, family), "MiB", 1.5, 60
        else:
            told = run(family, family)
            found, unit, goal, steps = told["ms"], "ms a step", 1.03, told["steps"]
        name = f"{family}, batches of {options.batch}, {native(options.precision)}"
        note = f"{steps} steps a turn"
        rows.append(
            Row(name, unit, found["loop"], found["bare"], goal, "bare", at_most=True, note=note)
        )
        what = "Resident memory at its most" if options.memory else "What the loop costs"
        report(what, rows, options)


if __name__ == "__main__":
    main()
