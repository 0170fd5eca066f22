"""Stages done by a process that has imported everything already."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows import backing
from flows.process import allow
from genarena import api
from tasks.errors import BadInput
from tasks.params import ClusterConfig, Params
from tasks.training.launch import UNUSED
from tests import projects

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing stands by")

STANDING = """
import os, sys, time
import tasks.stage
from tasks import warm

def as_it_is():
    print("fork", os.getpid(), flush=True)
    time.sleep(float(os.environ.get("SLEEP", "0")))

tasks.stage.prepare_environment = as_it_is  # a fork has it, a process of its own has not
warm._load = warm._stamps
with warm.standing_by() as get_ready:
    get_ready()
    print(os.environ[warm.SOCKET], flush=True)
    sys.stdin.read()
print("over", flush=True)
"""
COMMAND = [sys.executable, "-m", "tasks.train", "nothing"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return projects.make_project(tmp_path / "project", {})


@contextmanager
def standing(project: Path) -> Iterator[dict[str, str]]:
    """The environment of commands for which a process stands by."""
    with subprocess.Popen(
        [sys.executable, "-c", STANDING],
        cwd=project,
        env=projects.environment(project),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield {**projects.environment(project), "GENARENA_WARM": process.stdout.readline().strip()}
        process.stdin.close()
        assert process.stdout.readline() == "over\n"
        assert process.wait() == 0


def test_a_stage_is_done_by_the_process_that_stands_by_while_its_code_is_the_folders(
    project: Path,
) -> None:
    with standing(project) as environment:
        asked = {"cwd": project, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(COMMAND, check=False, **asked)  # type: ignore[call-overload]
        assert done.stdout.startswith("fork "), done
        assert done.returncode == 2
        assert "train: unknown family 'nothing'" in done.stderr
        file = project / "tasks/stage.py"
        file.write_text(file.read_text() + "# edited\n")
        done = subprocess.run(COMMAND, check=False, **asked)  # type: ignore[call-overload]
        assert done.stdout == ""
        assert done.returncode == 2
        assert "train: unknown family 'nothing'" in done.stderr
    done = subprocess.run(COMMAND, check=False, **asked)  # type: ignore[call-overload]
    assert (done.stdout, done.returncode) == ("", 2)  # nobody stands by any more


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_work_ends_with_its_command(project: Path, number: signal.Signals) -> None:
    with standing(project) as environment:
        command = subprocess.Popen(
            COMMAND,
            cwd=project,
            env={**environment, "SLEEP": "100"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert command.stdout is not None
        work = psutil.Process(int(command.stdout.readline().split()[1]))
        command.send_signal(number)
        assert command.wait(10) == -number
        assert command.stdout.read() == ""  # nobody else holds its output
        deadline = time.monotonic() + 10
        while work.is_running() and work.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_is_loaded_leaves_the_process_fit_for_a_fork(root: Path) -> None:
    """Ray reads its token when it is imported, and a thread would not be there after the fork."""
    code = "import sys, threading; from tasks import warm; loaded = warm._load(); "
    code += "assert 'ray' not in sys.modules and threading.active_count() == 1; "
    code += "assert not warm._changed(loaded) and any('validation.py' in name for name in loaded)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_a_run_begins_before_its_own_ray_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    coming, ended = threading.Event(), []

    @contextmanager
    def for_stages(config: ClusterConfig) -> Iterator[tuple[str, int]]:
        thread = threading.current_thread()  # Ray's processes would end with it
        assert coming.wait(10)
        yield "there", 2
        assert threading.current_thread() is thread
        ended.append("ray")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(backing.jobs, "for_stages", for_stages)
    monkeypatch.setattr(backing.tracking, "start_parent", lambda params: "parent")
    monkeypatch.setattr(
        backing.tracking, "end_parent", lambda params, run, failed: ended.append((run, failed))
    )
    monkeypatch.setattr(backing.artifacts, "show_run", lambda params, run: None)
    with backing.started(Params(families=("vae",), models={"vae": {}})) as behind:
        assert not coming.is_set()
        coming.set()
        environment = {"RAY_ADDRESS": "there", backing.tracking.PARENT: "parent"}
        assert behind.ready() == (environment, 2)
        behind.failed = False
    allow()
    assert ended == [("parent", False), "ray"]


def test_a_ray_that_cannot_hold_a_family_is_told_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def for_stages(config: ClusterConfig) -> Iterator[tuple[str, int]]:
        raise BadInput("too small")
        yield

    monkeypatch.setattr(backing.jobs, "for_stages", for_stages)
    for address, begun in (("", True), ("10.0.0.1:6379", False)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        reached: list[str] = []

        def use(reached: list[str] = reached) -> None:
            with backing._ray(ClusterConfig()) as ray:
                reached.append("block")
                ray()

        with pytest.raises(BadInput, match="too small"):
            use()
        assert bool(reached) is begun


def test_the_actors_that_are_left_out_are_ray_trains() -> None:
    """Under another name one would be back, and ask a dashboard that is not there."""
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert all(
        hasattr(m, n) for m, n in zip((datasets, placement_group_callback), UNUSED, strict=True)
    )
    assert hasattr(DataParallelTrainer, "_create_default_callbacks")


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "PREFECT_PROFILE"])
def test_no_server_is_started_where_there_may_be_one(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv(name, "there")
    monkeypatch.setattr(api.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    api.start_server()()


def test_a_server_of_our_own_that_does_not_come_up_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(api.sys, "executable", "false")
    monkeypatch.setattr(api.os, "environ", dict(api.os.environ))
    answering = api.start_server()
    with pytest.raises(RuntimeError, match="did not start"):
        answering()


@pytest.mark.parametrize("module", ["genarena.command", "tasks.train"])
def test_threads_are_told_not_to_spin_before_they_are_loaded(module: str, root: Path) -> None:
    """OpenMP reads it once; a fork has what its parent has loaded."""
    code = f"""
import os, sys
os.environ.pop("GOMP_SPINCOUNT", None)
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("GOMP_SPINCOUNT" in os.environ)
sys.meta_path.insert(0, Watch())
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done
