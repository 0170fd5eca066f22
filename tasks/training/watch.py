"""What the driver sees of a training: progress lines, and MLflow's share of the history."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tasks.tracking import TrainingRun
from tasks.training.config import Budget
from tasks.training.worker import HISTORY, read_history

COLLAPSE = 0.5  # of what as many training images cover


class Watch:
    """Reads what the first worker writes: a progress line now and then, and MLflow's share."""

    def __init__(self, work: Path, budget: Budget, tracked: TrainingRun) -> None:
        self.path, self.budget, self.tracked = work / HISTORY, budget, tracked
        self.shown, self.step, self.fallen = 0.0, -1, False

    def __call__(self) -> None:
        records = read_history(self.path)
        if not records or records[-1]["step"] == self.step:
            return
        self.tracked.deliver(records)
        if time.monotonic() - self.shown < 2 and not self._share(records[-1]) >= 1:
            return
        self.shown, self.step = time.monotonic(), records[-1]["step"]
        print(self._line(records), flush=True)
        self._warn(records)

    def _warn(self, records: list[dict[str, Any]]) -> None:
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

    def _share(self, record: dict[str, Any]) -> float:
        if self.budget.steps is not None:
            return record["step"] / self.budget.steps
        assert self.budget.minutes is not None
        return record["seconds"] / (60 * self.budget.minutes)

    def _line(self, records: list[dict[str, Any]]) -> str:
        last = records[-1]
        share = min(self._share(last), 1.0)
        left = last["seconds"] * (1 - share) / max(share, 1e-9)
        losses = "  ".join(
            f"{name.removesuffix('/loss')} loss {value:.3f}"
            for name, value in last.items()
            if name.endswith("/loss")
        )
        checked: dict[str, Any] = next(
            (r for r in reversed(records) if "validation/score" in r), {}
        )
        found = "  ".join(
            f"{name.split('/')[1]} {checked[name]:.3f}"
            for name in ("validation/bits_per_dim", "validation/frechet_distance")
            if name in checked
        )
        total = f"/{self.budget.steps:,}" if self.budget.steps else ""
        speed = f"{last['images_per_second']:,.0f} images/s"
        eta = f"ETA {int(left // 60)}:{int(left % 60):02d}"
        return f"step {last['step']:,}{total} ({share:.0%})  {losses}  {found}  {speed}  {eta}"
