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
from tasks.params import Params
from tasks.runs import Run
from tasks.training.history import HISTORY, VALIDATION, Record, read_history
from tasks.training.validation import PICTURES

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "GENARENA_PARENT_RUN"  # set by the flow: the comparison that children belong to
KEY, WEIGHTS = "genarena.key", "genarena.weights"
# the last step whose record, and whose validation, the run has: validations come later
DELIVERED, VALIDATED = "genarena.delivered_step", "genarena.delivered_validation"
RETRY_S, BATCH = 5.0, 900  # log_batch takes 1,000 metrics


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
            return client.create_experiment(name, tags={"mlflow.note.content": note})
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

    def _finish(self, out: Path) -> None:
        client, run_id = self._send(read_history(out / HISTORY), out)
        client.set_tag(run_id, WEIGHTS, store.describe(out)["weights_sha256"])
        client.set_terminated(run_id)

    def _send(self, records: list[dict[str, Any]], folder: Path) -> tuple[MlflowClient, str]:
        client = connect(self.params)
        experiment = experiment_id(client, self.params.dataset.title)
        run_id = find_run(client, experiment, KEY, self.key)
        run_id = run_id or self._create(client, experiment, folder)
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


def send_history(client: MlflowClient, run_id: str, records: list[Record], pictures: Path) -> None:
    """Log the records (and sample grids) that the run does not have yet; safe to repeat.

    A validation that has become known since its step was logged is logged on its own.
    """
    from mlflow.entities import Metric

    tags = client.get_run(run_id).data.tags
    delivered, validated = (int(tags.get(tag, -1)) for tag in (DELIVERED, VALIDATED))
    new = [r for r in records if r["step"] > delivered]
    checked = [
        r
        for r in records
        if r["step"] > validated and any(name.startswith(VALIDATION) for name in r)
    ]
    metrics = [
        Metric(name, float(value), int(1000 * record["seconds"]), record["step"])
        for part, of_validation in ((new, False), (checked, True))
        for record in part
        for name, value in record.items()
        if name not in ("step", "seconds")
        and name.startswith(VALIDATION) == of_validation
        and isinstance(value, (int, float))
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    for record in checked:
        _send_picture(client, run_id, pictures / f"step-{record['step']:08d}.png", record["step"])
    for tag, part in ((DELIVERED, new), (VALIDATED, checked)):
        if part:
            client.set_tag(run_id, tag, str(part[-1]["step"]))


def _send_picture(client: MlflowClient, run_id: str, path: Path, step: int) -> None:
    if not path.exists():
        return
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    client.log_image(run_id, pixels, key="samples", step=step)


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
