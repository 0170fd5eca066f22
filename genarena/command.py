"""What the console command does, behind its imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models import FAMILIES
from tasks.environment import prepare_environment
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import Params, load_params, override_params, preview_params

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
BUSY_TRIES, BUSY_WAIT_S = 60, 2.0


def run_comparison(
    dataset: str,
    data_path: str,
    families: str,
    steps: int | None,
    minutes: float | None,
    captions: str,
    settings: list[str],
) -> None:
    """`genarena run`: set what is asked in params.yaml, run the flow, show the leaderboard."""
    with exit_on_bad_input("genarena"):
        enter_project()
        prepare_environment()
        changes = _changes(dataset, data_path, families, captions, settings)
        if changes.get("families") == ["all"]:
            changes["families"] = _suited(changes)
        budget = {"steps": steps, "minutes": minutes}
        if steps is not None or minutes is not None:
            changes["train.budget"] = {name: n for name, n in budget.items() if n is not None}
        for key, (old, new) in override_params(changes).items():
            console.print(f"params.yaml: {key}: {old} -> {new}", soft_wrap=True, markup=False)
        params = load_params()
        local = "://" not in params.dataset.path
        if local and not Path(params.dataset.path).exists():
            raise BadInput(f"params.yaml: dataset.path: {params.dataset.path} does not exist")
        console.print(f"{params.dataset.title}: {', '.join(params.families)}")
        failure = None
        if _up_to_date():
            console.print("Everything is up to date: no stage has to run.")
        else:
            failure = _run_flow()
        show_leaderboard(params)
        if failure or not _all_ok(params):
            raise SystemExit(f"genarena: {failure}" if failure else 1)


def _changes(
    dataset: str, data_path: str, families: str, captions: str, settings: list[str]
) -> dict[str, Any]:
    """The options as dotted keys of params.yaml; another data set starts from plain images."""
    changes: dict[str, Any] = {}
    if dataset:
        changes["dataset.name"] = dataset
        changes["dataset.path"] = "data/raw"
        changes |= {"dataset.derive": "none", "dataset.paired": True, "dataset.captions": []}
        known = Path(os.environ.get("GENARENA_DATA", "/nonexistent"), dataset)
        if known.is_dir():
            changes["dataset.path"] = str(known.absolute())
    if data_path:
        local = "://" not in data_path
        changes["dataset.path"] = (
            str(Path(data_path).expanduser().absolute()) if local else data_path
        )
        if local and not Path(changes["dataset.path"]).exists():
            raise BadInput(f"dataset.path: {data_path} does not exist")
    if families:
        names = families.replace(",", " ").split()
        changes["families"] = names
    if captions:
        changes["dataset.captions"] = [part.strip() for part in captions.split(";")]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting}: expected key=value, as in train.seed=1")
        try:
            changes[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise BadInput(f"--set {setting}: {value!r} is not a YAML value") from error
    return changes


def _suited(changes: dict[str, Any]) -> list[str]:
    """The families that can learn from the data; says why the others are left out."""
    params = preview_params({key: v for key, v in changes.items() if key != "families"})
    data = params.dataset.outline()
    reasons = {name: family.unsuited(data) for name, family in FAMILIES.items()}
    for name, reason in reasons.items():
        if reason:
            console.print(f"left out: {name}: {reason}", soft_wrap=True, markup=False)
    return [name for name, reason in reasons.items() if reason is None]


def enter_project() -> None:
    """Work in the project's folder: this one or one above it that holds dvc.yaml."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "dvc.yaml").exists() and (folder / "params.yaml").exists():
            os.chdir(folder)
            return
    raise BadInput("no dvc.yaml and params.yaml here or above; run this in the project's folder")


