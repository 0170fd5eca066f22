"""What the driver sees of a training: progress lines, and MLflow's share of the history."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tasks.tracking import TrainingRun
from tasks.training.candidates import Candidates
from tasks.training.config import Budget
from tasks.training.history import HISTORY, Record, read_history
from tasks.training.worker import CHECKPOINTS

COLLAPSE = 0.5  # of what as many training images cover
PAUSE_S = 2.0  # between two lines, and before a training that tells nothing is said to wait
TOLD = ("validation/bits_per_dim", "validation/frechet_distance", "validation/loss")


class Watch:
    """Reads what the first worker writes: a progress line now and then, and MLflow's share."""

    def __init__(self, work: Path, budget: Budget, tracked: TrainingRun) -> None:
        self.path, self.budget, self.tracked = work / HISTORY, budget, tracked
        self.candidates = Candidates(work / CHECKPOINTS)
        self.seen: tuple[int, int] = (0, 0)
        self.shown, self.step, self.fallen, self.waiting = 0.0, -1, False, 0

    def __call__(self) -> None:
        records = read_history(self.path)
        if not records:
            return
        self._deliver(records)
        due = time.monotonic() - self.shown >= PAUSE_S
        if records[-1]["step"] == self.step:
            if due:
                self._wait()
        elif due or self._share(records[-1]) >= 1:
            self.shown, self.step = time.monotonic(), records[-1]["step"]
            print(self._line(records), flush=True)
        self._warn(records)

    def _deliver(self, records: list[Record]) -> None:
        """Where there is something new: a step, or the validation of an earlier one."""
        news = records[-1]["step"], sum("validation/score" in r for r in records)
        if news != self.seen and self.tracked.deliver(records):
            self.seen = news

    def _wait(self) -> None:
        """Say how many validations are still to come, each time it is another number."""
        waiting = len(self.candidates.waiting())
        if waiting and waiting != self.waiting:
            self.shown = time.monotonic()
            plural = "" if waiting == 1 else "s"
            print(f"step {self.step:,}: waiting for {waiting} validation{plural}", flush=True)
        self.waiting = waiting

    def _warn(self, records: list[Record]) -> None:
        """Once for each fall: the coverage was there, and less than half of the floor is left."""
        checked = [r for r in records if r.get("validation/coverage_floor")]
        shares = [r["validation/coverage"] / r["validation/coverage_floor"] for r in checked]
        fallen = bool(shares) and max(shares) >= COLLAPSE and shares[-1] < COLLAPSE
        if fallen and not self.fallen:
            print(
                f"warning: mode collapse? at step {checked[-1]['step']:,} the samples cover "
                f"{checked[-1]['validation/coverage']:.0%} of the validation images; it was "
                f"{max(r['validation/coverage'] for r in checked):.0%}",
                flush=True,
            )
        self.fallen = fallen

    def _share(self, record: Record) -> float:
        spent = {name: record[name] for name in ("step", "images", "seconds")}
        return self.budget.share(**spent, flops=record.get("flops"))

    def _line(self, records: list[Record]) -> str:
        last = records[-1]
        share = min(self._share(last), 1.0)
        left = last["seconds"] * (1 - share) / max(share, 1e-9)
        losses = "  ".join(
            f"{name.removesuffix('/loss')} loss {value:.3f}"
            for name, value in last.items()
            if name.endswith("/loss") and name not in TOLD
        )
        checked: dict[str, Any] = next(
            (r for r in reversed(records) if "validation/score" in r), {}
        )
        found = "  ".join(
            f"{name.replace('/', ' ') if name.endswith('loss') else name.split('/')[1]} "
            f"{checked[name]:.3f}"
            for name in TOLD
            if name in checked
        )
        speed = f"{last['images_per_second']:,.0f} images/s"
        eta = f"ETA {int(left // 60)}:{int(left % 60):02d}"
        return f"{self._progress(last)} ({share:.0%})  {losses}  {found}  {speed}  {eta}"

    def _progress(self, last: Record) -> str:
        """`step 10/20`, or the step and what is spent of another budget."""
        step, budget = f"step {last['step']:,}", self.budget
        if budget.steps is not None:
            return f"{step}/{budget.steps:,}"
        if budget.images is not None:
            return f"{step}  {last['images']:,}/{budget.images:,} images"
        if budget.minutes is not None:
            return f"{step}  {last['seconds'] / 60:.1f}/{budget.minutes:g} minutes"
        return f"{step}  {last['flops']:.2e}/{budget.flops:.2e} FLOPs"
