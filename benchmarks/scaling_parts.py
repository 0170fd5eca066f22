"""The parts of a step on N workers, each on its own: what `benchmarks.scaling` fits its model to.

N processes of one thread on one machine, with gloo between them as Ray Train sets it up, and
without Ray: the time of an all-reduce by its size, of a training's step beside the others without
a word between them, and of the same step with the exchange, which is timed within it.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from models import store
from tasks.data import shards
from tasks.training.checkpoint import Checkpoints
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tasks.training.optim import set_up_torch

SIZES = (256, 10**4, 10**5, 10**6, 4 * 10**6, 16 * 10**6)  # bytes
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # of different ratios of gradients to work
    "vae": ("vae", {}),
    "vae_wide": ("vae", {"body": "mlp", "hidden": 1024}),
    "ddpm": ("ddpm", {}),
}
EVERY = 10  # steps between records; as many warm up


class Timed(Comm):
    """Adds up what the exchange of gradients takes, waiting for the others included."""

    spent = 0.0

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        begun = time.perf_counter()
        super().average_gradients(parameters)
        self.spent += time.perf_counter() - begun


def training(batch: int, steps: int) -> TrainConfig:
    """Nothing but steps, after one record for warming up."""
    return TrainConfig(
        batch_size=batch,
        budget=Budget(steps=steps + EVERY),
        precision="fp32",
        log_every=EVERY,
        validate_every=10**9,
        checkpoint_every=10**9,
    )


def step_ms(case: str, spec: dict[str, Any], x: Any, steps: int, comm: Comm) -> dict[str, float]:
    """Milliseconds of a step, what of it is exchange, and of writing a checkpoint."""
    family, config = CASES[case]
    torch.manual_seed(0)
    model = store.build(family, config, spec["data"])
    seen: list[tuple[float, int, float]] = []

    def note(record: dict[str, Any]) -> None:
        seen.append((time.perf_counter(), record["step"], getattr(comm, "spent", 0.0)))

    saved: list[float] = []
    save = Checkpoints.save

    def timed(self: Checkpoints, progress: dict[str, Any]) -> None:
        begun = time.perf_counter()
        save(self, progress)
        saved.append(time.perf_counter() - begun)

    settings = training(spec["batch"] * comm.world, steps // EVERY * EVERY)
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints.save = timed  # type: ignore[method-assign]
        try:
            train(model, TrainData(x), settings, Path(folder), comm=comm, on_record=note)
        finally:
            Checkpoints.save = save  # type: ignore[method-assign]
    if not seen:
        return {}
    (begun, first, before), (ended, last, after) = seen[0], seen[-1]
    count = (last - first) / 1000
    found = {"step": (ended - begun) / count, "exchange": (after - before) / count}
    return {**found, "checkpoint": saved[-1] * 1000 if saved else 0.0}


def all_reduce_s(seconds: float) -> dict[int, float]:
    """Of one, by its bytes; the mean of as many as fit `seconds`."""
    found = {}
    for size in SIZES:
        flat, count = torch.zeros(size // 4), 3
        for _ in range(2):  # the first turn says how many
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(count):
                dist.all_reduce(flat)
            found[size] = (time.perf_counter() - begun) / count
            told = torch.tensor(seconds / found[size])
            dist.broadcast(told, 0)
            count = max(3, int(told))
    return found


def _work(rank: int, workers: int, port: int, spec: dict[str, Any]) -> None:
    set_up_torch(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)
    x = torch.from_numpy(shards.read_split(Path(spec["prepared"]), "train").x)
    found: dict[str, Any] = {"all_reduce": all_reduce_s(spec["seconds"] / 8)}
    for case, steps in spec["steps"].items():
        dist.barrier()
        found[case] = {"beside": step_ms(case, spec, x, steps, Comm.alone())}
        dist.barrier()
        found[case]["together"] = step_ms(case, spec, x, steps, Timed())
    if rank == 0:
        Path(spec["out"]).write_text(json.dumps(found))
    dist.destroy_process_group()


def parts(workers: int, spec: dict[str, Any]) -> dict[str, Any]:
    """All of it, of so many workers; the first one's clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        mp.spawn(_work, args=(workers, port, {**spec, "out": str(out)}), nprocs=workers)
        found: dict[str, Any] = json.loads(out.read_text())
    found["all_reduce"] = {int(size): s for size, s in found["all_reduce"].items()}
    return found
