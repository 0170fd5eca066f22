"""Tables in the terminal: the leaderboard, and the families."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from models import FAMILIES
from models.data import PLURALS
from tasks.params import Params
from tasks.reporting.spread import spread

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def show_leaderboard(params: Params) -> None:
    """Print the leaderboard, where the report is, and how to open the UIs."""
    import pandas as pd

    if not Path("reports/leaderboard.csv").exists():
        raise SystemExit("genarena: no leaderboard: the run ended before its report")
    rows = pd.read_csv("reports/leaderboard.csv").to_dict("records")
    ok = [row for row in rows if row["status"] == "ok"]
    shown = [name for name, key in SHOWN.items() if any(pd.notna(row[key]) for row in ok)]
    title = f"Leaderboard: {params.dataset.title}, test split"
    table = _table(title, rows, shown)
    wide = console.options.update(max_width=1_000)
    for name in SPARE:  # a narrow window has no room for all
        if name in shown and Measurement.get(console, wide, table).maximum > console.width:
            shown.remove(name)
            table = _table(title, rows, shown)
    console.print(table)
    for row in (row for row in rows if isinstance(row["reason"], str)):
        console.print(f"{row['family']} failed: {row['reason']}", style="red", markup=False)
    report = Path("reports/leaderboard.html").absolute().as_uri()
    console.print(f"Report: {report}", soft_wrap=True)
    console.print("UIs:    make ui   (MLflow: runs and models; Prefect: flow runs)")


def _table(title: str, rows: list[dict[Any, Any]], shown: list[str]) -> Table:
    table = Table(title=title)
    for name in ("#", "family", *shown):
        left = name in ("#", "family")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        if row["status"] != "ok":
            table.add_row("-", row["family"], "[red]failed")
            continue
        values = [(SHOWN[name], row[SHOWN[name]]) for name in shown]
        cells = [_cell(key, row) if value == value else "-" for key, value in values]
        rank = f"{row['rank']:.0f}" if row["rank"] == row["rank"] else "-"
        table.add_row(rank, row["family"], *cells)
    return table


SPARE = ("KID", "PSNR", "anomalies", "training", "as asked")  # the report has them all
SHOWN = {  # title -> column of the leaderboard; one that is empty is not shown
    "Fréchet dist.": "frechet_distance",
    "floor": "frechet_distance_floor",
    "KID": "kid",
    "coverage": "coverage",
    "as asked": "condition_accuracy",
    "bits/dim": "bits_per_dim",
    "perplexity": "perplexity",
    "anomalies": "anomaly_auroc",
    "PSNR": "psnr",
    "training": "train_seconds",
}


def _spread(key: str, row: dict[Any, Any]) -> float:
    """Of seeds where there are several, else of subsets; an empty cell is NaN in a CSV."""
    return spread({name: v for name, v in row.items() if v == v}, key) or 0.0


def _cell(key: str, row: dict[Any, Any]) -> str:
    formats: dict[str, Callable[[], str]] = {
        "frechet_distance": lambda: f"{row[key]:.2f} ± {_spread(key, row):.2f}",
        "frechet_distance_floor": lambda: f"{row[key]:.2f}",
        "kid": lambda: f"{row[key]:.3f}",
        "perplexity": lambda: f"{row[key]:.2f}",
        "bits_per_dim": lambda: f"{row[key]:.3f} {row['likelihood_kind']}",
        "psnr": lambda: f"{row[key]:.1f} dB",
        "train_seconds": lambda: f"{row[key]:.0f} s",
    }
    return formats[key]() if key in formats else f"{row[key]:.0%}"


def show_families() -> None:
    """`genarena families`."""
    table = Table(title="Model families")
    for name in ("family", "data", "likelihood", "reconstruction", "conditions", "paper"):
        table.add_column(name)
    for name, family in FAMILIES.items():
        conditions = ", ".join(sorted(family.conditions)) or "none"
        kinds = ", ".join(PLURALS[kind] for kind in sorted(family.modalities))
        facts = (kinds, family.likelihood, family.reconstruction, conditions, family.paper)
        table.add_row(name, *facts)
    console.print(table)
