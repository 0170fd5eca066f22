"""Predicted steps on 8, 64 and 512 GPUs: the cost model with public figures, nothing measured.

    .venv/bin/python -m benchmarks.gpus --start 15 --json gpus.json

What a family's step consists of is counted here, on the CPU: floating-point operations, operations
that a GPU would be given one by one, bytes of gradients, collectives of batch statistics. What the
GPU makes of them is assumed, in `Assumed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost_model import Around, Job, Nccl, efficiency, exchanged, limit
from benchmarks.pairs import arguments, commit
from models import store
from models.data import DataSpec
from models.nn import BatchNorm2d
from models.noise import noise_shard
from tasks.training.comm import Comm, buckets
from tasks.training.config import TrainConfig
from tasks.training.data import TrainData
from tasks.training.flops import count_flops
from tasks.training.turns import make_turns

GPUS = (1, 8, 64, 512)
TITLE = "Predicted, not measured: steps on GPUs"
HEADINGS = (
    *("", "GPUs", "step, ms", "exchange, ms", "images/s", "weak: share of N times one GPU's"),
    *("steps' share of a run", "strong: times one GPU's", "NCCL"),
)
DIGITS, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "vae": ("vae", {}, DIGITS),
    "dcgan": ("dcgan", {}, DIGITS),
    "ddpm": ("ddpm", {}, DIGITS),
    "ddpm, width 256": ("ddpm", {"width": 256}, COLOUR),
    "vae, 2 hidden layers of 8,192": ("vae", {"body": "mlp", "hidden": 8192}, COLOUR),
}


@dataclass(frozen=True)
class Assumed:
    """Of NVIDIA's DGX H100, from its data sheet; and what is assumed besides."""

    peak: float = 989e12  # dense bf16 of an H100 SXM, FLOP/s
    utilisation: float = 0.3  # of it that a step's matrix products and convolutions reach
    memory: float = 3.35e12  # HBM3, bytes a second
    passes: int = 12  # over the weights: forward, backward, Adam (7), moving average (3)
    packing: int = 6  # more of them where gradients are exchanged
    launch: float = 5e-6  # seconds the host takes for an operation, which bounds small steps
    inside: float = 450e9  # NVLink 4, one direction of 900 GB/s
    between: float = 8 * 50e9  # eight ConnectX-7 of 400 Gb/s
    reached: float = 0.8  # of both, by a collective
    disk: float = 1e9  # bytes a second of the shared file system
    steps: int = 10_000  # of the run around them


class _Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out: about the kernels of a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def counted(name: str, batch: int) -> dict[str, Any]:
    """What a step of so many images a worker consists of."""
    family, config, shape = MODELS[name]
    torch.manual_seed(0)
    data = DataSpec(shape=shape, levels=256)
    model = store.build(family, config, data.model_dump(mode="json")).train()
    x = torch.randint(0, 256, (8, *shape), dtype=torch.uint8)
    settings = TrainConfig(batch_size=batch, precision="fp32")
    flops = count_flops(model, TrainData(x), settings)
    norms = 0

    def seen(*_: Any) -> None:
        nonlocal norms
        norms += 1

    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.register_forward_hook(seen)
    alone, operations, sizes = Comm.alone(), _Operations(), []
    small = TrainData(x).batch(0, 4, 0, alone)
    for turn in make_turns(settings, model):
        with operations, noise_shard(0, 1):
            turn.run(model.losses, small, 0, alone)
            with torch.no_grad():
                model.after_step(turn.phase.name)
        sizes += [sum(p.nbytes for p in bucket) for bucket in buckets(list(turn.parameters))]
    return {
        "flops": sum(flops.values()),
        "operations": operations.count,
        "gradients": sizes,
        "small": 4 * norms,  # mean and variance, forward and (where gradients pass) backward
        "state": 4 * sum(p.nbytes for p in model.parameters()),
    }


def compute(facts: dict[str, Any], images: float, batch: int, assumed: Assumed) -> float:
    """Seconds of a step of so many images on one GPU: arithmetic and the weights' way through
    memory, but no less than launching it all."""
    work = facts["flops"] * images / batch / (assumed.utilisation * assumed.peak)
    moved = assumed.passes * sum(facts["gradients"]) / assumed.memory
    return max(work + moved, facts["operations"] * assumed.launch)


def predicted(name: str, batch: int, start: float, assumed: Assumed) -> dict[str, Any]:
    facts = counted(name, batch)
    link = Nccl(assumed.inside, assumed.between, reached=assumed.reached)
    packing = assumed.packing * sum(facts["gradients"]) / assumed.memory
    job = Job(tuple(facts["gradients"]), facts["small"], state=facts["state"], packing=packing)
    around = Around(start, assumed.disk)
    alone = compute(facts, batch, batch, assumed)
    rows = []
    for n in GPUS:
        sent = exchanged(job, n, link)
        # strong: the batch of all is that of 64 GPUs, whatever their number
        whole = compute(facts, 64 * batch, batch, assumed)
        share = compute(facts, 64 * batch / n, batch, assumed) + sent
        rows.append(
            {
                "gpus": n,
                "step_ms": 1000 * (alone + sent),
                "exchange_ms": 1000 * sent,
                "images_per_second": n * batch / (alone + sent),
                "weak": efficiency(alone, job, n, link),
                "run": around.share(job, alone + sent, assumed.steps),
                "strong_speedup": whole / share,
                "strong": whole / share / n,
            }
        )
    biggest = max(job.gradients)
    chosen = {n: min((t, k) for k, t in link.choices(biggest, n).items())[1] for n in GPUS[1:]}
    return {
        "facts": facts,
        "compute_ms": 1000 * alone,
        "bound": "launch" if alone == facts["operations"] * assumed.launch else "GPU",
        "rows": rows,
        "below_80": limit(alone, job, link),
        "nccl": {n: " ".join(choice) for n, choice in chosen.items()},
    }


def cells(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A line for each number of GPUs."""
    for name, told in found.items():
        below = f"below 80% from {told['below_80']}" if told["below_80"] else "never below 80%"
        for row in told["rows"]:
            yield [
                f"{name} (bound: {told['bound']}; {below})" if row["gpus"] == 1 else "",
                str(row["gpus"]),
                f"{row['step_ms']:.2f}",
                f"{row['exchange_ms']:.2f}",
                f"{row['images_per_second']:,.0f}",
                f"{row['weak']:.0%}",
                f"{row['run']:.0%}",
                f"{row['strong_speedup']:.1f}",
                told["nccl"].get(row["gpus"], ""),
            ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=64, help="images of each GPU")
    parser.add_argument("--start", type=float, default=15, help="seconds until workers train")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assumed = Assumed()
    found = {n: predicted(n, options.batch, options.start, assumed) for n in options.models}
    lines = list(cells(found))
    table = Table(*HEADINGS, title=TITLE, caption=str(assumed))
    for line in lines:
        table.add_row(*line)
    Console(width=200).print(table)
    for name, told in found.items():
        print(name, {k: v for k, v in told["facts"].items() if k != "gradients"})
        print("  MB of gradients:", [round(size / 1e6, 2) for size in told["facts"]["gradients"]])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": TITLE, "date": str(date.today()), "commit": commit()}
        content["tables"] = [{"headings": HEADINGS, "rows": lines}]
        content |= {"assumed": asdict(assumed), "models": found}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
