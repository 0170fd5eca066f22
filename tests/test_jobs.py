"""Ray's Jobs API: a cluster of which this machine is no node."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from pathspec import PathSpec

from infra.local.process import free_port
from tasks import job, jobs
from tasks.errors import BadInput, Outage
from tasks.jobs import ANSWER, REQUEST
from tasks.params import ClusterConfig, override_params
from tests import projects


def config(storage: Path | str) -> ClusterConfig:
    return ClusterConfig(address="http://there:8265", storage=str(storage))


class Client:
    """A Jobs API whose job answers at once, or ends without an answer."""

    def __init__(self, answer: dict[str, Any] | None) -> None:
        self.answer = answer
        self.submitted: list[Any] = []
        self.stopped: list[str] = []
        self.jobs: list[Any] = []

    def submit_job(self, **asked: Any) -> str:
        self.submitted.append(asked)
        folder = Path(asked["entrypoint"].split()[-1])
        self.request = json.loads((folder / REQUEST).read_text())
        if self.answer:
            (folder / ANSWER).write_text(json.dumps(self.answer))
        return "job"

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: self.answer != {} or job in self.stopped)

    def get_job_logs(self, job: str) -> str:
        return "a line\n"

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(message="its node died")

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


def asked(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | None) -> Client:
    client = Client(answer)
    monkeypatch.setattr(jobs, "_client", lambda config: client)
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    return client


def test_what_is_read_goes_to_the_storage_once(tmp_path: Path) -> None:
    storage, mine = tmp_path / "storage", tmp_path / "mine" / "prepared"
    (mine / "deep").mkdir(parents=True)
    (mine / "deep" / "a").write_text("1")
    first = jobs.shared(config(storage), mine)
    assert Path(first).name == "prepared"
    assert (Path(first) / "deep" / "a").read_text() == "1"
    (Path(first) / "mark").touch()
    assert jobs.shared(config(storage), mine) == first
    assert (Path(first) / "mark").exists(), "copied again"
    (mine / "deep" / "a").write_text("2")
    second = jobs.shared(config(storage), mine)
    assert second != first
    assert (Path(second) / "deep" / "a").read_text() == "2"
    assert jobs.shared(config(storage), Path(first)) == first
    with pytest.raises(BadInput, match=r"cluster\.storage: \.genarena is a folder of this machine"):
        jobs.shared(config(".genarena"), mine)


def test_a_job_is_told_its_function_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush-hush")
    client = asked(monkeypatch, {"result": 3})
    with jobs.for_stages(config(tmp_path)) as (address, places):
        assert (address, places) == (config(tmp_path).address, 3)
    assert client.request["function"] == "tasks.job:families_at_once"
    assert client.request["cluster"]["address"] is None  # there, it is RAY_ADDRESS
    assert "hush-hush" not in json.dumps([client.request, client.submitted])
    assert "a line" in capsys.readouterr().out
    assert not any((tmp_path / "jobs").iterdir()), "requests are left behind"


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"kind": "BadInput", "error": "no room"}, BadInput, "no room"),
        ({"kind": "Outage", "error": "a node died"}, Outage, "a node died"),
        ({"kind": "KeyError", "error": "'x'"}, RuntimeError, "'x'"),
        (None, Outage, "ended without an answer.*its node died"),
    ],
)
def test_what_fails_there_fails_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, Any] | None,
    kind: type[Exception],
    said: str,
) -> None:
    asked(monkeypatch, answer)
    with pytest.raises(kind, match=said) as caught:
        jobs.call(config(tmp_path), "tasks.job:families_at_once", [])
    assert caught.type is kind


def test_a_head_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    none = RuntimeError("status code 500: No available agent to submit job, please try again later")
    client = Mock()
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    client.submit_job.side_effect = [none, "raysubmit_1"]
    assert jobs._submit(client, entrypoint="x") == "raysubmit_1"
    client.submit_job.side_effect = RuntimeError("status code 500: disk full")
    with pytest.raises(RuntimeError, match="disk full"):
        jobs._submit(client, entrypoint="x")
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.05)
    client.submit_job.side_effect = none
    with pytest.raises(Outage, match="No available agent"):
        jobs._submit(client, entrypoint="x")


def test_jobs_are_ended_when_asked_and_when_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = asked(monkeypatch, {})  # never ends by itself
    running = SimpleNamespace(is_terminal=lambda: False)
    for key in ("mine", "other"):
        known = {"genarena": key}
        client.jobs.append(SimpleNamespace(metadata=known, status=running, submission_id=key))
    with pytest.raises(json.JSONDecodeError if False else Exception):
        jobs.call(config(tmp_path), "x:y", [], key="mine", poll=lambda: True)
    assert client.stopped == ["mine", "job"]


def answered(config: ClusterConfig, what: str) -> str:
    if what == "bad":
        raise BadInput("no such thing")
    assert config.address is None
    return what.upper()


@pytest.mark.parametrize(
    ("asked_for", "answer", "status"),
    [
        ("good", {"result": "GOOD"}, 0),
        ("bad", {"kind": "BadInput", "error": "no such thing"}, 1),
    ],
)
def test_the_job_writes_its_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked_for: str,
    answer: dict[str, Any],
    status: int,
) -> None:
    there = ClusterConfig().model_dump(mode="json")
    request = {"function": "tests.test_jobs:answered", "cluster": there, "arguments": [asked_for]}
    (tmp_path / REQUEST).write_text(json.dumps(request))
    monkeypatch.setattr(sys, "argv", ["job", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == status
    assert json.loads((tmp_path / ANSWER).read_text()) == answer


def test_all_code_travels_and_nothing_else(root: Path) -> None:
    left = PathSpec.from_lines("gitwildmatch", jobs.LEFT)
    code = [p for d in ("tasks", "models", "flows") for p in (root / d).rglob("*.py")]
    assert len(code) > 100
    assert not [p for p in code if left.match_file(str(p.relative_to(root)))]
    for name in ("data/prepared/train-00000.parquet", ".git/config", "mlflow.db", ".venv/x"):
        assert left.match_file(name)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head in another folder, closed by a token: its Jobs API, and a client's environment."""
    folder, token = tmp_path_factory.mktemp("cluster"), secrets.token_hex(16)
    port, jobs_port, client_port = (free_port(n, "127.0.0.2") for n in (6379, 8265, 10001))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.2", "--port", str(port), "--num-cpus", "2"),
        *("--dashboard-host", "127.0.0.2", "--dashboard-port", str(jobs_port)),
        *("--temp-dir", f"/tmp/genarena-{secrets.token_hex(3)}", "--disable-usage-stats"),
        *("--object-store-memory", str(200 * 2**20), "--ray-client-server-port", str(client_port)),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    head = subprocess.Popen(
        command,
        cwd=folder,
        env={**inherited, **client, "PATH": path, "RAY_TRAIN_V2_ENABLED": "1"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    address, until = f"http://127.0.0.2:{jobs_port}", time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=2)
            break
        except OSError:
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.5)
    yield address, client
    head.terminate()
    head.wait(60)


