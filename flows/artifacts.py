"""What a flow run shows in Prefect's UI beside its log."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pandas as pd
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks import tracking
from tasks.dvc import Stages, reasons
from tasks.params import Params
from tasks.reporting import leaderboard
from tasks.reporting.note import note


class Progress:
    """How many of the run's stages are done, as a bar."""

    def __init__(self, total: int) -> None:
        self.total, self.ended = total, 0
        self.lock = threading.Lock()
        self.bar = cast(UUID, create_progress_artifact(0.0, "progress", f"of {total} stages"))

    def step(self) -> None:
        """One more stage has ended; from any thread."""
        with self.lock:
            self.ended += 1
            update_progress_artifact(self.bar, 100.0 * self.ended / self.total)


def show_run(params: Params, run_id: str) -> None:
    """A link to the comparison's MLflow run, where MLflow has an address."""
    uri = tracking.tracking_uri(params)
    if uri.startswith("http"):
        experiment = tracking.connect(params).get_run(run_id).info.experiment_id
        link = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        words = "Curves, samples, metrics and models"
        create_link_artifact(link, "the comparison in MLflow", key="mlflow-run", description=words)


def show_leaderboard(params: Params) -> None:
    """The leaderboard in words and a short table, and all of `reports/leaderboard.csv`."""
    title = params.dataset.title
    rows = leaderboard.load_families(params.families, params.seeds, Path())
    words = f"## {title}\n\n{note(rows, title, str(params.train.budget))}"
    create_markdown_artifact(words, key="verdict", description="Which family to use, and why")
    table = pd.read_csv("reports/leaderboard.csv").round(4).astype(object)
    cells: list[Any] = table.where(table.notna(), None).to_dict("records")
    create_table_artifact(cells, key="leaderboard", description=f"{title}: every number")


def show_refreshed(before: Stages, after: Stages) -> str:
    """What ran since `before` and why, which versions came of it, and of which data."""
    ran = reasons(before, after)
    lines = ["## Ran again", ""]
    lines += [f"- `{stage}`: {'; '.join(why)}" for stage, why in ran.items()] or ["- nothing"]
    manifest, registry = Path("data/prepared/manifest.json"), Path("artifacts/registry.json")
    if manifest.exists():
        lines += ["", f"Data: `{json.loads(manifest.read_text())['content_sha256']}`"]
    if "register" in ran and registry.exists():
        made = json.loads(registry.read_text())
        new = [
            f"- {name} version {one['version']}: {one['alias']} ({one['reason']})"
            for name, one in made.items()
            if one["reason"] != "known"  # a version that was there before
        ]
        lines += ["", "## New versions", "", *(new or ["- none"])]
    create_markdown_artifact("\n".join(lines), key="refresh", description="What ran again, and why")
    return "\n".join(lines)
