"""What changed between two comparisons: parameters, data, numbers, and whether it is more than
noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scipy.stats import norm, ttest_ind_from_stats

from tasks.registry import COMPARABLE
from tasks.reporting.spread import SUFFIX, combine, spread
from tasks.runs import Run

LEVEL = 0.05  # of the test: a change is called one below it
BETTER_LOWER = (
    "frechet_distance",
    "frechet_distance_train",
    "kid",
    "bits_per_dim",
    "nats",
    "perplexity",
    "train_seconds",
)
BETTER_HIGHER = (
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "condition_accuracy",
    "cas",
    "small_set_gain",
    "anomaly_auroc",
    "psnr",
    "ssim",
    "sample_images_per_second",
)
MEASURED = (*BETTER_LOWER, *BETTER_HIGHER)


@dataclass
class Comparison:
    """What is known of one comparison.

    Attributes:
        name: as the user gave it.
        params: dotted keys and their values.
        runs: the metrics of every run, as in `metrics/<family>-<seed>.json`.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    runs: dict[Run, dict[str, Any]] = field(default_factory=dict)


class Change(NamedTuple):
    """One metric of one family, before and after.

    `p` is the probability of a difference at least as large by chance: Welch's test over the seeds
    where both have two or more; else from the deviation over subsets, which knows nothing of how
    much another seed would have changed (`one_seed`); None where no spread is known.
    """

    family: str
    metric: str
    before: float
    after: float
    p: float | None
    one_seed: bool

    @property
    def word(self) -> str:
        """`better`, `worse`, `equal`, or `noise` where chance explains it."""
        if self.before == self.after:
            return "equal"
        if self.p is not None and self.p >= LEVEL:
            return "noise"
        lower = self.metric in BETTER_LOWER
        return "better" if (self.after < self.before) is lower else "worse"


def changed_params(a: Comparison, b: Comparison) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values; None where one has no such key."""
    keys = dict.fromkeys([*a.params, *b.params])
    pairs = [(key, a.params.get(key), b.params.get(key)) for key in keys]
    return [(key, before, after) for key, before, after in pairs if before != after]


def changes(a: Comparison, b: Comparison) -> tuple[list[Change], list[str]]:
    """The numbers of the families that both have, and remarks: what cannot be compared and why,
    which family or seed only one of them has."""
    before, after = _families(a), _families(b)
    found, remarks = [], []
    for family in dict.fromkeys([*before, *after]):
        if family not in before or family not in after:
            remarks.append(f"{family}: only in {(a if family in before else b).name}")
            continue
        old, new = before[family], after[family]
        if old["seeds"] != new["seeds"]:
            remarks.append(f"{family}: seeds {_listed(old)} against {_listed(new)}")
        reason = _incomparable(old, new)
        if reason:
            remarks.append(f"{family}: not comparable: {reason}")
            continue
        both = [name for name in MEASURED if name in old and name in new]
        found += [_change(family, name, old, new) for name in both]
    return found, remarks


def _families(comparison: Comparison) -> dict[str, dict[str, Any]]:
    by_family: dict[str, list[dict[str, Any]]] = {}
    for run, metrics in sorted(comparison.runs.items()):
        row = {**metrics, "family": run.family, "seed": run.seed, "status": "ok", "reason": ""}
        row.setdefault("not_applicable", {})
        row.setdefault("provenance", {})
        by_family.setdefault(run.family, []).append(row)
    return {family: combine(rows) for family, rows in by_family.items()}


def _incomparable(old: dict[str, Any], new: dict[str, Any]) -> str:
    tags = [{**row, **row["provenance"]} for row in (old, new)]
    for name, what in COMPARABLE.items():
        one, other = (_plain(tag.get(name)) for tag in tags)
        if one != other:
            return what
    return ""


def _plain(value: Any) -> str:
    """MLflow makes a float of every number."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row["seeds"]))


def _change(family: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    counts = [len(row["seeds"]) for row in (old, new)]
    if min(counts) > 1:
        deviations = [row.get(name + SUFFIX, 0.0) for row in (old, new)]
        if max(deviations) == 0:
            return Change(family, name, old[name], new[name], None, False)
        test = ttest_ind_from_stats(
            old[name], deviations[0], counts[0], new[name], deviations[1], counts[1], False
        )
        return Change(family, name, old[name], new[name], float(test.pvalue), False)
    errors = [spread(row, name) for row in (old, new)]
    total = math.hypot(*(error or 0.0 for error in errors))
    known = None not in errors and total > 0
    p = 2 * float(norm.sf(abs(new[name] - old[name]) / total)) if known else None
    return Change(family, name, old[name], new[name], p, True)
