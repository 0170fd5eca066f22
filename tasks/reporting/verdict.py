"""The leaderboard in words: who is best at what, and where the numbers cannot tell.

Every sentence follows from the rows alone. Two families are told apart where their numbers
differ by more than twice the standard deviation of the difference, each number's own being that of
its seeds or, with one seed, of subsets; shares without either count as equal within a point.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tasks.reporting.spread import spread

Row = dict[str, Any]
APART = 2.0  # standard deviations of a difference
POINT = 0.01  # of a share that has no spread of its own
MUCH = 1.5  # times as fast is worth a word


class Best(NamedTuple):
    """The best row of one metric, and those that it cannot be told from."""

    row: Row
    tied: list[Row]


def verdict(rows: list[Row], title: str, budget: str) -> list[str]:
    """Sentences for the top of the page, the most important one first.

    Args:
        rows: of the leaderboard, failed ones included.
        title: of the data set.
        budget: as in `2,000 steps`.
    """
    ok = [row for row in rows if row["status"] == "ok"]
    failed = [row["family"] for row in rows if row["status"] != "ok"]
    said = []
    if not ok:
        return [f"No family finished on {title}: the table says why."]
    if len(ok) == 1:
        said.append(f"Only {ok[0]['family']} was measured: there is nothing to compare it with.")
    given = dict.fromkeys(str(row["budget"]) for row in ok if "budget" in row)
    if len(given) > 1:
        said.append(f"Budgets differ ({', '.join(given)}): the ranking is of unequal efforts.")
    said += _fidelity(ok, title, budget)
    said += _coverage(ok)
    said += _likelihood(ok)
    said += _speed(ok)
    if failed:
        said.append(f"{_names(failed)} failed: the table says why.")
    return said


def best(rows: list[Row], name: str, *, lower: bool = True) -> Best | None:
    """The best row that has the metric, with its ties; None where no row has it."""
    having = [row for row in rows if isinstance(row.get(name), (int, float))]
    having = [row for row in having if math.isfinite(row[name])]
    if not having:
        return None
    first = min(having, key=lambda row: row[name] if lower else -row[name])
    tied = [r for r in having if r is not first and not _differ(first, r, name)]
    return Best(first, tied)


def _differ(a: Row, b: Row, name: str) -> bool:
    spreads = [spread(row, name) for row in (a, b)]
    if None in spreads:
        return abs(a[name] - b[name]) > POINT
    return bool(abs(a[name] - b[name]) > APART * math.hypot(*(s or 0.0 for s in spreads)))


def _fidelity(ok: list[Row], title: str, budget: str) -> list[str]:
    found = best(ok, "frechet_distance")
    if found is None:
        return []
    row, tied = found
    number = f"{row['frechet_distance']:.2f}{_plus_minus(row, 'frechet_distance')}"
    text = f"For {title} at {budget}: {row['family']} is closest to the data"
    if tied:
        others = _names([r["family"] for r in tied])
        text = (
            f"For {title} at {budget}: {row['family']} has the lowest Fréchet distance, but "
            f"{others} cannot be told from it"
        )
    floor = row.get("frechet_distance_floor")
    said = [f"{text} (Fréchet distance {number}{_floor(floor)})."]
    if floor is not None:
        share = row["frechet_distance"] - floor
        if share <= APART * (spread(row, "frechet_distance") or 0.0):
            said.append("That is no farther from the test images than training images are.")
    sharp = best(ok, "precision", lower=False)
    if sharp is not None and len(ok) > 1 and sharp.row["precision"] > POINT:
        said.append(f"Sharpest: {_share(sharp, 'precision')} of the samples look like real images.")
    return said


def _coverage(ok: list[Row]) -> list[str]:
    found = best(ok, "coverage", lower=False)
    if found is None or len(ok) < 2 or found.row["coverage"] <= POINT:
        return []
    floor = found.row.get("coverage_floor")
    of = f" (as many training images: {floor:.0%})" if floor is not None else ""
    return [f"Most varied: {_share(found, 'coverage')} of the test images are covered{of}."]


def _share(found: Best, name: str) -> str:
    """`dcgan and vae, 98 %`."""
    names = _names([row["family"] for row in (found.row, *found.tied)])
    return f"{names}; {found.row[name]:.0%}"


def _likelihood(ok: list[Row]) -> list[str]:
    """The best of each kind; kinds are never ranked against each other."""
    said = []
    for kind in dict.fromkeys(r["likelihood_kind"] for r in ok if "likelihood_kind" in r):
        same = [row for row in ok if row.get("likelihood_kind") == kind]
        found = best(same, "bits_per_dim")
        if found is None or len(same) < 2:
            continue
        names = _names([row["family"] for row in (found.row, *found.tied)])
        number = f"{found.row['bits_per_dim']:.3f}"
        said.append(f"Of the likelihoods of kind {kind}, {names}: {number} bits/dim is the lowest.")
    return said


def _speed(ok: list[Row]) -> list[str]:
    name = "sample_images_per_second"
    timed = sorted((row for row in ok if name in row), key=lambda row: -row[name])
    if len(timed) < 2:
        return []
    fastest, leader = timed[0], next(row for row in ok if row in timed)
    against = timed[1] if fastest is leader else leader
    ratio = fastest[name] / against[name]
    if ratio < MUCH:
        return []
    return [f"Fastest to sample: {fastest['family']}, {_times(ratio)} {against['family']}."]


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def _plus_minus(row: Row, name: str) -> str:
    value = spread(row, name)
    return "" if value is None else f" ± {value:.2f}"


def _floor(floor: float | None) -> str:
    return "" if floor is None else f"; training images score {floor:.2f}"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
