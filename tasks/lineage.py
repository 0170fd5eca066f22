"""What a training came from: the commit, the data, the parameters. Kept beside its checkpoints
from the start, so that a run that reaches MLflow late, or from another machine, says the same.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import store
from tasks.params import PARAMS_FILE, Params
from tasks.provenance import git_state
from tasks.runs import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROJECT, FACTS = "project", "lineage.json"  # folder beside the checkpoints; its summary
LOCK = Path("dvc.lock")
OUTS = ("data/prepared", "artifacts/classifier", "artifacts/features")  # what a training reads
NOTE = "mlflow.note.content"  # tag: a description, in Markdown
DESCRIBED = "genarena.described"  # tag: all that `describe` sends is there
SHA256 = (
    "genarena.sha256."  # tag, then a file's name: its hash, where the artifact store has no say
)
DIGEST = 36  # characters of a dataset's digest that MLflow keeps


def record(folder: Path, params: Params, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write parameters, DVC's lock and the summary to `folder/project`; returns the summary."""
    project = folder / PROJECT
    project.mkdir(parents=True, exist_ok=True)
    for file in (PARAMS_FILE, LOCK):
        if file.exists():
            shutil.copy(file, project / file.name)
    commit, _, changes = (git_state() or "").partition(" ")
    facts = {
        "git_commit": commit,
        "git_dirty": bool(changes),
        "dvc": hashes(LOCK),
        "source": params.dataset.path,
        "counts": manifest.get("counts", {}),
        "shape": manifest.get("spec", {}).get("shape", []),
    }
    (project / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def read(folder: Path) -> dict[str, Any]:
    """The summary in `folder/project`; empty where an earlier genarena has trained."""
    file = folder / PROJECT / FACTS
    facts: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return facts


def told(facts: dict[str, Any]) -> str | None:
    """The commit in words, as `provenance.git_state`."""
    changed = " with changes" if facts["git_dirty"] else ""
    return f"{facts['git_commit']}{changed}" if facts["git_commit"] else None


def hashes(lock: Path) -> dict[str, str]:
    """DVC's hash of each of `OUTS` that the lock file knows."""
    if not lock.exists():
        return {}
    content = read_yaml(lock)
    outs = [o for stage in content.get("stages", {}).values() for o in stage.get("outs", [])]
    return {o["path"]: o["md5"] for o in outs if o["path"] in OUTS and "md5" in o}


def run_tags(facts: dict[str, Any]) -> dict[str, str]:
    """As tags of an MLflow run."""
    tags = {f"dvc.{path}": md5 for path, md5 in facts.get("dvc", {}).items()}
    if facts.get("git_commit"):
        tags |= {"git.commit": facts["git_commit"], "git.dirty": _bool(facts["git_dirty"])}
        tags["mlflow.source.git.commit"] = facts["git_commit"]
    return tags


def version_tags(facts: dict[str, Any]) -> dict[str, str]:
    """As tags of a registered version."""
    return {
        "git_commit": facts.get("git_commit") or "none",
        "git_dirty": _bool(facts.get("git_dirty", True)),
        "data_md5": facts.get("dvc", {}).get("data/prepared", "none"),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file as it is: of another commit, so not for this one's code to check."""
    from ruamel.yaml import YAML

    content: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text()) or {}
    return content


def comparison_tags(params: Params) -> dict[str, str]:
    """Of the run of a comparison: its description, its data and its commit."""
    seeds = ", ".join(map(str, params.seeds))
    words = (
        f"Compares **{', '.join(params.families)}** on **{params.dataset.title}**: each trained "
        f"for {params.train.budget} (seeds: {seeds}), then measured on the test split by one "
        "protocol.\n\n"
        "- The runs below this one are the trainings.\n"
        "- `leaderboard/` among the artifacts has the ranking, as a page and as a table.\n"
        "- Metrics here are `<family>/<metric>`, the mean over the seeds."
    )
    commit, _, changes = (git_state() or "").partition(" ")
    git = run_tags({"git_commit": commit, "git_dirty": bool(changes)})
    return {NOTE: words, "dataset": params.dataset.title, **git}


def describe(
    client: MlflowClient,
    run_id: str,
    params: Params,
    which: Run,
    data_sha256: str,
    folder: Path,
) -> None:
    """Give the run its dataset, its project files and its description; safe to repeat."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    facts = read(folder)
    counts = facts.get("counts", {})
    dataset = Dataset(
        name=params.dataset.title,
        digest=data_sha256[:DIGEST],
        source_type="local",
        source=json.dumps({"uri": facts.get("source", params.dataset.path)}),
        profile=json.dumps({"num_rows": sum(counts.values()), **counts}),
    )
    context = InputTag("mlflow.data.context", "training")
    client.log_inputs(run_id, [DatasetInput(dataset, [context])])
    for file in (PARAMS_FILE, LOCK):
        kept = folder / PROJECT / file.name
        if kept.exists():
            client.log_artifact(run_id, str(kept), PROJECT)
            client.set_tag(run_id, SHA256 + file.name, store.file_sha256(kept))
    client.set_tag(run_id, NOTE, _words(params, which, facts, data_sha256))
    client.set_tag(run_id, DESCRIBED, "true")


def _words(params: Params, which: Run, facts: dict[str, Any], data_sha256: str) -> str:
    """A run's description, in Markdown."""
    counts = ", ".join(f"{n:,} {split}" for split, n in facts.get("counts", {}).items())
    lines = [
        f"**{which.family}** trained on **{params.dataset.title}** with seed {which.seed}, "
        f"for {params.train.budget}.",
        "",
        f"- Data: {counts or 'not counted'}; content {data_sha256[:12]}.",
    ]
    if facts.get("git_commit"):
        changed = ", with uncommitted changes" if facts["git_dirty"] else ""
        lines.append(f"- Code: commit {facts['git_commit'][:12]}{changed}.")
    lines += [
        "- `train/` and `<phase>/` curves are of the training, `validation/` of the validation "
        "split; every other metric is of the test split, by the protocol that all families share.",
        "- `project/` among the artifacts has params.yaml and dvc.lock as they were.",
    ]
    return "\n".join(lines)


def send_measured(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, Any],
    model_id: str | None = None,
    dataset: str | None = None,
) -> None:
    """Log what the evaluation measured: numbers as metrics, words as tags.

    With `model_id`, to MLflow's logged model too, as measured on `dataset`: that fills the models
    tab. The run's own copy is not doubled: a metric of the same time, step and value is one.
    """
    from mlflow.entities import Metric, RunTag

    numbers = {n: float(v) for n, v in metrics.items() if isinstance(v, (int, float))}
    if model_id is None:
        now, on = int(1000 * time.time()), {}
        words = [RunTag(name, value) for name, value in metrics.items() if isinstance(value, str)]
        client.log_batch(run_id, tags=words)
    else:
        numbers = {n: v for n, v in numbers.items() if n not in ("rank", "seed", "protocol")}
        now = _measured_at(client, run_id, numbers)
        digest = metrics["provenance"]["data_sha256"][:DIGEST]
        on = {"model_id": model_id, "dataset_name": dataset, "dataset_digest": digest}
    batch = [Metric(name, value, now, 0, **on) for name, value in numbers.items()]
    client.log_batch(run_id, metrics=batch)


def _measured_at(client: MlflowClient, run_id: str, numbers: dict[str, float]) -> int:
    """When the run's metrics were logged, in ms; now, where they are missing or others."""
    name = next(iter(numbers))
    for metric in reversed(client.get_metric_history(run_id, name)):
        if metric.value == numbers[name]:
            return int(metric.timestamp)
    return int(1000 * time.time())
