"""Training on more images than the worker's memory holds, against training in memory.

    .venv/bin/python benchmarks/streaming.py --json streaming.json
    .venv/bin/python benchmarks/streaming.py --images 20000 --seconds 10 --epochs 1 --pairs 1

Writes 400,000 images of 64x64x3 noise (4.9 GB; noise, for it takes the most bytes to read) as the
prepare stage would write them, a block at a time, and removes them at the end. Then, each in a
process of its own:

- `read`: epochs of batches without a model; the resident memory at every quarter of an epoch.
- `stream`: a training with `train.data: auto` under a limit of 2 GB.
- `memory`: the same training of a part of the images that fits, `train.data: memory`.
- `refused`: all images in memory, to see that the limit holds.

`read`, `stream` and `refused` are killed when their resident memory passes the limit, which is
looked at every 20 ms. (No rlimit serves: of private memory, torch with CUDA maps 2 GB that it never
touches.) `stream` and `memory` alternate; the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch

from models import store
from models.data import DataSpec
from tasks.data import shards
from tasks.data.blocks import write_shard
from tasks.training import memory
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.loop import train
from tasks.training.optim import set_up_torch
from tasks.training.stream import StreamData

SPEC = DataSpec(shape=(3, 64, 64), levels=256)
GB = 10**9


def write_images(folder: Path, images: int) -> None:
    """A prepared train split of noise, never more than a block of it in memory."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"spec": SPEC.model_dump(mode="json")}))
    size = shards.BLOCK_BYTES // SPEC.dimensions
    generator = np.random.default_rng(0)

    def parts(rows: int) -> Iterator[dict[str, list[Any]]]:
        for start in range(0, rows, size):
            shape = (min(size, rows - start), SPEC.dimensions)
            levels = generator.integers(0, 256, shape, np.uint8)
            yield {"x": [row.tobytes() for row in levels], "label": [], "source": [], "text": []}

    for number, start in enumerate(range(0, images, shards.ROWS_PER_SHARD)):
        rows = min(shards.ROWS_PER_SHARD, images - start)
        write_shard(folder, "train", number, parts(rows))


def resident() -> int:
    return psutil.Process().memory_info().rss


def read(options: argparse.Namespace) -> dict[str, Any]:
    """Epochs of batches alone."""
    data, sizes, begun = StreamData(options.folder, SPEC), [], time.perf_counter()
    batches = len(data) // options.batch_size
    for number in range(options.epochs * batches):
        data.batch(number, options.batch_size, 0, Comm())
        if (number + 1) % (batches // 4) == 0:
            sizes.append(round(resident() / 2**20))
    seconds = time.perf_counter() - begun
    images = options.epochs * batches * options.batch_size
    return {"resident_mb": sizes, "images": images, "images_per_second": images / seconds}


def training(options: argparse.Namespace, where: str) -> dict[str, Any]:
    """A training of the family by the loop, its own clock; nothing is validated."""
    torch.manual_seed(0)
    model = store.build(options.family, {}, SPEC.model_dump(mode="json"))
    config = TrainConfig(
        batch_size=options.batch_size,
        budget=Budget(minutes=options.seconds / 60),
        precision="fp32",
        data=where,
        log_every=5,
        checkpoint_every=10**6,
        validate_every=10**6,
    )
    limit = [round(options.limit * GB)] if where == "auto" else []
    with patch.object(memory, "cgroup_limits", lambda: limit):  # as a container would say it
        data = memory.train_data(options.folder, model, config, Comm(), 1)
    records: list[Any] = []
    with tempfile.TemporaryDirectory() as checkpoints:
        outcome = train(model, data, config, Path(checkpoints), on_record=records.append)
    rates = [record["images_per_second"] for record in records[1:]]  # the first warms up
    return {
        "data": "stream" if isinstance(data, StreamData) else "memory",
        "images": len(data),
        "images_per_second": statistics.median(rates),
        "peak_memory_mb": outcome.peak_memory_mb,
    }


def child(options: argparse.Namespace) -> None:
    set_up_torch(options.threads)
    if options.child == "read":
        found = read(options)
    elif options.child == "refused":
        found = {"fits": bool(len(memory.read(options.folder, SPEC)))}
    else:
        found = training(options, "auto" if options.child == "stream" else "memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "peak_resident_mb": round(peak)}))


def run(
    what: str, folder: Path, options: argparse.Namespace, family: str = "none"
) -> dict[str, Any]:
    names = ("batch_size", "seconds", "epochs", "limit", "threads")
    words = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    command = [
        sys.executable,
        __file__,
        "--child",
        what,
        "--folder",
        str(folder),
        "--family",
        family,
        *words,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    killed = what != "memory" and over(process, options.limit * GB)
    output, _ = process.communicate()
    if killed != (what == "refused") or (process.returncode and not killed):
        raise SystemExit(f"{what}: {'over the limit' if killed else 'failed'}\n{output}")
    found: dict[str, Any] = {"killed": True} if killed else json.loads(output.splitlines()[-1])
    print(f"{what}: {found}", flush=True)
    return found


def compare(family: str, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating trainings of one family."""
    rates: dict[str, list[float]] = {"stream": [], "memory": []}
    found: dict[str, Any] = {"rates": rates}
    for _ in range(options.pairs):
        for what, folder in (("stream", "all"), ("memory", "part")):
            found[what] = run(what, root / folder, options, family)
            rates[what].append(found[what]["images_per_second"])
    found["share"] = statistics.median(rates["stream"]) / statistics.median(rates["memory"])
    print(f"{family}: streaming is {found['share']:.1%} as fast as memory", flush=True)
    return found


def over(process: subprocess.Popen[str], limit: float) -> bool:
    """Whether it had to be killed, for it took more memory than that."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            if watched.memory_info().rss > limit:
                process.kill()
                return True
        time.sleep(0.02)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--fitting", type=int, default=32_768, help="images of `memory`")
    parser.add_argument("--limit", type=float, default=2.0, help="GB")
    parser.add_argument("--families", nargs="+", default=["gan", "vae"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15, help="of each training")
    parser.add_argument("--epochs", type=int, default=3, help="of `read`")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the images are kept; a new one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        begun = time.perf_counter()
        write_images(root / "all", options.images)
        write_images(root / "part", options.fitting)
        print(f"written in {time.perf_counter() - begun:.0f} s", flush=True)
        found = {what: run(what, root / "all", options) for what in ("refused", "read")}
        for family in options.families:
            found[family] = compare(family, root, options)
    finally:
        shutil.rmtree(root)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("json", "folder")
    }
    if options.json:
        options.json.write_text(json.dumps({**found, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
