"""The gate of the registry: a version becomes champion only by beating the champion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Two versions compare only where all of these agree.
COMPARABLE = {
    "data_sha256": "other data",
    "features_sha256": "other features",
    "protocol": "another protocol version",
    "samples": "another number of samples",  # the distance falls with it
    "score": "another metric",
}


@dataclass(frozen=True)
class Verdict:
    """Which alias a new version gets, and why."""

    alias: str  # "champion" or "challenger"
    reason: str


def judge(candidate: dict[str, Any], champion: dict[str, Any] | None) -> Verdict:
    """Compare a candidate's tags with the champion's (None: there is no champion).

    Both hold the `COMPARABLE` tags, `score`, which is the name of the metric that decides (lower
    is better), and that metric, as numbers or as the strings that MLflow's tags are.
    """
    if champion is None:
        return Verdict("champion", "the first version")
    for tag, what in COMPARABLE.items():
        if str(candidate[tag]) != str(champion.get(tag)):
            return Verdict("challenger", f"not comparable: the champion was measured on {what}")
    name = candidate["score"]
    mine, theirs = float(candidate[name]), float(champion[name])
    if mine < theirs:
        return Verdict("champion", f"{name} {mine:.4g} beats the former champion's {theirs:.4g}")
    return Verdict("challenger", f"{name} {mine:.4g} does not beat the champion's {theirs:.4g}")
