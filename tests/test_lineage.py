"""What a run in MLflow came from, and that an outage takes none of it away. No training."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest

from models import store
from tasks import lineage
from tasks.params import Params, load_params, override_params
from tasks.runs import Run
from tasks.tracking import TrainingRun
from tasks.training.history import HISTORY, write_history
from tests.conftest import tiny_model
from tests.projects import ROOT
from tests.test_provenance import git

WHICH = Run("vae", 3)
MANIFEST = {
    "content_sha256": "a1" * 32,
    "counts": {"train": 7, "validation": 2, "test": 3},
    "spec": {"shape": [1, 8, 8]},
}
LOCK = """
schema: '2.0'
stages:
  prepare: {cmd: x, outs: [{path: data/prepared, hash: md5, md5: 1f.dir}]}
  report: {cmd: x, outs: [{path: reports/leaderboard.html, hash: md5, md5: 2f}]}
"""
RECORDS = [{"step": step, "seconds": 1.0, "main/loss": 1.0 / step} for step in (1, 2)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed project, this process in it; a training of it that has ended in `work`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("dvc.lock").write_text(LOCK)
    git("init", "-q")
    git("add", "params.yaml", "dvc.lock")
    git("commit", "-qm", "x")
    work = tmp_path / "work"
    lineage.record(work, load_params(), MANIFEST)
    model = tiny_model("vae")
    store.save(work, model, "vae", model.state_dict())
    write_history(work / HISTORY, RECORDS)
    return tmp_path


def training(project: Path, params: Params) -> TrainingRun:
    return TrainingRun(params, WHICH, MANIFEST, "token", project / "work")


def the_run() -> mlflow.entities.Run:
    (run,) = mlflow.MlflowClient().search_runs(["1"])
    return run


def test_a_run_that_was_delivered_late_says_what_it_was_then(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params()
    commit = git("rev-parse", "HEAD").strip()
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert training(project, params).deliver(RECORDS) is False
        assert "kept on disk" in capsys.readouterr().err
    was = Path("params.yaml").read_text()
    override_params({"models.vae.latent_dim": 5})
    git("commit", "-qam", "later")
    Path("dvc.lock").write_text("")
    training(project, params).finish(project / "work")
    run = the_run()
    assert run.info.run_name == "vae-digits-s3"
    assert run.info.status == "FINISHED"
    assert (run.data.tags["git.commit"], run.data.tags["git.dirty"]) == (commit, "false")
    assert run.data.tags["dvc.data/prepared"] == "1f.dir"
    assert "dvc.reports/leaderboard.html" not in run.data.tags
    folder = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="project")
    assert Path(folder, "params.yaml").read_text() == was
    assert Path(folder, "dvc.lock").read_text() == LOCK
    assert run.data.tags["genarena.sha256.dvc.lock"] == store.file_sha256(Path(folder, "dvc.lock"))
    assert run.data.params["train.seed"] == "3"
    words = run.data.tags["mlflow.note.content"]
    assert "7 train, 2 validation, 3 test" in words
    assert f"commit {commit[:12]}." in words


def test_an_artifact_store_away_costs_no_metrics_and_is_made_up_for(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params()
    with monkeypatch.context() as away:

        def fail(*_: object) -> None:
            raise OSError("no artifact store")

        away.setattr(mlflow.MlflowClient, "log_artifact", fail)
        assert training(project, params).deliver(RECORDS) is False
    run = the_run()
    assert run.data.metrics["main/loss"] == 0.5
    assert lineage.DESCRIBED not in run.data.tags
    assert training(project, params).deliver(RECORDS) is True
    run = the_run()
    assert run.data.tags[lineage.DESCRIBED] == "true"
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.digest == MANIFEST["content_sha256"][:36]
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "main/loss")) == 2


def test_changed_code_is_told(project: Path) -> None:
    Path("code.py").write_text("1")
    git("add", "code.py")
    facts = lineage.record(project / "other", load_params(), MANIFEST)
    assert lineage.run_tags(facts)["git.dirty"] == "true"
    assert lineage.version_tags(facts)["git_dirty"] == "true"
    assert lineage.told(facts) == f"{git('rev-parse', 'HEAD').strip()} with changes"