def _up_to_date() -> bool:
    """Whether DVC has nothing to run; it alone decides."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"]
    for attempt in range(BUSY_TRIES):
        status = subprocess.run(command, capture_output=True, text=True)
        if status.returncode == 0:
            break
        if "is busy" not in status.stderr or attempt == BUSY_TRIES - 1:
            raise BadInput(f"dvc status: {status.stderr.strip().splitlines()[-1]}")
        if attempt == 0:
            console.print("another run is at work in this project, or just ending; waiting")
        time.sleep(BUSY_WAIT_S)
    return not json.loads(status.stdout) and Path("dvc.lock").exists()


def _run_flow() -> str | None:
    """Run the flow here; SIGTERM ends it as Ctrl-C does, checkpoints written.

    Returns when the leaderboard was made, with what failed besides. Exits 2 where a stage
    refused its input, 1 where it failed before, each with the stage's own line.
    """
    from flows.compare import compare
    from flows.stage import REFUSED

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = _leaderboard_time()
    try:
        state = compare(return_state=True)
    except KeyboardInterrupt:
        console.print("stopped; the same command resumes")
        raise SystemExit(130) from None
    if state.is_failed() and _leaderboard_time() == made:
        print(f"genarena: {state.message}", file=sys.stderr)
        raise SystemExit(2 if state.name == REFUSED else 1)
    return state.message if state.is_failed() else None


def _leaderboard_time() -> float:
    file = Path("reports/leaderboard.csv")
    return file.stat().st_mtime if file.exists() else 0.0


def _all_ok(params: Params) -> bool:
    import pandas as pd

    table = pd.read_csv("reports/leaderboard.csv")
    return set(table.loc[table["status"] == "ok", "family"]) == set(params.families)


def show_leaderboard(params: Params) -> None:
    """Print the leaderboard, where the report is, and how to open the UIs."""
    import pandas as pd

    if not Path("reports/leaderboard.csv").exists():
        raise SystemExit("genarena: no leaderboard: the run ended before its report")
    rows = pd.read_csv("reports/leaderboard.csv").to_dict("records")
    ok = [row for row in rows if row["status"] == "ok"]
    shown = [name for name, key in SHOWN.items() if any(pd.notna(row[key]) for row in ok)]
    table = Table(title=f"Leaderboard: {params.dataset.title}, test split")
    for name in ("#", "family", *shown):
        table.add_column(name, justify="left" if name in ("#", "family") else "right")
    for row in rows:
        if row["status"] != "ok":
            table.add_row("-", row["family"], "[red]failed")
            continue
        cells = [_cell(SHOWN[name], row) if pd.notna(row[SHOWN[name]]) else "-" for name in shown]
        table.add_row(f"{row['rank']:.0f}", row["family"], *cells)
    console.print(table)
    for row in (row for row in rows if row["status"] != "ok"):
        console.print(f"{row['family']} failed: {row['reason']}", style="red", markup=False)
    report = Path("reports/leaderboard.html").absolute().as_uri()
    console.print(f"Report: {report}", soft_wrap=True)
    console.print("UIs:    make ui   (MLflow: runs and models; Prefect: flow runs)")


SHOWN = {  # title -> column of the leaderboard; one that is empty is not shown
    "Fréchet dist.": "frechet_distance",
    "floor": "frechet_distance_floor",
    "KID": "kid",
    "coverage": "coverage",
    "as asked": "condition_accuracy",
    "bits/dim": "bits_per_dim",
    "PSNR": "psnr",
    "training": "train_seconds",
}


def _cell(key: str, row: dict[Any, Any]) -> str:
    formats: dict[str, Callable[[], str]] = {
        "frechet_distance": lambda: f"{row[key]:.2f} ± {row['frechet_distance_std']:.2f}",
        "frechet_distance_floor": lambda: f"{row[key]:.2f}",
        "kid": lambda: f"{row[key]:.3f}",
        "bits_per_dim": lambda: f"{row[key]:.3f} {row['likelihood_kind']}",
        "psnr": lambda: f"{row[key]:.1f} dB",
        "train_seconds": lambda: f"{row[key]:.0f} s",
    }
    return formats[key]() if key in formats else f"{row[key]:.0%}"


def show_families() -> None:
    """`genarena families`."""
    table = Table(title="Model families")
    for name in ("family", "likelihood", "reconstruction", "conditions", "paper"):
        table.add_column(name)
    for name, family in FAMILIES.items():
        conditions = ", ".join(sorted(family.conditions)) or "none"
        table.add_row(name, family.likelihood, family.reconstruction, conditions, family.paper)
    console.print(table)


def draw_samples(
    model: str,
    n: int,
    out: Path,
    seed: int,
    temperature: float,
    label: str,
    text: str,
    source: list[Path],
) -> None:
    """`genarena sample`: a registered model by URI or name, or a trained family from disk.

    `n` samples of the condition, or of each source where several are given.
    """
    from PIL import Image

    with exit_on_bad_input("genarena"):
        asked: dict[str, Any] = {name: v for name, v in (("label", label), ("text", text)) if v}
        requests = [{"n": n, **asked}]
        if source:
            for file in source:
                if not file.is_file():
                    raise BadInput(f"--source: no file at {file}")
            requests = [{"n": n, **asked, "source": file.read_bytes()} for file in source]
        home = Path.cwd()
        enter_project()
        prepare_environment()
        folder = (home / out).absolute()
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out: {out} is a file; give a folder")
        images = _draw(model, load_params(), requests, seed, temperature)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(pixels).save(folder / f"{number:05d}.png")
        console.print(f"{len(images)} images in {folder}")


def _draw(
    model: str, params: Params, requests: list[dict[str, Any]], seed: int, temperature: float
) -> Any:
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from tasks import tracking
    from tasks.errors import nearest

    client = tracking.connect(params)
    uri = model
    if not model.startswith(("models:/", "runs:/")):
        name = f"{params.dataset.title}-{model}" if model in FAMILIES else model
        uri = f"models:/{name}@champion"
    try:
        loaded = mlflow.pyfunc.load_model(uri)
    except MlflowException as error:
        try:
            known = [found.name for found in client.search_registered_models()]
        except MlflowException as outage:
            uri = tracking.tracking_uri(params)
            raise BadInput(f"the registry at {uri} does not answer") from outage
        hint = nearest(model, [*known, *FAMILIES]) if known else ": nothing is registered yet"
        if model in FAMILIES:
            hint = f"; train it on {params.dataset.title} first: make run FAMILIES={model}"
        raise BadInput(f"{uri}: no such model{hint}") from error
    takes = loaded.metadata.get_input_schema().input_names()
    for name in requests[0]:  # MLflow drops, without a word, what the model does not take
        if name not in takes:
            raise BadInput(f"--{name}: {uri} takes no {name}; it takes {', '.join(takes)}")
    options = {"seed": seed, "temperature": temperature}
    try:
        return loaded.predict(pd.DataFrame(requests), params=options)
    except (MlflowException, ValueError) as error:  # a request that the model cannot answer
        raise BadInput(f"{uri}: {' '.join(str(error).split())}") from error
