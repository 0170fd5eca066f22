"""The training loop: the only one, pure torch, nothing in it about any family.

What a step does depends on (seed, step) and the weights alone. So a resumed run is the
straight run bit for bit, and W workers take the step that one worker takes with the whole
batch, to float tolerance.
"""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.base import Batch, GenerativeModel, Phase, noise_shard
from tasks.training.checkpoint import Checkpoints
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.data import TrainData, check_batch
from tasks.training.optim import (
    learning_rate,
    make_optimizer,
    moving_average,
    resolve_precision,
)

Record = dict[str, Any]


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite; the message names step and phase."""


@dataclass
class Progress:
    """What a checkpoint carries besides tensors."""

    step: int = 0
    seconds: float = 0.0  # in training steps, since the very beginning
    best_step: int | None = None
    best_score: float | None = None  # lower is better


@dataclass
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop; a checkpoint of this very step is on disk
    progress: Progress
    resumed_from: int  # the step at which this call started
    images: int  # that the training saw since the very beginning, with repetition
    peak_memory_mb: float = field(default=0.0)


def train(
    model: GenerativeModel,
    data: TrainData,
    config: TrainConfig,
    directory: Path,
    *,
    comm: Comm | None = None,
    validate: Callable[[GenerativeModel, int], Record] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Outcome:
    """Train `model` in place, resuming from `directory` when it holds a checkpoint.

    Args:
        model: on its device already.
        data: hands out batches by number.
        directory: checkpoints go here; the same for all workers, written by the first.
        comm: the other workers; None: there are none.
        validate: called on the averaged model in evaluation mode, by the first worker, every
            `validate_every` steps and at the end; its `"score"` (lower is better) chooses
            the best checkpoint.
        should_stop: polled between steps; True ends the call with a checkpoint.
        on_record: gets each line of the history, on the first worker.

    Raises:
        NonFiniteLoss: names the step and the phase.
        ValueError: a batch that the workers cannot share, or that the data cannot fill.
    """
    comm = comm or Comm()
    check_batch(len(data), config.batch_size, comm.world)
    phases = _turns(config, model)
    draws = max((turn.phase.repeats for turn in phases), default=1)
    decay = config.ema_decay if phases else 0.0  # what is fitted in closed form is not averaged
    average = AveragedModel(model, multi_avg_fn=moving_average(decay), use_buffers=True)
    per_step = config.batch_size if phases else len(data)
    optimizers = list(dict.fromkeys(turn.optimizer for turn in phases))
    checkpoints = Checkpoints(directory, model, average, optimizers)
    progress = Progress(**checkpoints.load_latest())
    started_at = progress.step
    if int(comm.first(started_at)) != started_at:
        raise RuntimeError(f"worker {comm.rank} sees other checkpoints: is {directory} shared?")
    pending: list[tuple[int, str, dict[str, Tensor]]] = []
    losses = torch.compile(model.losses) if config.compile else model.losses
    mark = (progress.step, progress.seconds)  # where the current log interval began
    stopped = False

    def flush() -> Record:
        """Means since the last flush, over steps and workers; refuses what is not finite."""
        nonlocal mark
        record = _means(pending, comm)
        images = (progress.step - mark[0]) * per_step
        record["images_per_second"] = images / max(progress.seconds - mark[1], 1e-9)
        record |= {"step": progress.step, "seconds": progress.seconds}
        mark = (progress.step, progress.seconds)
        pending.clear()
        return record

    model.train()
    done = _spent(config, progress, model)
    while not done and not stopped:
        begun = time.perf_counter()
        for turn in phases:
            if progress.step % turn.phase.every:
                continue
            for repeat in range(turn.phase.repeats):
                number = progress.step * draws + repeat
                batch = data.batch(number, config.batch_size, config.seed, comm)
                torch.manual_seed(fold_seed(config.seed, progress.step, turn.phase.name, repeat))
                with noise_shard(comm.rank, comm.world):
                    values = turn.run(losses, batch, progress.step, comm)
                    with torch.no_grad():
                        model.after_step(turn.phase.name)
                pending.append((progress.step, turn.phase.name, values))
        if not phases:
            torch.manual_seed(fold_seed(config.seed, progress.step, "fit"))
            with torch.no_grad():
                pending.append((progress.step, "fit", model.fit(data.whole())))
        average.update_parameters(model)
        progress.step += 1
        log = progress.step % config.log_every == 0
        if log and model.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock would stop at the launch of the kernels
        progress.seconds += time.perf_counter() - begun

        if log or comm.world == 1:  # clocks and signals differ: the first worker decides
            progress.seconds = comm.first(progress.seconds)
            stopped = bool(comm.first(float(should_stop())))
        if log or comm.world == 1 or config.budget.steps is not None:
            done = _spent(config, progress, model)
        due = done or progress.step % config.validate_every == 0
        save = done or stopped or progress.step % config.checkpoint_every == 0
        if not (log or due or save):
            continue
        record = flush()
        if comm.rank == 0:
            if due and validate is not None:
                record |= _validated(validate, average, progress, checkpoints)
            on_record(record)
            if save:
                checkpoints.save(vars(progress))
        comm.barrier()
    images = progress.step * per_step
    return Outcome(done, progress, started_at, images, _peak_memory_mb(model.device))


def _turns(config: TrainConfig, model: GenerativeModel) -> list[_Turn]:
    """The model's phases; those of the same modules and optimizer share one optimiser's state."""
    turns: list[_Turn] = []
    for phase in model.phases():
        twins = (t for t in turns if t.phase[1:3] == phase[1:3])
        turns.append(_Turn(phase, config, model, next(twins, None)))
    return turns


class _Turn:
    """A phase with its optimiser, and how to take one optimiser step in it."""

    def __init__(
        self, phase: Phase, config: TrainConfig, model: GenerativeModel, twin: _Turn | None = None
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
            logged["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, options.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return logged


def _means(pending: list[tuple[int, str, dict[str, Tensor]]], comm: Comm) -> Record:
    """Mean of each logged scalar; raises NonFiniteLoss at the first that is not finite."""
    names: dict[str, list[Tensor]] = {}
    for _, phase, values in pending:
        for name, value in values.items():
            names.setdefault(f"{phase}/{name}", []).append(value)
    flat = torch.stack([torch.stack(values).mean() for values in names.values()])
    means = comm.mean(flat)
    if not torch.isfinite(means).all():
        for step, phase, values in pending:
            for name, value in values.items():
                if not torch.isfinite(value):
                    raise NonFiniteLoss(f"step {step}, phase '{phase}': {name} is {float(value)}")
        raise NonFiniteLoss(f"a loss of another worker, before step {pending[-1][0] + 1}")
    return dict(zip(names, means.tolist(), strict=True))


def _validated(
    validate: Callable[[GenerativeModel, int], Record],
    average: AveragedModel,
    progress: Progress,
    checkpoints: Checkpoints,
) -> Record:
    with torch.no_grad():
        metrics = validate(average.module.eval(), progress.step)  # type: ignore[arg-type]
    score = metrics["score"]
    if not math.isfinite(score):
        raise NonFiniteLoss(f"step {progress.step}, validation: the score is {score}")
    if progress.best_score is None or score <= progress.best_score:
        progress.best_step, progress.best_score = progress.step, score
        checkpoints.save_best(progress.step)
    return {f"validation/{name}": value for name, value in metrics.items()}


def _spent(config: TrainConfig, progress: Progress, model: GenerativeModel) -> bool:
    if model.converged:
        return True
    if config.budget.steps is not None:
        return progress.step >= config.budget.steps
    assert config.budget.minutes is not None
    return progress.seconds >= 60 * config.budget.minutes


def fold_seed(*parts: Any) -> int:
    """A seed made of the parts, as `jax.random.fold_in` makes a key."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _peak_memory_mb(device: torch.device) -> float:
    """Of the GPU where there is one, else of this process; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
