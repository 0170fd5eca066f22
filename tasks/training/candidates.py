"""Candidates: averaged weights on disk that wait for their score, and the best of them.

    candidates/step-00000500.safetensors  the averaged weights after step 500
    candidates/step-00000500.json         what their validation found, "score" among it

Each file appears whole or not at all, and a file's name says all there is to know about its
state. So whoever is killed, a trainer or a validator, its successor goes on from what is there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tasks.training.checkpoint import save_tensors, writing

Metrics = dict[str, Any]


class Candidates:
    """The candidates of the training whose checkpoints are in `directory`.

    `every`: those of steps that this divides are on schedule; another can only be the last of
    a training, and a longer training would not have had it.
    """

    def __init__(self, directory: Path, every: int = 1) -> None:
        self.directory, self.every = directory / "candidates", every

    def add(self, step: int, weights: dict[str, Tensor]) -> None:
        """Write a candidate; what is there already stays, for it is the same."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._weights(step).exists():
            _replace(self._weights(step), lambda path: save_tensors(weights, path))

    def put(self, step: int, metrics: Metrics) -> None:
        """Write what the validation of a candidate found."""
        _replace(self._score(step), lambda path: path.write_text(json.dumps(metrics)))

    def load(self, step: int) -> dict[str, Tensor]:
        return load_file(self._weights(step))

    def metrics(self, step: int) -> Metrics:
        return json.loads(self._score(step).read_text())

    def scored(self) -> list[int]:
        """The steps whose validation is known, in order."""
        return _steps(self.directory, ".json")

    def waiting(self) -> list[int]:
        """The steps whose validation is not, in order."""
        return sorted(set(_steps(self.directory, ".safetensors")) - set(self.scored()))

    def rewind(self, step: int, *, ended: bool) -> None:
        """Drop what a training that goes on from `step` will make again, and, unless it `ended`
        there, what it would never have made."""
        for path in self.directory.glob("*.tmp-*"):
            path.unlink(missing_ok=True)
        for known in {*self.scored(), *self.waiting()}:
            if known > step or (known % self.every and not ended):
                self._weights(known).unlink(missing_ok=True)
                self._score(known).unlink(missing_ok=True)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best, the later of equals; None before there is one."""
        scores = {step: self.metrics(step)["score"] for step in self.scored()}
        finite = [(score, -step) for step, score in scores.items() if math.isfinite(score)]
        if not finite:
            return None
        score, step = min(finite)
        return -step, score

    def prune(self, safe: int) -> None:
        """Delete the weights of those that can no longer become the best.

        Training may have to go on from any step from `safe` on, where its oldest checkpoint is,
        and what comes later would be undone. So the best up to there is kept, and from there on
        each that is better than all before.
        """
        kept: list[int] = []
        lowest = math.inf
        on_schedule = [step for step in self.scored() if step % self.every == 0]
        for step in on_schedule:
            score = self.metrics(step)["score"]
            if score <= lowest:
                lowest = score
                kept = [step] if step <= safe else [*kept, step]
        for step in set(on_schedule) - set(kept):
            self._weights(step).unlink(missing_ok=True)

    def _weights(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.safetensors"

    def _score(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.json"


def load_best(directory: Path) -> dict[str, Tensor]:
    """State dict of the best averaged weights of the training with its checkpoints there.

    Raises:
        FileNotFoundError: no candidate has a score.
    """
    candidates = Candidates(directory)
    best = candidates.best()
    if best is None:
        raise FileNotFoundError(f"{candidates.directory}: no candidate has a score")
    return candidates.load(best[0])


def _steps(directory: Path, suffix: str) -> list[int]:
    names = (p.stem for p in directory.glob(f"step-*{suffix}"))
    return sorted(int(name.removeprefix("step-")) for name in names)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` the file under a temporary name, and rename it; StorageFailed where that fails."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with writing(path.name, path.parent):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
