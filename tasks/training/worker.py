"""What each Ray Train worker runs: read the data, build the model, call the loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models import store
from models.base import DataSpec
from tasks.data import shards
from tasks.evaluation.features import classifier_features
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import NonFiniteLoss, Record, fold_seed, train
from tasks.training.optim import resolve_precision
from tasks.training.validation import Validator

STOP, HISTORY, OUTCOME, PICTURES = "stop", "history.jsonl", "outcome.json", "samples"


def work(spec: dict[str, Any]) -> None:
    """Train as `spec` says (see `tasks.train`), on one worker of the process group, if any."""
    torch.set_num_threads(spec["threads"])
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    comm = Comm()
    device = _device()
    config = TrainConfig(**spec["train"])
    directory = Path(spec["directory"])
    prepared = Path(spec["prepared"])

    torch.manual_seed(fold_seed(config.seed, "init"))
    model = store.build(spec["family"], spec["config"], spec["data"]).to(device)
    data = train_data(prepared, model.data)
    validate = None
    if comm.rank == 0:
        extractor = None  # of features, which are known of images
        if model.data.modality == "image":
            extractor = classifier_features(Path(spec["classifier"]), device)
        validation, train_x = shards.read_split(prepared, "validation"), data.x.cpu()
        validate = Validator(validation, train_x, extractor, config, directory / PICTURES)
    facts: dict[str, Any] = {"hardware": hardware(device), "workers": comm.world}
    facts["precision"] = resolve_precision(config.precision, device)
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        outcome = train(
            model,
            data.to(device),
            config,
            directory / "checkpoints",
            comm=comm,
            validate=validate,
            should_stop=_stop_file(directory / STOP),
            on_record=_Journal(directory / HISTORY),
        )
        facts |= asdict(outcome)
    except NonFiniteLoss as error:  # told to the driver: another try would end the same way
        facts["error"] = str(error)
    if comm.rank == 0:
        (directory / OUTCOME).write_text(json.dumps(facts))


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


def train_data(prepared: Path, spec: DataSpec) -> TrainData:
    """The train split as the loop takes it."""
    split = shards.read_split(prepared, "train")
    label, source, text = (
        None if part is None else torch.from_numpy(part)
        for part in (split.label, split.source, split.text)
    )
    aligned = spec.source is None or spec.source.aligned
    return TrainData(torch.from_numpy(split.x), label, source, text, aligned)


def _stop_file(path: Path, interval: float = 0.5) -> Callable[[], bool]:
    """Whether the driver asks to stop; looks at the file at most every `interval` seconds."""
    state = {"looked": 0.0, "found": False}

    def stop() -> bool:
        if time.monotonic() - state["looked"] > interval:
            state.update(looked=time.monotonic(), found=path.exists())
        return bool(state["found"])

    return stop


class _Journal:
    """Appends each record to a JSONL; a resumed run first drops what it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fresh = True

    def __call__(self, record: Record) -> None:
        if self.fresh:
            self.fresh = False
            _keep_before(self.path, record["step"])
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _keep_before(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [r for r in read_history(path) if r["step"] < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
    temporary.replace(path)


def read_history(path: Path) -> list[Record]:
    """The records of a JSONL; a last line that was cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
