"""The choice of the best checkpoint while training goes on: who scores it, and what is told.

Every so many steps the averaged weights become a candidate on disk. A `Scorer` validates them,
here and now or beside the training; the numbers go into the history when they are there, under
the step that they belong to.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.base import GenerativeModel
from tasks.training.candidates import Candidates
from tasks.training.history import VALIDATION, Record
from tasks.training.turns import NonFiniteLoss

# Candidates that may wait for their score: what bounds the disk, and the lag. Training that is
# further ahead waits, which it otherwise never does; the processor is then the validator's.
WAITING = 4
POLL_S = 0.05

Validate = Callable[[GenerativeModel, int], dict[str, Any]]  # metrics, "score" (lower better)


class ValidationFailed(RuntimeError):
    """The validation ended with an error, which the message tells."""


class Scorer(ABC):
    """Puts scores to candidates, in the order of their steps."""

    @abstractmethod
    def start(self, candidates: Candidates, model: GenerativeModel) -> None:
        """Begin with these; `model` is one to copy for loading them."""

    @abstractmethod
    def poll(self) -> None:
        """Called now and then by the training; raises where scores are not to be had."""

    def stop(self) -> None:  # noqa: B027
        """The training ends: whatever waits is left to the next one."""


class Inline(Scorer):
    """Calls `validate` on each candidate while training waits."""

    def __init__(self, validate: Validate) -> None:
        self.validate = validate

    def start(self, candidates: Candidates, model: GenerativeModel) -> None:
        self.candidates, self.model = candidates, copy.deepcopy(model)

    def poll(self) -> None:
        score_waiting(self.candidates, self.model, self.validate)


def score_waiting(candidates: Candidates, model: GenerativeModel, validate: Validate) -> int:
    """Validate what waits, in order, with the weights loaded into `model`; returns how many."""
    waiting = candidates.waiting()
    for step in waiting:
        model.load_state_dict(candidates.load(step))
        with torch.no_grad():
            metrics = validate(model.eval(), step)
        candidates.put(step, metrics)
    return len(waiting)


class Selection:
    """What the loop's first worker does about candidates; without a scorer, nothing.

    A context: the scorer is stopped at its end, however that comes.
    """

    def __init__(
        self,
        directory: Path,
        every: int,
        scorer: Scorer | None,
        on_record: Callable[[Record], None],
    ) -> None:
        self.candidates = Candidates(directory, every)
        self.scorer, self.on_record = scorer, on_record
        self.told = -1  # the step of the last validation that is in the history

    def begin(self, model: GenerativeModel, step: int, *, ended: bool) -> None:
        """The averaged `model` is as after `step`, which was the last one if training `ended`."""
        if self.scorer is None:
            return
        self.candidates.rewind(step, ended=ended)
        if ended:
            self.offer(model, step)
        self.scorer.start(self.candidates, model)

    def offer(self, model: GenerativeModel, step: int) -> None:
        """Make the averaged `model` a candidate."""
        if self.scorer is not None:
            self.candidates.add(step, model.state_dict())

    def settle(self, most: int, should_stop: Callable[[], bool]) -> bool:
        """Tell what has become known, once at most so many wait; False: asked to stop before.

        Raises:
            NonFiniteLoss: a score is; names the step.
            ValidationFailed: the scorer did.
        """
        while self.scorer is not None:
            self.scorer.poll()
            waiting = len(self.candidates.waiting())  # first: what is scored now is told later
            self._tell()
            if waiting <= most:
                break
            if should_stop():
                return False
            time.sleep(POLL_S)
        return True

    def _tell(self) -> None:
        for step in self.candidates.scored():
            if step <= self.told:
                continue
            metrics = self.candidates.metrics(step)
            if not math.isfinite(metrics["score"]):
                raise NonFiniteLoss(f"step {step}, validation: the score is {metrics['score']}")
            self.on_record({"step": step, **{VALIDATION + k: v for k, v in metrics.items()}})
            self.told = step

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best that is known; None without any, or without a scorer."""
        return None if self.scorer is None else self.candidates.best()

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *_: object) -> None:
        if self.scorer is not None:
            self.scorer.stop()
