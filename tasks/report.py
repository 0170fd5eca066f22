"""Stage `report`: the leaderboard as CSV and as one self-contained page.

python -m tasks.report
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tasks import stage, tracking
from tasks.data import shards
from tasks.params import Params, load_params
from tasks.reporting import leaderboard, page
from tasks.reporting.note import note
from tasks.reporting.spread import SUFFIX
from tasks.runs import Run

COMPARED = (
    "frechet_distance",
    "kid",
    "bits_per_dim",
    "nats",
    "anomaly_auroc",
    "psnr",
    "ssim",
    "train_seconds",
    "sample_images_per_second",
)


def run(params: Params, root: Path = Path()) -> list[dict[str, Any]]:
    """Write `reports/leaderboard.{csv,html}` under `root`; returns the rows, best first."""
    rows = leaderboard.load_families(params.families, params.seeds, root)
    manifest = shards.read_manifest(root / "data/prepared")
    judge = json.loads((root / "artifacts/classifier/classifier.json").read_text())
    reports = root / "reports"
    reports.mkdir(exist_ok=True)
    leaderboard.to_table(rows).to_csv(reports / "leaderboard.csv", index=False)
    html = page.render(
        rows, params.dataset.title, manifest, judge, root, budget=str(params.train.budget)
    )
    (reports / "leaderboard.html").write_text(html)
    tracking.tolerant("logging the leaderboard", lambda: _track(params, rows, root, reports))
    return rows


def _track(params: Params, rows: list[dict[str, Any]], root: Path, reports: Path) -> None:
    """Leaderboard to the comparison's run; its families' runs become that run's children."""
    client = tracking.connect(params)
    parent = os.environ.get(tracking.PARENT) or tracking.start_parent(params)
    for row in rows:
        if row["reason"]:
            client.set_tag(parent, f"failed.{row['family']}", row["reason"])
        for name in COMPARED:
            for key in (name, name + SUFFIX):
                if key in row:
                    client.log_metric(parent, f"{row['family']}/{key}", float(row[key]))
        for seed in row["seeds"]:
            which = Run(row["family"], seed)
            child = tracking.run_of(client, params, which, root / which.trained)
            client.set_tag(child, "mlflow.parentRunId", parent)
    client.log_artifacts(parent, str(reports), "leaderboard")
    board = note(rows, params.dataset.title, str(params.train.budget))
    tracking.show(client, params, parent, board)
    if not os.environ.get(tracking.PARENT):
        client.set_terminated(parent)


def main() -> None:
    arguments = stage.parser("report", __doc__)
    arguments.parse_args()
    with stage.running("report"):
        for row in run(load_params()):
            told = row["reason"] or "nothing that ranks it was measured"
            if row["rank"]:
                score = leaderboard.score(row)
                told = f"{leaderboard.SCORES[score]} {row[score]:.3f}"
                told += f" ({row['reason']})" if row["reason"] else ""
            print(f"{row['rank'] or '-'}. {row['family']}: {told}")


if __name__ == "__main__":
    main()
