"""From a registered version back to its code, its data and its parameters; and MLflow's own server
of it. One small project, trained once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from genarena import restore, retrain
from tasks import versions
from tasks.errors import BadInput
from tasks.params import load_params, override_params
from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

NAME = "digits-vae"


def git(path: Path, *words: str) -> str:
    names = ("-c", "user.name=t", "-c", "user.email=t@t")
    return projects.command(path, "git", *names, *words).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code in git, one family trained by DVC and registered, results in git and in a remote."""
    folder = tmp_path_factory.mktemp("versions")
    path = projects.make_project(folder / "project", {"families": ["vae"]})
    projects.dvc(path, "remote", "add", "-d", "storage", str(folder / "remote"))
    git(path, "add", "-A")
    git(path, "commit", "-qm", "code")
    projects.dvc(path, "repro")
    git(path, "add", "-A")
    git(path, "commit", "-qm", "results")
    projects.dvc(path, "push", "-q")
    return path


@pytest.fixture
def client(project: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """The project's MLflow; this process stands in the project's folder."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")


def test_the_run_and_the_version_say_where_they_come_from(
    project: Path, client: mlflow.MlflowClient
) -> None:
    version = client.get_model_version_by_alias(NAME, "champion")
    run = client.get_run(version.run_id)
    commit = git(project, "rev-parse", "HEAD~1")
    lock = (project / "dvc.lock").read_text()
    tags = run.data.tags
    assert (tags["git.commit"], tags["mlflow.source.git.commit"]) == (commit, commit)
    assert tags["git.dirty"] == version.tags["git_dirty"] == "false"
    assert version.tags["git_commit"] == commit
    for out in ("data/prepared", "artifacts/classifier", "artifacts/features"):
        assert tags[f"dvc.{out}"] in lock
    assert version.tags["data_md5"] == tags["dvc.data/prepared"]
    manifest = json.loads((project / "data/prepared/manifest.json").read_text())
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "digits"
    assert manifest["content_sha256"].startswith(given.dataset.digest)
    assert json.loads(given.dataset.profile)["train"] == manifest["counts"]["train"]
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    files = {file.path for file in client.list_artifacts(version.run_id, "project")}
    assert files == {"project/params.yaml", "project/dvc.lock"}
    assert "vae" in tags["mlflow.note.content"]
    parent = client.get_run(tags["mlflow.parentRunId"])
    assert "Compares **vae** on **digits**" in parent.data.tags["mlflow.note.content"]


def test_the_models_tab_has_metrics_of_this_data_and_of_the_checkpoint(
    project: Path, client: mlflow.MlflowClient
) -> None:
    found = json.loads((project / "metrics/vae-0.json").read_text())
    (model,) = client.search_logged_models(["1"])
    measured = {m.key: m.value for m in model.metrics if m.dataset_name == "digits"}
    assert measured["frechet_distance"] == found["frechet_distance"]
    assert measured["bits_per_dim"] == found["bits_per_dim"]
    (validated,) = [m for m in model.metrics if m.key == "validation/score"]
    assert validated.step == found["provenance"]["best_step"]
    assert model.params["model.latent_dim"] == "32"
    run = client.get_run(model.source_run_id)
    assert len(client.get_metric_history(run.info.run_id, "frechet_distance")) == 1


def test_a_clean_clone_has_nothing_to_do(project: Path, tmp_path: Path) -> None:
    projects.command(tmp_path, "git", "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    (clone / ".venv").symlink_to(sys.prefix)
    projects.dvc(clone, "pull", "-q")
    said = projects.dvc(clone, "repro").stdout
    assert "Data and pipelines are up to date" in said
    assert "Running" not in said
    weights = "artifacts/train/vae-0/model.safetensors"
    assert (clone / weights).read_bytes() == (project / weights).read_bytes()


def test_a_version_alone_is_retrained_to_the_same_metrics(project: Path, tmp_path: Path) -> None:
    """Other code, other parameters, no prepared data and no cache here by now: only a remote."""
    kept = tmp_path / "cache"
    with (project / "models/vae/__init__.py").open("a") as file:
        file.write("\nVAE.losses = None  # not the code of this version\n")
    git(project, "commit", "-qam", "other code")
    changes = {"models.vae.latent_dim": 4, "train.batch_size": 8}
    override_params(changes, project / "params.yaml")
    shutil.move(project / ".dvc/cache", kept)
    shutil.move(project / "data/prepared", tmp_path / "prepared")
    try:
        words = ("retrain", f"models:/{NAME}/1", "--out", str(tmp_path / "again"))
        done = projects.genarena(project, *words)
    finally:
        git(project, "reset", "-q", "--hard", "HEAD~1")
        shutil.rmtree(project / ".dvc/cache")
        shutil.move(kept, project / ".dvc/cache")
        shutil.move(tmp_path / "prepared", project / "data/prepared")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: from the remote" in done.stdout
    assert "weights: the same, bit for bit" in done.stdout
    assert "metrics are equal" in done.stdout
    assert "differs" not in done.stdout
    for name in ("frechet_distance", "bits_per_dim", "train_steps"):
        assert name in done.stdout
    mine, theirs = (p / "artifacts/train/vae-0/train.json" for p in (tmp_path / "again", project))
    assert json.loads(mine.read_text())["key"] != json.loads(theirs.read_text())["key"]


def test_data_is_taken_from_the_cache_where_it_is_there(
    project: Path,
    client: mlflow.MlflowClient,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = restore.clone(git(project, "rev-parse", "HEAD"), tmp_path / "clone")
    restore.bring_data(folder, restore.environment(folder), "data/raw")
    assert capsys.readouterr().out == "data: from the cache\n"
    manifest = "data/prepared/manifest.json"
    assert (folder / manifest).read_bytes() == (project / manifest).read_bytes()
    assert not (folder / ".dvc/cache").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(BadInput, match="is not empty; remove it or name another folder"):
        restore.clone(git(project, "rev-parse", "HEAD"), tmp_path / "other")


def copied(client: mlflow.MlflowClient, **changes: str) -> str:
    """Another version like the first but for these tags; its number."""
    first = client.get_model_version(NAME, "1")
    tags = {**first.tags, **changes}
    made = client.create_model_version(NAME, first.source, run_id=first.run_id, tags=tags)
    return str(made.version)


def test_what_cannot_be_restored_is_refused(
    project: Path, client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params()
    dirty, unknown = copied(client, git_dirty="true"), copied(client, git_commit="0" * 40)
    nowhere = copied(client, git_commit="none")
    for asked, words in (
        (f"models:/{NAME}/{dirty}", f"version {dirty} was made with uncommitted changes"),
        (f"models:/{NAME}/{nowhere}", "made outside git"),
        (f"models:/{NAME}/77", "has no version 77; "),
        ("digits-va", "no such model; did you mean 'digits-vae'"),
    ):
        with pytest.raises(BadInput, match=words):
            retrain._origin(params, asked, tmp_path)
    done = projects.genarena(project, "retrain", f"models:/{NAME}/{unknown}")
    assert done.returncode == 2
    assert done.stderr.startswith("genarena: commit 000000000000 is not in this repository; fetch")
    assert not (project / ".genarena/retrained").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"the registry at http://127.0.0.1:9 does not answer"):
        retrain._origin(params, NAME, tmp_path)


def test_files_changed_in_the_artifact_store_are_refused(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    run_id = client.get_model_version(NAME, "1").run_id
    location = client.get_run(run_id).info.artifact_uri.removeprefix("file://")
    file = Path(location, "project/params.yaml")
    before = file.read_text()
    file.write_text(before + "python: touch\n")
    try:
        with pytest.raises(BadInput, match=r"params.yaml in the artifact store is not the one"):
            retrain._origin(load_params(), f"models:/{NAME}/1", tmp_path)
    finally:
        file.write_text(before)


def test_a_metric_that_differs_is_shown_and_fails(
    client: mlflow.MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = retrain._origin(load_params(), f"models:/{NAME}/1", tmp_path)
    same: dict[str, Any] = {**origin.metrics, "weights_sha256": origin.tags["weights_sha256"]}
    costs = dict.fromkeys(retrain.COSTS, 1e9)
    assert retrain._compare(origin, {**same, **costs}) == 0
    assert retrain._compare(replace(origin, metrics={}), same) == 1
    other = {**same, "kid": np.nextafter(same["kid"], 9), "weights_sha256": "x"}
    del other["coverage"]
    capsys.readouterr()
    assert retrain._compare(origin, other) == 1
    told = capsys.readouterr().out
    assert "2 metrics differ" in told
    assert "weights: others" in told


def test_rollback_by_the_command(project: Path, client: mlflow.MlflowClient) -> None:
    better = copied(client, frechet_distance="0.001")
    versions.award(client, NAME, better, "champion", "better")
    listed = projects.genarena(project, "registry", "list", "vae")
    assert listed.returncode == 0, listed.stderr
    assert "champion" in next(line for line in listed.stdout.splitlines() if " 0.001 " in line)
    done = projects.genarena(project, "registry", "rollback", NAME, "--reason", "blurred")
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: version 1 is champion again; version {better} is challenger" in done.stdout
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"
    again = projects.genarena(project, "registry", "rollback", NAME)
    assert again.returncode == 2
    assert again.stderr.startswith(f"genarena: {NAME}: nothing to go back to")


@contextmanager
def served(project: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port of this machine alone; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"-m mlflow models serve -m models:/{NAME}@champion --env-manager local -h 127.0.0.1"
    inherited = {k: v for k, v in projects.environment(project).items() if k != "PYTHONPATH"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, *words.split(), "-p", str(port), "-w", "1"],
            cwd=log.parent,
            env={**inherited, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_mlflow_serves_samples(project: Path, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    asked = {"dataframe_records": [{"n": 3}], "params": {"seed": 5}}
    with served(project, tmp_path / "serve.log") as address:
        request = urllib.request.Request(
            f"{address}/invocations",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            images = np.array(json.load(answer)["predictions"])
    assert images.shape == (3, 8, 8, 1)
    assert 0 <= images.min() < images.max() <= 255
