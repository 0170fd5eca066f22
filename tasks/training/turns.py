"""One optimiser's turn within a training step, and the noise that belongs to it."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from models.base import GenerativeModel, Phase
from models.data import Batch
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    resolve_precision,
)


class NonFiniteLoss(ArithmeticError):
    """A loss or a score became NaN or infinite; the message names step and phase."""


Pending = list[tuple[int, str, dict[str, Tensor]]]  # step, phase, what it logs


def make_turns(config: TrainConfig, model: GenerativeModel) -> list[Turn]:
    """The model's phases; those of the same modules and optimizer share one optimiser's state."""
    turns: list[Turn] = []
    for phase in model.phases():
        twins = (t for t in turns if t.phase[1:3] == phase[1:3])
        turns.append(Turn(phase, config, model, next(twins, None)))
    return turns


class Turn:
    """A phase with its optimiser, and how to take one optimiser step in it."""

    def __init__(
        self, phase: Phase, config: TrainConfig, model: GenerativeModel, twin: Turn | None = None
    ) -> None:
        self.phase = phase
        self.parameters = [p for m in phase.modules for p in m.parameters()]
        mine = {id(p) for p in self.parameters}
        self.frozen = [p for p in model.parameters() if id(p) not in mine]
        self.optimizer: torch.optim.Optimizer = (
            twin.optimizer if twin else make_optimizer(phase.optimizer, self.parameters)
        )
        device = model.device.type
        bf16 = resolve_precision(config.precision, model.device) == "bf16"
        self.autocast = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()

    def run(self, losses: Any, batch: Batch, step: int, comm: Comm) -> dict[str, Tensor]:
        """One optimiser step; returns the detached scalars to log."""
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        with self.autocast:
            values = losses(batch, self.phase.name)
        values["loss"].backward()
        comm.average_gradients(self.parameters)
        logged = {name: value.detach().float() for name, value in values.items()}
        options = self.phase.optimizer
        if options.clip_grad_norm is not None:
            logged["grad_norm"] = clip_gradients(self.parameters, options.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return logged


def means(pending: Pending, comm: Comm) -> dict[str, float]:
    """Mean of each logged scalar; raises NonFiniteLoss at the first that is not finite."""
    names: dict[str, list[Tensor]] = {}
    for _, phase, values in pending:
        for name, value in values.items():
            names.setdefault(f"{phase}/{name}", []).append(value)
    flat = torch.stack([torch.stack(values).mean() for values in names.values()])
    found = comm.mean(flat)
    if not torch.isfinite(found).all():
        for step, phase, values in pending:
            for name, value in values.items():
                if not torch.isfinite(value):
                    raise NonFiniteLoss(f"step {step}, phase '{phase}': {name} is {float(value)}")
        raise NonFiniteLoss(f"a loss of another worker, before step {pending[-1][0] + 1}")
    return dict(zip(names, found.tolist(), strict=True))


def fold_seed(*parts: Any) -> int:
    """A seed made of the parts, as `jax.random.fold_in` makes a key."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
