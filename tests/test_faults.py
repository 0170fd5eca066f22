"""Kills and signals: training goes on or resumes, to the same weights bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import projects
from tests.disks import fill, small_disk

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]
PATIENCE_S = 300  # on two cores that other tests use as well
STARTED: list[subprocess.Popen[str]] = []
STEPS, INTERVAL = 300, 20
SETTINGS = {
    "train.budget": {"steps": STEPS},
    "train.checkpoint_every": INTERVAL,
    "train.log_every": 10,
    "train.validate_every": 100,
    "train.validation": "asynchronous",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data and classifier, nothing trained yet."""
    path = projects.make_project(tmp_path_factory.mktemp("faults") / "project", SETTINGS)
    projects.stage(path, "prepare")
    projects.stage(path, "classifier")
    return path


HEAD_PID = "TEST_RAY_HEAD_PID"
HEAD = """
import json, os, sys
from tasks.environment import prepare_environment
prepare_environment()
from tasks.cluster import connected
from tasks.params import ClusterConfig
with connected(ClusterConfig()) as address:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    print(json.dumps({"RAY_ADDRESS": address, **{n: os.environ[n] for n in names}}), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def ray(project: Path) -> Iterator[dict[str, str]]:
    """A running Ray that trainings join, as they join the flow's: its environment variables."""
    with subprocess.Popen(
        [sys.executable, "-c", HEAD],
        cwd=project,
        env=projects.environment(project),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as head:
        assert head.stdout is not None
        variables = json.loads(next(line for line in head.stdout if line.startswith("{")))
        yield {**variables, HEAD_PID: str(head.pid)}
        assert head.stdin is not None
        head.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(project: Path, ray: dict[str, str]) -> bytes:
    training = start(project, "undisturbed", ray)
    assert training.wait(PATIENCE_S) == 0, (project / "undisturbed.log").read_text()
    assert json.loads((project / "undisturbed/train.json").read_text())["resumed_from"] == 0
    return (project / "undisturbed/model.safetensors").read_bytes()


def start(project: Path, out: str, ray: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The training in a process group of its own, its output in `<out>.log`; None: its own Ray."""
    with (project / f"{out}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.train", "vae", "--out", out],
            cwd=project,
            env={**projects.environment(project), **(ray or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed half way must not leave a training behind for the next one to meet."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    STARTED.clear()
    for folder in Path(request.getfixturevalue("project"), ".genarena/work").glob("*"):
        shutil.rmtree(folder)


def reached(project: Path) -> int:
    """The last step in the history of the training that goes on, 0 before there is one."""
    steps = [0]
    for path in (project / ".genarena/work").glob("vae-*/history.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                steps.append(json.loads(line)["step"])
    return steps[-1]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], log: Path) -> None:
    """Until it holds while the process runs; else the process's own words, at once."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        ended = process.poll()
        assert ended is None, f"ended with {ended} before:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"waited in vain:\n{log.read_text()}"
        time.sleep(0.02)


def result(project: Path, out: str) -> tuple[bytes, dict[str, Any]]:
    folder = project / out
    return (folder / "model.safetensors").read_bytes(), json.loads(
        (folder / "train.json").read_text()
    )


def test_a_killed_worker_is_replaced(
    project: Path, undisturbed: bytes, ray: dict[str, str]
) -> None:
    training = start(project, "worker", ray)
    wait_until(lambda: reached(project) >= 100, training, project / "worker.log")
    below = psutil.Process(int(ray[HEAD_PID])).children(recursive=True)
    workers = [p for p in below if "ray::RayTrainWorker" in _title(p)]
    assert len(workers) == 1
    workers[0].kill()
    assert training.wait(PATIENCE_S) == 0, (project / "worker.log").read_text()
    weights, facts = result(project, "worker")
    assert weights == undisturbed
    assert 100 - INTERVAL <= facts["resumed_from"] < STEPS


def test_a_killed_validator_is_replaced(
    project: Path, undisturbed: bytes, ray: dict[str, str]
) -> None:
    training = start(project, "validator", ray)

    def validators() -> list[psutil.Process]:
        below = psutil.Process(int(ray[HEAD_PID])).children(recursive=True)
        return [p for p in below if "tasks.training.validator" in _title(p)]

    wait_until(
        lambda: reached(project) >= 100 and validators(), training, project / "validator.log"
    )
    (victim,) = validators()
    victim.kill()
    assert training.wait(PATIENCE_S) == 0, (project / "validator.log").read_text()
    weights, facts = result(project, "validator")
    assert weights == undisturbed
    assert facts["resumed_from"] == 0
    records = [json.loads(line) for line in (project / "validator/history.jsonl").open()]
    assert [r["step"] for r in records if "validation/score" in r] == [100, 200, 300]
    assert not validators()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_killed_run_resumes(project: Path, undisturbed: bytes, ray: dict[str, str]) -> None:
    training = start(project, "run")
    wait_until(lambda: reached(project) >= 100, training, project / "run.log")
    everyone = [
        psutil.Process(training.pid),
        *psutil.Process(training.pid).children(recursive=True),
    ]
    last = reached(project)
    for process in everyone:
        process.kill()
    psutil.wait_procs(everyone, timeout=30)
    training.wait()
    again = start(project, "run", ray)
    assert again.wait(PATIENCE_S) == 0, (project / "run.log").read_text()
    weights, facts = result(project, "run")
    assert weights == undisturbed
    assert facts["resumed_from"] > last - 2 * INTERVAL  # one interval, and what came after `last`
    assert facts["train_steps"] == STEPS
    history = [json.loads(line)["step"] for line in (project / "run/history.jsonl").open()]
    assert history == sorted(set(history))


def test_signals_leave_a_checkpoint_of_that_very_step(
    project: Path, undisturbed: bytes, ray: dict[str, str]
) -> None:
    """Ctrl-C, then SIGTERM to the resumed run, then to the end."""
    for number, at in ((signal.SIGINT, 60), (signal.SIGTERM, 160)):
        training = start(project, "signal", ray)
        wait_until(lambda at=at: reached(project) >= at, training, project / "signal.log")
        os.kill(training.pid, number)
        assert training.wait(PATIENCE_S) == 128 + number
        assert "the workers write a checkpoint" in (project / "signal.log").read_text()
        (work,) = (project / ".genarena/work").glob("vae-*")
        newest = sorted(work.glob("checkpoints/step-*"))[-1]
        stopped_at = json.loads((newest / "progress.json").read_text())["step"]
        assert at <= stopped_at < STEPS
    again = start(project, "signal", ray)
    assert again.wait(PATIENCE_S) == 0
    weights, facts = result(project, "signal")
    assert facts["resumed_from"] == stopped_at
    assert weights == undisturbed


def test_a_full_disk_ends_the_training_which_goes_on_when_there_is_room(
    project: Path, undisturbed: bytes, ray: dict[str, str]
) -> None:
    """It is said in a line, Ray does not try again, and the last whole checkpoint counts."""
    with small_disk(project / ".genarena", 64):
        training = start(project, "full", ray)
        log = project / "full.log"
        wait_until(lambda: reached(project) >= 100, training, log)
        filler = fill(project / ".genarena")
        assert training.wait(PATIENCE_S) == 1, log.read_text()
        last = log.read_text().strip().splitlines()[-1]
        assert "StorageFailed" in last
        assert "make room, and the same command goes on" in last
        filler.unlink()
        again = start(project, "full", ray)
        assert again.wait(PATIENCE_S) == 0, log.read_text()
        weights, facts = result(project, "full")
        assert weights == undisturbed
        assert facts["resumed_from"] >= 80


def test_two_ray_workers_train_as_one(project: Path) -> None:
    """Through Ray Train itself; close, not equal: sums are taken in another order."""
    import torch
    from safetensors.torch import load

    from tasks.data.shards import read_manifest
    from tasks.params import load_params, override_params
    from tasks.training.candidates import load_best
    from tasks.training.worker import work

    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs 2 CPU cores")
    alike = {"train.budget": {"steps": 10}, "train.precision": "fp32"}  # bf16 sums differ sooner
    override_params({"cluster.workers": 2, **alike}, project / "params.yaml")
    projects.stage(project, "train", "vae", "--out", "two")
    params = load_params(project / "params.yaml")
    plain = {"cluster.workers": 1, "train.precision": "auto", **SETTINGS}
    override_params(plain, project / "params.yaml")
    manifest = read_manifest(project / "data/prepared")
    spec = {
        "family": "vae",
        "config": params.models["vae"].model_dump(),
        "data": manifest["spec"],
        "train": params.train.model_dump(),
        "prepared": str(project / "data/prepared"),
        "classifier": str(project / "artifacts/classifier"),
        "directory": str(project / "alone"),
        "threads": 1,
    }
    (project / "alone").mkdir()
    work(spec)
    two = load(result(project, "two")[0])
    one = load_best(project / "alone/checkpoints")
    assert result(project, "two")[1]["workers"] == 2
    for name in two:  # saved without what only training needs
        assert torch.allclose(one[name], two[name], atol=2e-4, rtol=1e-3), name


def test_a_dead_parent_ends_the_training(project: Path, ray: dict[str, str]) -> None:
    """After `kill -9` of `dvc repro`, nothing goes on unseen over the same checkpoints."""
    shell = (
        f"exec -a dvc {sys.executable} -c 'import subprocess, sys; subprocess.run(sys.argv[1:])' "
    )
    inner = f"{sys.executable} -m tasks.train vae --out orphan"
    log = (project / "orphan.log").open("w")
    parent = subprocess.Popen(
        ["bash", "-c", shell + inner],
        cwd=project,
        env={**projects.environment(project), **ray},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: reached(project) >= 20, parent, project / "orphan.log")
    (child,) = [
        p for p in psutil.Process(parent.pid).children() if "tasks.train" in " ".join(p.cmdline())
    ]
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=90)
    assert not child.is_running()


def test_an_impossible_request_says_what_there_is(project: Path) -> None:
    from tasks.params import override_params

    override_params({"cluster.workers": 16, "cluster.cpus_per_worker": 64}, project / "params.yaml")
    done = projects.run(project, sys.executable, "-m", "tasks.train", "vae", "--out", "never")
    override_params({"cluster.workers": 1, "cluster.cpus_per_worker": 1}, project / "params.yaml")
    assert done.returncode == 2
    assert "16 worker(s) ask for 1024 CPU, the cluster has" in done.stderr


def test_stopping_the_flow_leaves_checkpoints_and_starts_nothing_more(project: Path) -> None:
    """SIGTERM to `genarena run`: two families train, a third waits for room and must not start."""
    from tasks.params import override_params

    long = {"train.budget": {"steps": 100_000}, "train.checkpoint_every": 50_000}
    override_params({**long, "train.validate_every": 50_000}, project / "params.yaml")
    with (project / "flow.log").open("w") as log:
        flow = subprocess.Popen(
            [sys.executable, "-m", "genarena", "run", "--families", "vae realnvp dcgan"],
            cwd=project,
            env=projects.environment(project),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    STARTED.append(flow)
    started = time.time()

    def going() -> list[Path]:
        histories = (project / ".genarena/work").glob("*/history.jsonl")
        return [h.parent for h in histories if h.stat().st_mtime > started]

    at_once = min(os.cpu_count() or 1, 3)
    wait_until(lambda: len(going()) == at_once, flow, project / "flow.log")
    below = psutil.Process(flow.pid).children(recursive=True)
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(150) == 130, (project / "flow.log").read_text()
    assert len(going()) == at_once
    for work in going():
        assert list(work.glob("checkpoints/step-*/progress.json")), work.name
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [p for p in alive if "tasks.train" in _title(p) or "dvc" in _title(p)]
    assert "the same command resumes" in (project / "flow.log").read_text()
