"""What a training step costs in floating-point operations, counted once and beforehand.

Counted are matrix products, convolutions and attention, forward and backward, a multiplication
and an addition as two: what torch's `FlopCounterMode` knows. Elementwise work, normalisation and
the optimiser are not in it, nor is any work outside torch.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.base import GenerativeModel
from models.noise import noise_shard
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.data import Data, batch_on
from tasks.training.turns import fold_seed, make_turns

ROWS = (2, 3, 4)


def count_flops(model: GenerativeModel, data: Data, config: TrainConfig) -> dict[str, int]:
    """FLOPs of one run of each phase on a whole batch, by the phase's name.

    The same on every machine, whatever its devices and workers: the phases are run on the CPU,
    in fp32, uncompiled, with attention spelled out as matrix products, on a copy of the model
    and a few rows of the data. The cost of a batch follows from three such sizes where it is
    a straight line in the rows, as it is unless examples are held against each other; where it is
    not, a whole batch is run.

    Neither the model nor torch's random state is changed.
    """
    few = [_count(model, data, config, rows) for rows in ROWS]
    costs = {}
    for phase, first in few[0].items():
        slope = few[1][phase] - first
        if few[2][phase] - few[1][phase] != slope:
            return _count(model, data, config, config.batch_size)
        costs[phase] = first + (config.batch_size - ROWS[0]) * slope
    return costs


def _count(model: GenerativeModel, data: Data, config: TrainConfig, rows: int) -> dict[str, int]:
    device, alone, costs = model.device, Comm.alone(), {}
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        sdpa_kernel(SDPBackend.MATH),
        noise_shard(0, 1),
    ):
        twin = copy.deepcopy(model).cpu().train()
        for turn in make_turns(config.model_copy(update={"precision": "fp32"}), twin):
            name = turn.phase.name
            batch = data.batch(0, rows, config.seed, alone)
            batch = batch_on(batch, torch.device("cpu"))
            torch.manual_seed(fold_seed(config.seed, 0, name, 0))
            with _Counter() as counter:
                turn.run(twin.losses, batch, 0, alone)
                with torch.no_grad():
                    twin.after_step(name)
            costs[name] = int(counter.get_total_flops())
    return costs


class _Counter(FlopCounterMode):
    """Without a count for each module: the hooks for that forbid `autograd.grad` in a loss."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _Nowhere()  # type: ignore[assignment]


class _Nowhere:
    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
