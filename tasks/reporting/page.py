"""The self-contained page `leaderboard.html`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tasks.reporting import figures
from tasks.reporting.leaderboard import load_history

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
    environment.filters |= {"thousands": _thousands, "duration": duration}
    return environment.from_string(TEMPLATE.read_text()).render(
        dataset=title,
        counts=manifest["counts"],
        shape="x".join(map(str, manifest["spec"]["shape"])),
        levels=manifest["spec"]["levels"],
        classes=judge["task"] == "classes",
        data_sha256=manifest["content_sha256"],
        rows=rows,
        ok=ok,
        cost_figure=figures.quality_against_cost(ok) if ok else "",
        curves=[curve for curve in curves if curve],
        likelihood_draws=max((row.get("likelihood_draws", 0) for row in ok), default=0),
        judge_task=judge["task"],
        judge_accuracy=judge["test_accuracy"],
    )


def _with_pictures(row: dict[str, Any], trained: Path, evaluated: Path) -> dict[str, Any]:
    folder = evaluated / row["family"]
    return {
        **row,
        "samples_png": _data_uri(folder / "samples.png"),
        "reconstructions_png": _data_uri(folder / "reconstructions.png"),
        "loss_figure": figures.loss_curves(load_history(trained, row["family"]), row["family"]),
    }


def _data_uri(path: Path) -> str:
    """The PNG as a data URI; empty where there is none."""
    if not path.exists():
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _thousands(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:,.2g}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min 30 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
