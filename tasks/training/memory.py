"""Whether the training data is to lie in memory or to stream, and what there is to hold it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from models.base import GenerativeModel
from models.data import DataSpec
from tasks.data import shards
from tasks.data.blocks import blocks, columns, row_bytes
from tasks.errors import BadInput
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.data import Data, TrainData
from tasks.training.stream import StreamData, independent_columns, order_of

SHARE = 0.5  # of a worker's memory: the model, its gradients and the validation need the rest
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (("", "memory.max"), ("memory", "memory.limit_in_bytes"))  # of version 2, of version 1


def train_data(
    prepared: Path, model: GenerativeModel, config: TrainConfig, comm: Comm, neighbours: int
) -> Data:
    """The train split as the loop takes it: on the model's device, or streaming there.

    `auto` lets it stream where it takes more than half of this worker's share of the node's
    memory (of which there are `neighbours` like it), or of the device's. The batches are the same
    either way, so that it may change when a training is resumed.

    Raises BadInput where it would have to stream for a family that is fitted to all of it at once.
    """
    needed, there = size(prepared, model.data), memory(model.device, neighbours)
    fits = config.data == "memory" or (config.data == "auto" and needed <= SHARE * there)
    # one that cannot hold it is enough: all workers do the same
    if float(comm.mean(torch.tensor(float(fits), device=model.device))) == 1:
        return read(prepared, model.data).to(model.device)
    if not model.phases():
        raise BadInput(
            f"this family is fitted to all training data at once, which takes {_gib(needed)}; a "
            f"worker has {_gib(there)}, and half of that is for the rest: prepare less data, give "
            "it more memory, or set train.data: memory to try"
        )
    return StreamData(prepared, model.data).to(model.device)


def read(prepared: Path, spec: DataSpec) -> TrainData:
    """The train split in memory, in the order in which it would stream."""
    split, found = shards.read_split(prepared, "train"), blocks(prepared, "train")
    label, source, text = (
        None if part is None else torch.from_numpy(part)
        for part in (split.label, split.source, split.text)
    )
    orders = tuple(order_of(spec, found, *together) for together in independent_columns(spec))
    aligned = spec.source is None or spec.source.aligned
    return TrainData(torch.from_numpy(split.x), label, source, text, aligned, orders)


def size(prepared: Path, spec: DataSpec) -> int:
    """Bytes of the train split in memory."""
    found, names = blocks(prepared, "train"), columns(spec)
    return sum(block.rows(n) * row_bytes(spec, n) for block in found for n in names)


def memory(device: torch.device, neighbours: int = 1) -> int:
    """Bytes that one of so many workers on this node may have, on the device if that is less."""
    there = min([psutil.virtual_memory().total, *cgroup_limits()]) // neighbours
    if device.type == "cuda":
        there = min(there, torch.cuda.get_device_properties(device).total_memory)
    return there


def cgroup_limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the groups that this process is in allow it, in bytes; containers have such limits."""
    lines = own.read_text().splitlines() if own.exists() else []
    groups = [line.split(":", 2)[1:] for line in lines]
    found = []
    for folder, name in LIMITS:
        inner = [Path(group.lstrip("/")) for kind, group in groups if kind == folder]
        # inside a container, the group's own path may not be there; its root then is the group
        for path in {p for group in inner for p in (group, *group.parents)}:
            file = root / folder / path / name
            text = file.read_text().strip() if file.is_file() else "max"
            found += [int(text)] if text.isdigit() else []
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
