"""Everything that touches MLflow. An outage is reported, never raised: what could not be
delivered stays in the history files and is delivered by the next stage that gets through.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import store
from tasks import lineage
from tasks.delivery import send_history
from tasks.lineage import NOTE
from tasks.params import Params
from tasks.runs import Run
from tasks.training.history import HISTORY, Record, read_history
from tasks.training.validation import PICTURES

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "GENARENA_PARENT_RUN"  # set by the flow: the comparison that children belong to
KEY, WEIGHTS = "genarena.key", "genarena.weights"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # runs and models first, in the UI
RETRY_S = 5.0


def tracking_uri(params: Params) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri


def connect(params: Params) -> MlflowClient:
    """An MLflow client for the configured server or database."""
    import logging

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(tracking_uri(params))
    return mlflow.MlflowClient()


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of a dataset, made when it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            note = f"Comparisons of generative models on the data set {name}."
            return client.create_experiment(name, tags={NOTE: note, **KIND})
        except MlflowException:  # another family's stage made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def end_parent(params: Params, run_id: str, *, failed: bool) -> None:
    """End the run of a comparison."""
    connect(params).set_terminated(run_id, "FAILED" if failed else "FINISHED")


def start_parent(params: Params) -> str:
    """The run of a comparison, parent of its families' runs; returns its id."""
    client = connect(params)
    experiment = experiment_id(client, params.dataset.title)
    name = f"compare-{params.dataset.title}"
    tags = lineage.comparison_tags(params)
    return client.create_run(experiment, run_name=name, tags=tags).info.run_id


def show(client: MlflowClient, params: Params, parent: str, board: str) -> None:
    """The leaderboard, in Markdown, on the comparison's page and, the newest, on the data set's."""
    said = lineage.comparison_tags(params)[NOTE]
    client.set_tag(parent, NOTE, f"{board}\n\n{said}")
    title = params.dataset.title
    newest = f"Generative models on the data set **{title}**. The newest comparison:\n\n{board}"
    client.set_experiment_tag(experiment_id(client, title), NOTE, newest)


def tolerant(what: str, action: Callable[[], Any]) -> Any:
    """Do `action`; on an MLflow or connection failure say so and return None."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return action()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        print(f"warning: MLflow: {what} failed ({reason}); kept on disk", file=sys.stderr)
        return None


class TrainingRun:
    """The MLflow run of one training: found or made, fed while it goes on, finished after."""

    def __init__(
        self, params: Params, which: Run, manifest: dict[str, Any], key: str, work: Path
    ) -> None:
        self.params, self.which, self.manifest, self.key = params, which, manifest, key
        self.work = work
        self.last = 0.0
        self.described = False
        self.running = False  # as far as is known

    def deliver(self, records: list[Record]) -> bool:
        """Send what is new, at most every few seconds; while the server is away, warn and keep.

        False where it was too soon, or the server was away.
        """
        if time.monotonic() - self.last < RETRY_S:
            return False
        sent = tolerant("delivering metrics", lambda: self._send(records, self.work))
        self.last = time.monotonic()
        return sent is not None

    def finish(self, out: Path) -> None:
        """Send the rest, tag the run with the hash of the exported weights, and end it."""
        tolerant("finishing the run", lambda: self._finish(out))

    def stop(self, status: str) -> None:
        """Send the rest, and show the run as ended, `KILLED` or `FAILED`, until it goes on."""
        tolerant("stopping the run", lambda: self._stop(status))

    def _stop(self, status: str) -> None:
        client, run_id = self._send(read_history(self.work / HISTORY), self.work)
        client.set_terminated(run_id, status)

    def _finish(self, out: Path) -> None:
        client, run_id = self._send(read_history(out / HISTORY), out)
        client.set_tag(run_id, WEIGHTS, store.describe(out)["weights_sha256"])
        client.set_terminated(run_id)

    def _send(self, records: list[dict[str, Any]], folder: Path) -> tuple[MlflowClient, str]:
        client = connect(self.params)
        experiment = experiment_id(client, self.params.dataset.title)
        run_id = find_run(client, experiment, KEY, self.key)
        run_id = run_id or self._create(client, experiment, folder)
        if not self.running:  # one that was stopped goes on
            client.update_run(run_id, "RUNNING")
            self.running = True
        send_history(client, run_id, records, folder / PICTURES)
        self._describe(client, run_id, folder)
        return client, run_id

    def _create(self, client: MlflowClient, experiment: str, folder: Path) -> str:
        family, seed = self.which
        tags = {
            KEY: self.key,
            "family": family,
            "seed": str(seed),
            "dataset": self.params.dataset.title,
            "data_sha256": self.manifest["content_sha256"],
            **lineage.run_tags(lineage.read(folder)),
        }
        if os.environ.get(PARENT):
            tags["mlflow.parentRunId"] = os.environ[PARENT]
        name = f"{family}-{self.params.dataset.title}-s{seed}"
        return client.create_run(experiment, run_name=name, tags=tags).info.run_id

    def _describe(self, client: MlflowClient, run_id: str, folder: Path) -> None:
        """Parameters, dataset and files, once; what an outage cut short is sent the next time."""
        from mlflow.entities import Param

        if self.described or lineage.DESCRIBED in client.get_run(run_id).data.tags:
            self.described = True
            return
        family, seed = self.which
        config = self.params.models[family].model_dump(mode="json")
        train = {**self.params.train.model_dump(mode="json"), "seed": seed}
        sections: Any = (("", {"family": family}), ("model", config), ("train", train))
        pairs = [pair for prefix, section in sections for pair in _flat(section, prefix)]
        client.log_batch(run_id, params=[Param(path, str(value)) for path, value in pairs])
        data = self.manifest["content_sha256"]
        lineage.describe(client, run_id, self.params, self.which, data, folder)
        self.described = True


def find_run(client: MlflowClient, experiment: str, tag: str, value: str) -> str | None:
    """Id of the newest run of the experiment with this tag."""
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
    return runs[0].info.run_id if runs else None


def run_of(client: MlflowClient, params: Params, which: Run, trained: Path) -> str:
    """The run that trained the model in `trained`; made and filled from disk if it is missing.

    That is how a history reaches MLflow after an outage, or after `dvc pull` elsewhere.
    """
    import json

    experiment = experiment_id(client, params.dataset.title)
    weights = store.describe(trained)["weights_sha256"]
    found = find_run(client, experiment, WEIGHTS, weights)
    if found:
        return found
    facts = json.loads((trained / "train.json").read_text())
    manifest = {"content_sha256": facts["data_sha256"]}
    run = TrainingRun(params, which, manifest, facts["key"], trained)
    run._finish(trained)
    return find_run(client, experiment, WEIGHTS, weights) or ""


def _flat(section: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in section.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            pairs += _flat(value, path)
        elif value is not None:
            pairs.append((path, value))
    return pairs
