"""`genarena retrain`: a registered version trained again from what the registry knows of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from genarena import restore
from genarena.project import enter_project
from genarena.show import console
from models import store
from tasks import lineage, tracking, versions
from tasks.environment import STATE, prepare_environment
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import Params, load_params
from tasks.runs import Run

# What a training or a sampling costs is measured anew each time, and is never the same twice.
COSTS = (
    "peak_memory_mb",
    "sample_images_per_second",
    "train_images_per_second",
    "train_seconds",
)


@dataclass(frozen=True)
class Origin:
    """What the registry knows of where a version came from."""

    name: str
    version: str
    which: Run
    commit: str
    tags: dict[str, str]
    metrics: dict[str, float]  # of the test split, as registered
    hardware: str
    files: tuple[Path, ...]  # params.yaml and, where DVC ran it, dvc.lock


def retrain(model: str, out: Path | None) -> int:
    """Restore, train and measure a version again; print the comparison.

    Returns 0 where every metric but the `COSTS` is equal, else 1; exits 2 where the version
    cannot be restored.
    """
    with exit_on_bad_input("genarena"), tempfile.TemporaryDirectory() as temporary:
        asked = Path.cwd() / out if out else None
        enter_project()
        prepare_environment()
        params = load_params()
        origin = _origin(params, model, Path(temporary))
        default = Path(STATE, "retrained", f"{origin.name}-{origin.version}").absolute()
        folder = restore.clone(origin.commit, asked or default)
        console.print(f"{origin.name} version {origin.version}: commit {origin.commit[:12]}")
        console.print(f"restored in {folder}", soft_wrap=True, markup=False)
        _restore(params, origin, folder)
        metrics = _run(origin.which, folder)
        return _compare(origin, metrics)


def _origin(params: Params, model: str, temporary: Path) -> Origin:
    """Ask the registry; BadInput where the version cannot be restored from what it knows."""
    import mlflow

    client = tracking.connect(params)
    uri = versions.spelled(params, model)
    with versions.reaching(params):
        found = versions.find(client, params, uri)
        if found.name is None or found.version is None or found.tags is None:
            raise BadInput(f"{uri}: retrain takes a registered version: models:/NAME/VERSION")
        told, tags = f"{found.name} version {found.version}", found.tags
        if tags.get("git_commit", "none") == "none":
            raise BadInput(f"{told} was made outside git: its code is not known")
        if tags.get("git_dirty") != "false":
            raise BadInput(
                f"{told} was made with uncommitted changes on commit {tags['git_commit'][:12]}: "
                "its code is not known; commit before a run whose models are to be retrained"
            )
        run = client.get_run(found.run_id)
        logged = client.get_logged_model(found.model_id)
    with versions.reaching(params, f"the parameters of {told} cannot be had from"):
        project = mlflow.artifacts.download_artifacts(
            run_id=found.run_id, artifact_path=lineage.PROJECT, dst_path=str(temporary)
        )
    measured = {m.key: float(m.value) for m in logged.metrics or [] if m.dataset_name}
    return Origin(
        name=found.name,
        version=found.version,
        which=Run(tags["family"], int(tags["seed"])),
        commit=tags["git_commit"],
        tags=tags,
        metrics=measured,
        hardware=run.data.tags.get("hardware", ""),
        files=_untouched(Path(project), run.data.tags, told),
    )


def _untouched(project: Path, tags: dict[str, str], told: str) -> tuple[Path, ...]:
    """The project's files that the run was given, held against the hashes it has of them."""
    files = []
    for tag, sha256 in tags.items():
        if tag.startswith(lineage.SHA256):
            file = project / tag.removeprefix(lineage.SHA256)
            if not file.is_file() or store.file_sha256(file) != sha256:
                raise BadInput(f"{told}: {file.name} in the artifact store is not the one it had")
            files.append(file)
    if not any(file.name == "params.yaml" for file in files):
        raise BadInput(f"{told}: the parameters it was trained with are not known")
    return tuple(files)


def _restore(params: Params, origin: Origin, folder: Path) -> None:
    """Parameters, lock file and data into the clone."""
    for file in origin.files:
        shutil.copy(file, folder / file.name)
    storage = params.cluster.storage
    changes: dict[str, Any] = {
        "cluster.address": params.cluster.address,  # of today's cluster
        "evaluation": json.loads(origin.tags["evaluation"]),  # may have changed since the training
    }
    if Path(storage).is_absolute():
        changes["cluster.storage"] = f"{storage}/retrained/{origin.name}-{origin.version}"
    content = lineage.read_yaml(folder / "params.yaml")
    if "minutes" in content.get("train", {}).get("budget", {}):
        steps = int(origin.metrics["train_steps"])
        changes["train.budget"] = {"steps": steps}
        console.print(f"its budget was time; it is trained for as many steps: {steps:,}")
    restore.set_params(folder, changes)
    source = content.get("dataset", {}).get("path", "data/raw")
    if "://" not in source:
        source = str(Path(source).absolute())
    environment = restore.environment(folder)
    restore.bring_data(folder, environment, source)
    if content.get("evaluation") != changes["evaluation"]:
        restore.bring_features(folder, environment)
    manifest = json.loads((folder / lineage.OUTS[0] / "manifest.json").read_text())
    if manifest["content_sha256"] != origin.tags["data_sha256"]:
        raise BadInput(
            f"the restored data is other data: {manifest['content_sha256'][:12]}, the version's "
            f"was {origin.tags['data_sha256'][:12]}"
        )


def _run(which: Run, folder: Path) -> dict[str, Any]:
    """Train and evaluate in the clone, with its own code; returns the metrics."""
    for stage in ("train", "evaluate"):
        command = [sys.executable, "-m", f"tasks.{stage}", which.family, "--seed", str(which.seed)]
        status = subprocess.run(command, cwd=folder, env=restore.environment(folder)).returncode
        if status != 0:
            raise SystemExit(f"genarena: {stage} ended with exit status {status} in {folder}")
    metrics: dict[str, Any] = json.loads((folder / which.metrics).read_text())
    weights = store.describe(folder / which.trained)["weights_sha256"]
    return {**metrics, "weights_sha256": weights}


def _compare(origin: Origin, metrics: dict[str, Any]) -> int:
    """Print registered and retrained side by side; 0 where they are equal."""
    table = Table(title=f"{origin.name} version {origin.version}, retrained")
    for title in ("metric", "registered", "retrained", ""):
        table.add_column(title, justify="left" if title in ("metric", "") else "right")
    differing = 0
    for name in sorted(origin.metrics):
        if name in COSTS:
            continue
        before, after = origin.metrics[name], metrics.get(name)
        equal = after is not None and float(after) == before
        differing += not equal
        shown = "-" if after is None else f"{float(after):.10g}"
        table.add_row(name, f"{before:.10g}", shown, "equal" if equal else "[red]differs")
    console.print(table)
    same = metrics["weights_sha256"] == origin.tags["weights_sha256"]
    console.print(f"weights: {'the same, bit for bit' if same else 'others'}")
    if not origin.metrics:
        console.print("no metrics are registered with it: nothing to compare")
        return 1
    if not differing:
        console.print(f"all {len(set(origin.metrics) - set(COSTS))} metrics are equal")
        return 0
    console.print(f"{differing} metrics differ")
    if origin.hardware and origin.hardware != metrics.get("hardware"):
        here = metrics.get("hardware")
        console.print(
            f"registered on {origin.hardware}, retrained on {here}: bit-exact means the same "
            "hardware",
            markup=False,
        )
    return 1
