"""Stages done by a process that has imported everything already."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows import backing, database
from flows.process import allow
from genarena import api
from tasks.errors import BadInput
from tasks.params import ClusterConfig, Params
from tasks.training.launch import UNUSED
from tasks.workspace import alone
from tests import projects

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing stands by")

PATCHES = """
import os, time
import tasks.stage
from tasks import standby, warm

def as_it_is():
    print("fork", os.getpid(), flush=True)
    time.sleep(float(os.environ.get("SLEEP", "0")))

tasks.stage.prepare_environment = as_it_is  # a fork has it, a process of its own has not
warm._load = warm._stamps
"""
STANDING = f"""{PATCHES}
import sys
with standby.standing_by() as get_ready:
    get_ready(workers=False)
    print(os.environ[standby.SOCKET], flush=True)
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


def test_a_worker_of_ray_is_a_fork_and_where_nobody_stands_by_python_itself(
    project: Path, tmp_path: Path
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ['ASKED'], 'tasks.warm' in sys.modules, flush=True)\n"
        "sys.exit(7)\n"
    )
    words = [sys.executable, "-P", project / "tasks/handover.py", script, "--one", "two words"]
    for stands in (True, False):
        with standing(project) as environment:
            if not stands:
                del environment["GENARENA_WARM"]
            environment["ASKED"] = "here"
            done = subprocess.run(words, check=False, env=environment, stdout=subprocess.PIPE)
        assert done.stdout.decode() == f"['--one', 'two words'] here {stands}\n"
        assert done.returncode == 7


def test_the_workers_of_a_ray_of_our_own_are_forks(root: Path, tmp_path: Path) -> None:
    """Products take as many threads there as the worker was given, though numpy is loaded."""
    code = """
import json, os, sys
from tasks import standby, warm
from tasks.environment import prepare_environment
def look(threads, gpu):
    import numpy, threadpoolctl
    from tasks.environment import use_threads
    use_threads(threads)
    pools = [p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]
    return "tasks.warm" in sys.modules, pools
prepare_environment()
warm._load = warm._stamps
import numpy
with standby.standing_by() as get_ready:
    get_ready(workers=True)
    from tasks import cluster
    from tasks.params import ClusterConfig
    print(json.dumps(cluster.on_worker(ClusterConfig(), look)))
"""
    environment = projects.environment(tmp_path)
    environment = {k: v for k, v in environment.items() if not k.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**environment, "OPENBLAS_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    fork, pools = json.loads(done.stdout.splitlines()[-1])
    assert fork
    assert pools
    assert set(pools) == {1}


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


def test_a_deployments_stages_are_forks_too(project: Path) -> None:
    """Of a process of its own, which is gone afterwards; one within another's block is that one."""
    code = f"""
import os, psutil, subprocess
from tasks import standby, warm
plain, before = standby.PROGRAM, dict(os.environ)
standby.PROGRAM = {PATCHES!r} + plain
with standby.beside(workers=True):
    told = os.environ[standby.SOCKET], os.environ[standby.WORKERS]
    with standby.beside(workers=False):
        assert (os.environ[standby.SOCKET], os.environ[standby.WORKERS]) == told
    assert (os.environ[standby.SOCKET], os.environ[standby.WORKERS]) == told
    print(subprocess.run({COMMAND!r}, stdout=subprocess.PIPE, text=True).stdout, flush=True)
with standby.beside(workers=False):  # ended while it imports
    assert standby.WORKERS not in os.environ
late = "import time; from tasks import warm; warm._load = lambda: (time.sleep(3), 1 / 0); "
standby.PROGRAM = late + plain
with standby.beside(workers=False):  # its imports fail, when the command waits for them
    done = subprocess.run({COMMAND!r}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 2) and "unknown family" in done.stderr, done
assert dict(os.environ) == before
assert psutil.Process().children() == [] and not os.path.exists(told[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=projects.environment(project),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("fork ")


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
    assert ended == [("parent", False), "ray"]
    with backing.started(Params(families=("vae",), models={"vae": {}})) as behind:
        behind.ready()
        behind.done_with_ray().result(10)
        assert ended[2:] == ["ray"]  # and the last stages are still to come
    allow()
    assert ended[2:] == ["ray", ("parent", True)]


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
            with backing._ray(ClusterConfig()) as (ray, _):
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
    api.start_server().wait()


def test_a_server_is_there_early_and_can_be_dropped(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    """Nothing is left of one that turns out to be of no use, and no second one beside a run's."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(api.os, "environ", projects.environment(project))
    with alone():
        pass
    with subprocess.Popen(
        [sys.executable, "-c", "from tasks.workspace import alone\nwith alone(): print(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert api.start_early() is None
        other.communicate(b"\n")
    server = api.start_early()
    assert server is not None
    assert server.process is not None
    time.sleep(0.5)  # it imports
    server.process.send_signal(signal.SIGINT)  # of Ctrl-C; no traceback of its own
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.5)
    server.drop()
    assert server.process.poll() == -signal.SIGKILL


def test_a_projects_database_is_a_copy_and_one_that_is_there_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = tmp_path / "made.db"
    made.write_text("made")
    monkeypatch.setattr(database, "MADE", made)
    monkeypatch.delenv(database.ELSEWHERE, raising=False)
    database.prepare_home(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [database.FILE]
    assert (tmp_path / "new" / database.FILE).read_text() == "made"
    (tmp_path / "new" / database.FILE).write_text("used")
    database.prepare_home(tmp_path / "new")
    assert (tmp_path / "new" / database.FILE).read_text() == "used"
    monkeypatch.setenv(database.ELSEWHERE, "postgresql+asyncpg://there")
    database.prepare_home(tmp_path / "another")
    assert list((tmp_path / "another").iterdir()) == []


@pytest.mark.skipif(not database.MADE.exists(), reason="not installed by `make install`")
def test_the_database_that_is_copied_is_what_prefects_migrations_lead_to() -> None:
    from alembic.script import ScriptDirectory
    from prefect.server.database.dependencies import provide_database_interface

    versions = provide_database_interface().orm.versions_dir
    head = ScriptDirectory(versions, version_locations=[versions]).get_current_head()
    with sqlite3.connect(database.MADE) as found:
        assert found.execute("select version_num from alembic_version").fetchall() == [(head,)]
        assert found.execute("select count(*) from flow_run").fetchall() == [(0,)]


def test_a_server_of_our_own_that_does_not_come_up_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(api.sys, "executable", "false")
    monkeypatch.setattr(api.os, "environ", dict(api.os.environ))
    server = api.start_server()
    with pytest.raises(RuntimeError, match="did not start"):
        server.wait()


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
