"""What each Ray Train worker runs: read the data, build the model, call the loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models import store
from tasks.errors import BadInput
from tasks.training.background import Background
from tasks.training.checkpoint import StorageFailed
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.history import HISTORY, Journal
from tasks.training.loop import train
from tasks.training.memory import train_data
from tasks.training.optim import resolve_precision, set_up_torch
from tasks.training.selection import Inline, Scorer, ValidationFailed
from tasks.training.stream import StreamData
from tasks.training.turns import NonFiniteLoss, fold_seed
from tasks.training.validation import Validator

STOP, CHECKPOINTS = "stop", "checkpoints"
FAILURES = {
    kind.__name__: kind for kind in (BadInput, NonFiniteLoss, StorageFailed, ValidationFailed)
}


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says (see `tasks.train`), on one worker of the process group, if any.

    Returns how it went: the fields of `Outcome`, the hardware, and under `error` what ended the
    training where another try would end alike. It goes through memory, for the disk may be full.
    """
    set_up_torch(spec["threads"])
    device = _device()
    config = TrainConfig(**spec["train"])
    comm = Comm.sharing(config.batch_size)
    if comm is None:
        return {}
    directory = Path(spec["directory"])

    torch.manual_seed(fold_seed(config.seed, "init"))
    model = store.build(spec["family"], spec["config"], spec["data"]).to(device)
    assert config.validation != "auto", "the driver decides: it knows the cluster"
    scorer: Scorer | None = None
    if comm.rank == 0 and config.validation == "asynchronous":
        scorer = Background(spec, device)
    elif comm.rank == 0:
        scorer = Inline(Validator.of(spec, device))
    journal = Journal(directory / HISTORY)
    facts: dict[str, Any] = {"hardware": hardware(device), "workers": comm.world}
    facts["precision"] = resolve_precision(config.precision, device)
    facts["parameters"] = size(model)
    try:
        neighbours = spec.get("neighbours", comm.world)
        data = train_data(Path(spec["prepared"]), model, config, comm, neighbours)
        facts["data"] = "stream" if isinstance(data, StreamData) else "memory"
        outcome = train(
            model,
            data,
            config,
            directory / CHECKPOINTS,
            comm=comm,
            validate=scorer,
            should_stop=_stop_file(directory / STOP),
            on_resume=journal.rewind,
            on_record=journal,
        )
        facts |= asdict(outcome)
    except tuple(FAILURES.values()) as error:  # told to the driver: another try would end alike
        facts["error"] = {"kind": type(error).__name__, "message": str(error)}
    return facts


def size(model: torch.nn.Module) -> int:
    """How many numbers it learns: parameters, or the tables of a family that is fitted."""
    tables = [t for t in model.buffers() if t.is_floating_point() and t.ndim]
    return sum(t.numel() for t in list(model.parameters()) or tables)


def hardware(device: torch.device) -> str:
    """`"NVIDIA H200"`, or `"AMD EPYC, 2 threads"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} thread(s)"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _stop_file(path: Path, interval: float = 0.5) -> Callable[[], bool]:
    """Whether the driver asks to stop; looks at the file at most every `interval` seconds."""
    state = {"looked": 0.0, "found": False}

    def stop() -> bool:
        if time.monotonic() - state["looked"] > interval:
            state.update(looked=time.monotonic(), found=path.exists())
        return bool(state["found"])

    return stop
