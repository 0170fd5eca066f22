"""The training loop: the only one, pure torch, nothing in it about any family.

What a step does depends on (seed, step) and the weights alone. So a resumed run is the
straight run bit for bit, and W workers take the step that one worker takes with the whole
batch, to float tolerance.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.base import GenerativeModel
from models.noise import noise_shard
from tasks.training.average import MovingAverage
from tasks.training.checkpoint import Checkpoints, StorageFailed
from tasks.training.comm import Comm
from tasks.training.config import TrainConfig
from tasks.training.data import Data, check_batch
from tasks.training.flops import count_flops
from tasks.training.history import Record
from tasks.training.optim import lay_out, resolve_precision, seed_noise
from tasks.training.selection import WAITING, Inline, Scorer, Selection, Validate, ValidationFailed
from tasks.training.turns import NonFiniteLoss, Pending, Turn, fold_seed, make_turns, means


@dataclass
class Progress:
    """What a checkpoint carries besides tensors; all since the very beginning.

    An image is a training example that was read for a step: a batch of them for each repeat
    of the phase that repeats most in that step, since phases of a step look at the same batches.
    A fit reads the whole split.
    """

    step: int = 0
    seconds: float = 0.0  # in training steps
    images: int = 0
    flops: int | None = None  # None: not counted, where nothing is descended
    phase_flops: dict[str, int] = field(default_factory=dict)  # of one run of each phase

    def spent(self) -> dict[str, Any]:
        """What a budget is held against."""
        known = ("step", "images", "seconds", "flops")
        return {name: getattr(self, name) for name in known}


@dataclass
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop; a checkpoint of this very step is on disk
    progress: Progress
    resumed_from: int  # the step at which this call started
    best_step: int | None = None  # on the first worker, where there is a validation
    best_score: float | None = None
    peak_memory_mb: float = 0.0


def train(
    model: GenerativeModel,
    data: Data,
    config: TrainConfig,
    directory: Path,
    *,
    comm: Comm | None = None,
    validate: Scorer | Validate | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_resume: Callable[[int], None] = lambda step: None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Outcome:
    """Train `model` in place, resuming from `directory` when it holds a checkpoint.

    Args:
        model: on its device already.
        data: hands out batches by number.
        directory: checkpoints and candidates go here; the same for all workers, written by the
            first.
        comm: the other workers; None: there are none.
        validate: what scores the averaged model, on the first worker, every `validate_every`
            steps and at the end; its `"score"` (lower is better) chooses the best checkpoint.
            A function is called while training waits; a `Scorer` takes its own time, and is
            waited for at the end.
        should_stop: polled between steps; True ends the call with a checkpoint.
        on_resume: told the step at which this call starts, before anything is recorded.
        on_record: gets each line of the history, on the first worker. What a validation finds
            is a line of its own, which may come later than its step.

    Raises:
        NonFiniteLoss: names the step, and the phase or the validation.
        StorageFailed: the disk took no checkpoint, candidate or record.
        ValidationFailed: the scorer did.
        ValueError: a batch that the workers cannot share, or that the data cannot fill; a budget
            of flops for what has none.
    """
    comm = comm or Comm()
    check_batch(len(data), config.batch_size, comm.world)
    lay_out(model, resolve_precision(config.precision, model.device))
    turns = make_turns(config, model)
    draws = max((turn.phase.repeats for turn in turns), default=1)
    decay = config.ema_decay if turns else 0.0  # what is fitted in closed form is not averaged
    average = MovingAverage(model, decay)
    optimizers = list(dict.fromkeys(turn.optimizer for turn in turns))
    checkpoints = Checkpoints(directory, model, average, optimizers)
    progress = Progress(**checkpoints.load_latest())
    started_at = progress.step
    if comm.first(started_at) != [started_at]:
        raise RuntimeError(f"worker {comm.rank} sees other checkpoints: is {directory} shared?")
    if turns and not progress.phase_flops:
        progress.phase_flops, progress.flops = count_flops(model, data, config), 0
    pending: Pending = []
    losses = torch.compile(model.losses) if config.compile else model.losses
    mark = (progress.images, progress.seconds)  # where the current log interval began

    def flush() -> Record:
        """Means since the last flush, over steps and workers; refuses what is not finite."""
        nonlocal mark
        record: Record = means(pending, comm)
        seconds = max(progress.seconds - mark[1], 1e-9)
        record["images_per_second"] = (progress.images - mark[0]) / seconds
        record |= {name: n for name, n in progress.spent().items() if n is not None}
        mark = (progress.images, progress.seconds)
        pending.clear()
        return record

    model.train()
    done, stopped = _spent(config, progress, model), False
    averaged: GenerativeModel = average.module  # type: ignore[assignment]
    scorer = Inline(validate) if callable(validate) else validate
    with Selection(
        directory, config.validate_every, scorer if comm.rank == 0 else None, on_record
    ) as selection:
        if comm.rank == 0:
            on_resume(started_at)
            selection.begin(averaged, started_at, ended=done)
        while not done and not stopped:
            begun = time.perf_counter()
            pending += _step(model, losses, turns, draws, data, config, progress, comm)
            average.update()
            log = progress.step % config.log_every == 0
            if log and model.device.type == "cuda":
                torch.cuda.synchronize()  # else the clock would stop at the launch of the kernels
            progress.seconds += time.perf_counter() - begun

            if log or comm.world == 1:  # clocks and signals differ: the first worker decides
                told = comm.first(progress.seconds, float(should_stop()))
                progress.seconds, stopped = told[0], bool(told[1])
            if log or comm.world == 1 or config.budget.minutes is None:
                done = _spent(config, progress, model)
            due = done or progress.step % config.validate_every == 0
            save = done or stopped or progress.step % config.checkpoint_every == 0
            if not (log or due or save):
                continue
            record, failure = flush(), None
            if comm.rank == 0:
                try:
                    on_record(record)
                    if due:
                        selection.offer(averaged, progress.step)
                    if save:
                        checkpoints.save(vars(progress))
                        selection.candidates.prune(checkpoints.oldest())
                    selection.settle(WAITING, should_stop)
                except (NonFiniteLoss, StorageFailed, ValidationFailed) as error:
                    failure = error
            if any(comm.first(float(failure is not None))):  # the others wait, here and for this
                raise failure or NonFiniteLoss("the first worker could not go on")
        finished = done and selection.settle(0, should_stop)
    best_step, best_score = selection.best() or (None, None)
    memory = _peak_memory_mb(model.device)
    return Outcome(finished, progress, started_at, best_step, best_score, memory)


def _step(
    model: GenerativeModel,
    losses: Any,
    turns: list[Turn],
    draws: int,
    data: Data,
    config: TrainConfig,
    progress: Progress,
    comm: Comm,
) -> Pending:
    """One training step: every phase whose turn it is, or one fit; returns what is to be logged."""
    pending: Pending = []
    step, seed = progress.step, config.seed
    due = [turn for turn in turns if step % turn.phase.every == 0]
    for turn in due:
        name = turn.phase.name
        for repeat in range(turn.phase.repeats):
            batch = data.batch(step * draws + repeat, config.batch_size, seed, comm)
            seed_noise(fold_seed(seed, step, name, repeat), batch.x.device)
            with noise_shard(comm.rank, comm.world):
                values = turn.run(losses, batch, step, comm)
                with torch.no_grad():
                    model.after_step(name)
            pending.append((step, name, values))
            assert progress.flops is not None
            progress.flops += progress.phase_flops[name]
    progress.images += config.batch_size * max((turn.phase.repeats for turn in due), default=0)
    if not turns:
        seed_noise(fold_seed(seed, step, "fit"), model.device)
        with torch.no_grad():
            pending.append((step, "fit", model.fit(data.whole())))
        progress.images += len(data)
    progress.step += 1
    return pending


def _spent(config: TrainConfig, progress: Progress, model: GenerativeModel) -> bool:
    return model.converged or config.budget.share(**progress.spent()) >= 1


def _peak_memory_mb(device: torch.device) -> float:
    """Of the GPU where there is one, else of this process; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
