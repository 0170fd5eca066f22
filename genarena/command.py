"""What the console command does, behind its imports."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from genarena.api import Server, start_server
from genarena.show import console, show_leaderboard
from models import FAMILIES
from tasks import dvc
from tasks.cluster import LOCAL, given_address
from tasks.data.config import plain
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import Params, load_params, override_params, preview_params
from tasks.standby import standing_by
from tasks.workspace import alone

STARTERS = {
    "image": ("vae", "dcgan", "realnvp"),
    "text": ("transformer", "hmm"),
    "points": ("realnvp", "flow_matching", "gmm"),
}


def run_comparison(
    dataset: str,
    data_path: str,
    families: str,
    seeds: str,
    budget: dict[str, float | None],
    captions: str,
    settings: list[str],
    early: Server | None,
) -> None:
    """`genarena run`: set what is asked in params.yaml, run the flow, show the leaderboard.

    In the project's folder, its environment prepared; with Prefect's server where one was started.
    """
    with exit_on_bad_input("genarena"), standing_by() as get_ready, alone(console.print):
        _set_params(dataset, data_path, families, seeds, budget, captions, settings)
        _compare(load_params(), get_ready, early)


def _compare(params: Params, get_ready: Callable[[bool], None], early: Server | None) -> None:
    """Run the flow where something has to run, and show the leaderboard."""
    local = "://" not in params.dataset.path
    if local and not Path(params.dataset.path).exists():
        raise BadInput(f"params.yaml: dataset.path: {params.dataset.path} does not exist")
    each = "" if len(params.seeds) == 1 else f"; seeds {', '.join(map(str, params.seeds))}"
    console.print(f"{params.dataset.title}: {', '.join(params.families)}{each}")
    failure = None
    if not dvc.changed(console.print):
        console.print("Everything is up to date: no stage has to run.")
        if early:
            early.drop()
    else:
        get_ready(given_address(params.cluster) == LOCAL)
        failure = _run_flow(early)
    show_leaderboard(params)
    if failure or not _all_ok(params):
        raise SystemExit(f"genarena: {failure}" if failure else 1)


def _set_params(
    dataset: str,
    data_path: str,
    families: str,
    seeds: str,
    budget: dict[str, float | None],
    captions: str,
    settings: list[str],
) -> None:
    """Write what is asked into params.yaml, and say what that changes."""
    changes = _changes(dataset, data_path, families, captions, settings)
    if seeds:
        changes["seeds"] = _whole_numbers(seeds)
    if changes.get("families") == ["all"]:
        changes["families"] = _suited(changes)
    elif dataset and not families:
        changes |= _starters(changes)
    given = {name: amount for name, amount in budget.items() if amount is not None}
    if given:
        changes["train.budget"] = given
    for key, (old, new) in override_params(changes).items():
        console.print(f"params.yaml: {key}: {old} -> {new}", soft_wrap=True, markup=False)


def _whole_numbers(seeds: str) -> list[int]:
    try:
        return [int(word) for word in seeds.replace(",", " ").split()]
    except ValueError:
        raise BadInput(f"--seeds: {seeds!r} are not whole numbers, as in '0 1 2'") from None


def _changes(
    dataset: str, data_path: str, families: str, captions: str, settings: list[str]
) -> dict[str, Any]:
    """The options as dotted keys of params.yaml; another data set starts from plain images."""
    changes: dict[str, Any] = {}
    if dataset:
        changes |= plain(dataset)
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
            raise BadInput(f"--set {setting}: expected key=value, as in train.batch_size=32")
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


def _starters(changes: dict[str, Any]) -> dict[str, Any]:
    """Families to begin with, where those in params.yaml do not suit another kind of data."""
    params = preview_params(changes)
    data = params.dataset.outline()
    if all(FAMILIES[name].unsuited(data) is None for name in params.families):
        return {}
    return {"families": list(STARTERS[data.modality])}


def _run_flow(early: Server | None) -> str | None:
    """Run the flow here; SIGTERM ends it as Ctrl-C does, checkpoints written.

    Returns when the leaderboard was made, with what failed besides. Exits 2 where a stage
    refused its input, 1 where it failed before, each with the stage's own line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = early or start_server()  # while the flow is imported
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.compare import compare
    from flows.stage import REFUSED

    made = _leaderboard_time()
    try:
        server.wait()
        state = compare(return_state=True)
    except KeyboardInterrupt:
        console.print("stopped; the same command resumes")
        raise SystemExit(130) from None
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise BadInput(
            f"Prefect at {os.environ.get('PREFECT_API_URL')} refuses; set PREFECT_API_AUTH_STRING "
            "to the server's user:password"
        ) from error
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
    complete = (table["status"] == "ok") & table["reason"].isna()
    return set(table.loc[complete, "family"]) == set(params.families)
