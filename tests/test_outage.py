"""MLflow away while a training goes on: said once a try, kept on disk, delivered whole later."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tasks import tracking
from tasks.params import load_params
from tasks.runs import Run
from tasks.training.history import HISTORY, Journal, read_history
from tasks.training.validation import PICTURES

LOSS = "main/loss"


@pytest.fixture
def run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tracking.TrainingRun, Path]:
    """The MLflow run of a training whose history has one record, and its database."""
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    params = load_params(root / "params.yaml")
    tracking.experiment_id(tracking.connect(params), params.dataset.title)  # makes the tables
    (tmp_path / PICTURES).mkdir()
    record(tmp_path, 1)
    manifest = {"content_sha256": "a" * 64, "name": "digits", "counts": {"train": 8}}
    made = tracking.TrainingRun(params, Run("vae", 0), manifest, "key", tmp_path)
    return made, tmp_path / "mlflow.db"


def record(folder: Path, step: int) -> None:
    Journal(folder / HISTORY)({"step": step, "seconds": float(step), LOSS: 1 / step})


def test_a_locked_database_costs_a_warning_and_no_number(
    run: tuple[tracking.TrainingRun, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, database = run
    assert training.deliver(read_history(tmp_path / HISTORY))
    record(tmp_path, 2)
    with sqlite3.connect(database, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert not training.deliver(read_history(tmp_path / HISTORY))
        other.execute("COMMIT")
    other.close()
    warning = capsys.readouterr().err
    assert "database is locked" in warning
    assert "kept on disk" in warning
    record(tmp_path, 3)
    assert training.deliver(read_history(tmp_path / HISTORY))
    client = tracking.connect(training.params)
    experiment = tracking.experiment_id(client, training.params.dataset.title)
    found = tracking.find_run(client, experiment, tracking.KEY, "key")
    assert found is not None
    sent = client.get_metric_history(found, LOSS)
    assert [(m.step, m.value) for m in sent] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_stopped_training_is_shown_as_stopped_until_it_goes_on(
    run: tuple[tracking.TrainingRun, Path], tmp_path: Path
) -> None:
    training, _ = run

    def status() -> str:
        client = tracking.connect(training.params)
        experiment = tracking.experiment_id(client, training.params.dataset.title)
        found = tracking.find_run(client, experiment, tracking.KEY, "key")
        assert found is not None
        return str(client.get_run(found).info.status)

    assert training.deliver(read_history(tmp_path / HISTORY))
    assert status() == "RUNNING"
    training.stop("KILLED")
    assert status() == "KILLED"
    again = tracking.TrainingRun(
        training.params, training.which, training.manifest, "key", tmp_path
    )
    assert again.deliver(read_history(tmp_path / HISTORY))
    assert status() == "RUNNING"


def test_a_report_that_is_made_again_shows_one_leaderboard(
    run: tuple[tracking.TrainingRun, Path],
) -> None:
    params = run[0].params
    client, parent = tracking.connect(params), tracking.start_parent(params)
    for board in ("| old |", "| new |"):
        tracking.show(client, params, parent, board)
    note = client.get_run(parent).data.tags[tracking.NOTE]
    assert note.startswith("| new |\n\nCompares **")
    assert "old" not in note
    experiment = client.get_experiment(tracking.experiment_id(client, params.dataset.title))
    assert experiment.tags[tracking.NOTE].endswith("| new |")
