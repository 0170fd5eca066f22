"""The cost model fitted to the parts of a step, and its steps beside those of Ray's workers."""

from __future__ import annotations

import os
import statistics
from typing import Any

from benchmarks.cost_model import (
    Job,
    crowding,
    exchanged,
    fit,
    fit_spread,
    longest,
)
from benchmarks.scaling_parts import CASES, EVERY
from models import store
from tasks.data.config import DatasetConfig

CORES = os.cpu_count() or 1
HEADINGS = [
    *("", "workers", "a step of Ray's workers, ms", "without Ray", "predicted from one worker's"),
    *("from the step beside others", "of that exchange", "waiting"),
]


def gradients(case: str) -> int:
    """Bytes of them, of the digits."""
    family, config = CASES[case]
    data = DatasetConfig().outline().model_dump(mode="json")
    return sum(p.numel() * 4 for p in store.build(family, config, data).parameters())


def median(parts: list[dict[str, Any]], workers: int, *keys: str) -> float:
    """Of the rounds of so many workers, of what lies under these keys."""
    values = []
    for value in (part for part in parts if part["workers"] == workers):
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.median(values)


def check(parts: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit, its errors, the predicted and measured steps, the workers' starts.

    `from_one` knows the step of one worker and the cores; `from_beside` the step beside the others.
    """
    points = [
        (float(size), part["workers"], seconds)
        for part in parts
        for size, seconds in part["all_reduce"].items()
        if part["workers"] > 1
    ]
    link = fit(points)
    errors = [link.seconds(size, n) / seconds - 1 for size, n, seconds in points]
    jobs = {case: _job(case) for case in CASES if case in parts[0]}
    counts = sorted({part["workers"] for part in parts})
    waits = [
        (beside, n, median(parts, n, case, "together", "exchange") - sent)
        for case, job in jobs.items()
        for n in counts
        if n > 1
        for beside in (median(parts, n, case, "beside", "step"),)
        for sent in (1000 * exchanged(job, n, link),)
    ]
    spread = fit_spread(waits)
    size = statistics.median(map(abs, errors))
    print(f"{link}; errors {min(errors):.0%} to {max(errors):.0%}, median {size:.0%}")
    print(f"a step's deviation that explains the waiting: {spread:.0%}")
    steps = {
        case: [_step(case, n, parts, runs, 1000 * exchanged(job, n, link), spread) for n in counts]
        for case, job in jobs.items()
    }
    starts = {
        n: statistics.median([run["start_s"] for run in runs if run["workers"] == n])
        for n in counts
    }
    print("start, s: " + ", ".join(f"{n} workers {s:.1f}" for n, s in starts.items()))
    found = {"latency": link.latency, "bandwidth": link.bandwidth, "errors": errors}
    return {
        "fit": {**found, "spread": spread},
        "steps": steps,
        "starts": starts,
        "tables": [{"headings": HEADINGS, "rows": _lines(steps)}],
    }


def _job(case: str) -> Job:
    size = gradients(case)
    return Job((size,), log_every=EVERY, state=4 * size)


def _step(
    case: str,
    n: int,
    parts: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    sent: float,
    spread: float,
) -> dict[str, float]:
    """Milliseconds, of so many workers."""
    alone, beside = (median(parts, k, case, "beside", "step") for k in (1, n))
    told = [run["step_ms"] for run in runs if (run["case"], run["workers"]) == (case, n)]
    waiting = spread * longest(n)
    row = {
        "workers": n,
        "ray": statistics.median(told),
        "together": median(parts, n, case, "together", "step"),
        "from_one": alone * crowding(n, CORES) * (1 + waiting) + sent,
        "from_beside": beside * (1 + waiting) + sent,
        "exchange": sent,
        "waiting": beside * waiting,
        "exchange_seen": median(parts, n, case, "together", "exchange"),
    }
    row |= {f"error_{k}": row[k] / row["ray"] - 1 for k in ("from_one", "from_beside")}
    print(f"{case}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return row


def _lines(steps: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    found = []
    for case, rows in steps.items():
        for row in rows:
            line = [case, str(row["workers"]), f"{row['ray']:.1f}", f"{row['together']:.1f}"]
            for key in ("from_one", "from_beside"):
                line.append(f"{row[key]:.1f} ({row[f'error_{key}']:+.0%})")
            found.append([*line, f"{row['exchange']:.1f}", f"{row['waiting']:.1f}"])
    return found
