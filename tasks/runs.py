"""A run: one training of the comparison, a family with a seed, and where its results lie."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

UNEXPLAINED = "did not finish (interrupted or killed)"  # the reason until the stage has another


class Run(NamedTuple):
    """One family trained with one seed. Paths are relative to the project's folder."""

    family: str
    seed: int

    @property
    def name(self) -> str:
        """As in `train@vae-0` and in the names of its files."""
        return f"{self.family}-{self.seed}"

    @property
    def trained(self) -> Path:
        """Folder of the best checkpoint, the history and the costs."""
        return Path("artifacts/train", self.name)

    @property
    def evaluated(self) -> Path:
        """Folder of the evaluation's pictures."""
        return Path("artifacts/evaluate", self.name)

    @property
    def metrics(self) -> Path:
        return Path("metrics", f"{self.name}.json")

    @property
    def failure(self) -> Path:
        """Where the reason of a failure stands until the run succeeds."""
        return Path("metrics", f"{self.name}.failed.json")


def runs(families: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Every family with the first seed, then with the next: a result of each comes early."""
    families = tuple(families)
    return [Run(family, seed) for seed in seeds for family in families]


def unexplained(stage: str) -> bool:
    """Whether `train@vae-0`, say, began and ended without the time to say why."""
    record = Path("metrics", f"{stage.partition('@')[2]}.failed.json")
    return record.exists() and json.loads(record.read_text())["reason"] == UNEXPLAINED
