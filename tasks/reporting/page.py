"""The self-contained page `leaderboard.html`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tasks.reporting import figures, table
from tasks.reporting.leaderboard import load_history

PICTURES = ("samples", "reconstructions", "conditions", "translations")
FLOOR_KIND = "reconstruction_floor_kind"
TEMPLATE = Path(__file__).with_name("leaderboard.html.j2")


def render(
    rows: list[dict[str, Any]],
    title: str,
    manifest: dict[str, Any],
    judge: dict[str, Any],
    trained: Path,
    evaluated: Path,
) -> str:
    """The page for leaderboard `rows`; pictures and figures are inside it."""
    ok = [_with_pictures(row, trained, evaluated) for row in rows if row["status"] == "ok"]
    histories = {row["family"]: load_history(trained, row["family"]) for row in ok}
    curves = [
        figures.validation_curves(histories, "frechet_distance", "Fréchet distance"),
        figures.validation_curves(histories, "bits_per_dim", "bits/dim"),
    ]
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters |= {"thousands": table.thousands}
    return environment.from_string(TEMPLATE.read_text()).render(
        dataset=title,
        counts=manifest["counts"],
        shape="x".join(map(str, manifest["spec"]["shape"])),
        levels=manifest["spec"]["levels"],
        classes=judge["task"] == "classes",
        data_sha256=manifest["content_sha256"],
        class_names=manifest["spec"]["classes"],
        failed=[row for row in rows if row["status"] != "ok"],
        ok=ok,
        table=table.table(ok),
        floor_kind=next(iter({r[FLOOR_KIND] for r in ok if FLOOR_KIND in r}), ""),
        obeys=any("condition_accuracy" in row for row in ok),
        cost_figure=figures.quality_against_cost(ok) if ok else "",
        curves=[curve for curve in curves if curve],
        likelihood_draws=max((row.get("likelihood_draws", 0) for row in ok), default=0),
        judge_task=judge["task"],
        judge_accuracy=judge["test_accuracy"],
    )


def _with_pictures(row: dict[str, Any], trained: Path, evaluated: Path) -> dict[str, Any]:
    folder = evaluated / row["family"]
    kind = row.get("reconstruction_kind", "")
    return {
        **row,
        **{f"{name}_png": _data_uri(folder / f"{name}.png") for name in PICTURES},
        "reconstruction_name": "there and back" if "cycle_psnr" in row else kind,
        "warnings": table.warnings(row),
        "loss_figure": figures.loss_curves(load_history(trained, row["family"]), row["family"]),
    }


def _data_uri(path: Path) -> str:
    """The PNG as a data URI; empty where there is none."""
    if not path.exists():
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
