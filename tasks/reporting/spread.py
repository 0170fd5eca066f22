"""The runs of one family, one for each seed, as one row: means, and how far the seeds lie apart."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
SUFFIX = "_seed_std"
APART = ("family", "seed", "status", "reason", "provenance", "not_applicable")


def combine(runs: list[Row]) -> Row:
    """One row of a family's runs, in the order of their seeds.

    A number is the mean over the seeds; `<name>_seed_std` is their standard deviation, where there
    are two or more. What not every seed has is left out, with the reason of the seed that lacks
    it. `seeds` are those that the row is of, `runs` their own rows; a seed that failed stands in
    `reason`, and the row is ok as long as one did not.
    """
    ok = [run for run in runs if run["status"] == "ok"]
    several = len(runs) > 1
    reason = "; ".join(
        f"seed {run['seed']}: {run['reason']}" if several else run["reason"]
        for run in runs
        if run["status"] != "ok"
    )
    row: Row = {"family": runs[0]["family"], "status": "ok" if ok else "failed", "reason": reason}
    row |= {"seeds": [run["seed"] for run in ok], "runs": ok}
    if not ok:
        return row
    row |= {"provenance": ok[0]["provenance"], "not_applicable": _reasons(ok)}
    for name in dict.fromkeys(name for run in ok for name in run):
        if name in APART or any(name not in run for run in ok):
            continue
        row |= _value(name, [run[name] for run in ok])
    return row


def spread(row: Row, name: str) -> float | None:
    """How uncertain a number is: the deviation of the seeds, or with one seed of subsets."""
    for suffix in (SUFFIX, "_std_error", "_std"):
        if name + suffix in row:
            return float(row[name + suffix])
    return None


def _value(name: str, values: list[Any]) -> Row:
    if all(isinstance(value, float) for value in values) and len(values) > 1:
        mean = {name: statistics.fmean(values)}
        of_a_spread = name.endswith(("_std", "_std_error"))
        return mean if of_a_spread else {**mean, name + SUFFIX: statistics.stdev(values)}
    if all(value == values[0] for value in values):  # a count, a name, a setting; or one run
        return {name: values[0]}
    if all(isinstance(value, (int, float)) for value in values):
        return {name: statistics.fmean(values), name + SUFFIX: statistics.stdev(values)}
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return {name: [statistics.fmean(part) for part in zip(*values, strict=True)]}
    if all(isinstance(value, dict) for value in values):  # by class; those that every seed has
        keys = [key for key in values[0] if all(key in value for value in values)]
        return {name: {key: statistics.fmean(value[key] for value in values) for key in keys}}
    return {name: ", ".join(dict.fromkeys(map(str, values)))}


def _reasons(ok: list[Row]) -> dict[str, str]:
    """Why a number is missing; where only some seeds lack it, which."""
    found: dict[str, str] = {}
    for run in ok:
        for name, reason in run["not_applicable"].items():
            lacking = all(name in other["not_applicable"] for other in ok)
            found.setdefault(name, reason if lacking else f"seed {run['seed']}: {reason}")
    return found
