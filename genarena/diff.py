"""`genarena diff`: what changed between two comparisons."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rich.table import Table
from ruamel.yaml import YAML

from genarena.project import enter_project
from genarena.show import console
from tasks import tracking
from tasks.environment import prepare_environment
from tasks.errors import BadInput, exit_on_bad_input, nearest
from tasks.params import load_params
from tasks.reporting.difference import LEVEL, Comparison, changed_params, changes
from tasks.runs import Run

HERE = "."
COLOURS = {"better": "green", "worse": "red", "noise": "dim", "equal": "dim"}


def show_difference(a: str, b: str) -> None:
    """`genarena diff A B`: git revisions, `.` for the folder as it is, or MLflow's runs of
    comparisons (id or name)."""
    with exit_on_bad_input("genarena"):
        enter_project()
        prepare_environment()
        before, after = _load(a), _load(b)
        _show_params(before, after)
        found, remarks = changes(before, after)
        table = Table(title=f"{a} -> {b}")
        for name in ("family", "metric", "before", "after", "", "chance"):
            table.add_column(name, justify="left" if name in ("family", "metric", "") else "right")
        for change in found:
            told = "-" if change.p is None else f"{change.p:.2g}"
            colour = COLOURS[change.word]
            cells = (
                f"{change.before:.5g}",
                f"{change.after:.5g}",
                f"[{colour}]{change.word}",
                told,
            )
            table.add_row(change.family, change.metric, *cells)
        if found:
            console.print(table)
            console.print(
                f"chance: how probable a difference as large is without any change; noise: {LEVEL} "
                "or more"
            )
        if any(change.one_seed and change.p is not None for change in found):
            console.print(
                "With one seed only the noise of measuring is known, not that of training: "
                "seeds: [0, 1, 2] measures it."
            )
        for remark in remarks:
            console.print(remark, markup=False)
        if not found and not remarks:
            console.print("neither has any metrics")


def _show_params(before: Comparison, after: Comparison) -> None:
    changed = changed_params(before, after)
    for key, old, new in changed:
        console.print(f"{key}: {old} -> {new}", soft_wrap=True, markup=False)
    if not changed:
        console.print("the parameters are the same")


def _load(name: str) -> Comparison:
    if name == HERE:
        files = {p.name: p.read_text() for p in Path("metrics").glob("*.json")}
        return _of_files(name, Path("params.yaml").read_text(), files)
    if _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") is not None:
        params = _git("show", f"{name}:./params.yaml")
        if params is None:
            raise BadInput(f"{name}: this revision has no params.yaml")
        listed = _git("ls-tree", "--name-only", f"{name}:./metrics") or ""
        paths = [path for path in listed.splitlines() if path.endswith(".json")]
        files = {path: _git("show", f"{name}:./metrics/{path}") or "{}" for path in paths}
        return _of_files(name, params, files)
    return _of_tracking(name)


def _of_files(name: str, params: str, files: dict[str, str]) -> Comparison:
    """From the text of `params.yaml` and of the files in `metrics/`."""
    content = YAML(typ="safe", pure=True).load(params)
    runs = {}
    for file, text in sorted(files.items()):
        family, dash, seed = file.removesuffix(".json").rpartition("-")
        if dash and seed.isdigit():  # else a failure's record, or of an earlier version
            runs[Run(family, int(seed))] = json.loads(text)
    wanted = {Run(f, s) for f in content["families"] for s in content.get("seeds", [0])}
    told = {key: v for key, v in _flat(content).items() if _concerns(key, content["families"])}
    return Comparison(name, told, {run: m for run, m in runs.items() if run in wanted})


def _concerns(key: str, families: list[str]) -> bool:
    """Of the sections of `models`, those of the families that were compared."""
    return not key.startswith("models.") or key.split(".")[1] in families


def _of_tracking(name: str) -> Comparison:
    """From MLflow: a comparison's run, by id or name (the newest of that name)."""
    client = tracking.connect(load_params())
    experiments = [e.experiment_id for e in client.search_experiments()]
    parents = [
        r for r in client.search_runs(experiments) if "mlflow.parentRunId" not in r.data.tags
    ]
    parents = [r for r in parents if "family" not in r.data.tags]
    found = next((r for r in parents if name in (r.info.run_id, r.info.run_name)), None)
    if found is None:
        names = [*dict.fromkeys(r.info.run_name for r in parents), HERE]
        raise BadInput(f"{name}: neither a git revision nor a comparison{nearest(name, names)}")
    children = client.search_runs(
        [found.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.info.run_id}'"
    )
    comparison = Comparison(name)
    for child in children:
        tags = child.data.tags
        run = Run(tags["family"], int(tags.get("seed", 0)))
        keys = ("data_sha256", "features_sha256", "protocol")
        facts: dict[str, Any] = {key: tags[key] for key in keys if key in tags}
        comparison.runs[run] = {**child.data.metrics, **facts}
        for key, value in child.data.params.items():
            mine = f"models.{run.family}.{key.removeprefix('model.')}"
            where = mine if key.startswith("model.") else key
            if where not in ("family", "train.seed"):
                comparison.params[where] = value
    return comparison


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{prefix}{key}"
        found |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