@pytest.mark.pipeline
@pytest.mark.timeout(560)
def test_stages_run_on_a_cluster_this_machine_is_no_node_of(
    api: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, client = api
    settings = {"cluster.address": address, "cluster.storage": str(tmp_path / "storage")}
    project = projects.make_project(tmp_path / "project", {"families": ["vae"]})
    for stage in ("prepare", "classifier"):
        words = {"prepare": "data/prepared", "classifier": "artifacts/classifier"}
        projects.stage(project, stage, "--out", words[stage])
    override_params(settings, project / "params.yaml")
    for name, value in client.items():
        monkeypatch.setenv(name, value)
    # `projects.environment` takes nothing of Ray's along; a client's environment has the token
    plain = projects.environment
    monkeypatch.setattr(projects, "environment", lambda path: {**plain(path), **client})
    for words in (
        ("features", "--out", "artifacts/features"),
        ("train", "vae"),
        ("evaluate", "vae"),
    ):
        done = projects.stage(project, *words)
        assert client["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
    facts = json.loads((project / "artifacts/train/vae-0/train.json").read_text())
    assert facts["train_steps"] == 20
    assert (project / "artifacts/train/vae-0/model.safetensors").is_file()
    assert (project / "artifacts/features/features.json").is_file()
    assert (project / "artifacts/evaluate/vae-0/samples.png").is_file()
    metrics = json.loads((project / "metrics/vae-0.json").read_text())
    assert metrics["frechet_distance"] > 0
    left = sorted(p.name for p in (tmp_path / "storage").iterdir())
    assert left == ["inputs", "jobs", "outputs", "work"]
    assert not any((tmp_path / "storage/work").iterdir())
    assert not list(project.glob(".genarena/work/*"))
