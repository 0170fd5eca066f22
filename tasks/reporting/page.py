"""The self-contained page `leaderboard.html`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from models.data import DataSpec
from tasks.reporting import figures, leaderboard, table
from tasks.reporting.leaderboard import load_histories
from tasks.reporting.verdict import verdict
from tasks.runs import Run

PICTURES = (
    "samples",
    "interpolations",
    "latent_plane",
    "density",
    "data",
    "reconstructions",
    "neighbours",
    "conditions",
    "translations",
)
MEANING = {
    "exact": "exact: the model's own probability (where it is a density, that of data with uniform "
    "dequantisation noise)",
    "bound": "bound: a lower bound on the likelihood, so the true value may be better",
    "ode": "ode: the density that a numerical solver integrates, with its error",
    "ais": "ais: estimated by annealed importance sampling",
}
FLOOR_KIND = "reconstruction_floor_kind"
TEMPLATE = Path(__file__).with_name("leaderboard.html.j2")


def render(
    rows: list[dict[str, Any]],
    title: str,
    manifest: dict[str, Any],
    judge: dict[str, Any],
    root: Path,
    *,
    budget: str,
) -> str:
    """The page for leaderboard `rows` of the project at `root`; all pictures are inside it.

    `budget` says in words what each family was given to train with.
    """
    ok = [_with_pictures(row, root) for row in rows if row["status"] == "ok"]
    histories = {row["family"]: load_histories(row, root) for row in ok}
    curves = [
        figures.validation_curves(histories, "frechet_distance", "Fréchet distance"),
        figures.validation_curves(histories, "bits_per_dim", "bits/dim"),
    ]
    score = leaderboard.ranking(ok)
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters |= {"thousands": table.thousands}
    return environment.from_string(TEMPLATE.read_text()).render(
        dataset=title,
        counts=manifest["counts"],
        examples=describe(DataSpec(**manifest["spec"])),
        classes=judge["task"] == "classes",
        data_sha256=manifest["content_sha256"],
        class_names=manifest["spec"]["classes"],
        failed=[row for row in rows if row["status"] != "ok"],
        ok=ok,
        table=table.table(ok),
        floor_kind=next(iter({r[FLOOR_KIND] for r in ok if FLOOR_KIND in r}), ""),
        obeys=any("condition_accuracy" in row for row in ok),
        cost_figure=figures.quality_against_cost(ok) if ok else "",
        score=score,
        numbered=figures.numbered(ok),
        score_name=leaderboard.SCORES.get(score, ""),
        kinds=_kinds(ok),
        verdict=verdict(rows, title, budget),
        budget=budget,
        seeds=sorted({seed for row in rows for seed in row["seeds"]}),
        commit=", ".join(_commits(ok)),
        curves=[curve for curve in curves if curve],
        judge_task=judge["task"],
        judge_accuracy=judge["test_accuracy"],
    )


def describe(data: DataSpec) -> str:
    """`images of 1x8x8, 17 levels`, `windows of 128 bytes`, `points of the plane`."""
    if data.modality == "text":
        return f"windows of {data.shape[0]} bytes"
    if data.modality == "points":
        return f"points of the plane, in {data.levels} x {data.levels} cells"
    return f"images of {'x'.join(map(str, data.shape))}, {data.levels} levels"


def _commits(ok: list[dict[str, Any]]) -> list[str]:
    """The states of the code that trained the models, each once."""
    return list(dict.fromkeys(run["git"] for row in ok for run in row["runs"] if run.get("git")))


def _kinds(ok: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How each kind of likelihood on the page came about, and the families that have it."""
    found: dict[str, list[str]] = {}
    for row in ok:
        if "likelihood_kind" in row:
            note = f" ({row['likelihood_note']})" if row.get("likelihood_note") else ""
            draws, kind = row["likelihood_draws"], row["likelihood_kind"]
            # an exact value needs draws only where it is a density: that is said for all at once
            of = f", {draws:,} draws" if draws > 1 and kind != "exact" else ""
            found.setdefault(kind, []).append(f"{row['family']}{note}{of}")
    return [(MEANING[kind], "; ".join(names)) for kind, names in sorted(found.items())]


def _with_pictures(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """The row with its pictures, which are of its first seed."""
    folder = root / Run(row["family"], row["seeds"][0]).evaluated
    kind = row.get("reconstruction_kind", "")
    return {
        **row,
        **{f"{name}_png": _data_uri(folder / f"{name}.png") for name in PICTURES},
        "reconstruction_name": "there and back" if "cycle_psnr" in row else kind,
        "warnings": table.warnings(row),
        "text": _read(folder / "samples.txt"),
        "loss_figure": figures.loss_curves(load_histories(row, root)[0], row["family"]),
    }


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _data_uri(path: Path) -> str:
    """The PNG as a data URI; empty where there is none."""
    if not path.exists():
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
