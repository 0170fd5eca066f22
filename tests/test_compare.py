"""The order of the main job's stages, without running any."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prefect.states import Completed, Failed, State

import tasks.stage
from flows import chains, compare, stage
from tasks.cluster import nodes_lost
from tasks.errors import BadInput, Outage, Unreachable
from tasks.params import ClusterConfig, Params
from tasks.runs import UNEXPLAINED, Run


class Chain:
    """A future that ends a little later, in a thread of its own."""

    def __init__(self, which: Run, open_: list[str], log: list[str]) -> None:
        self.which, self.open, self.log = which, open_, log
        self.state: State[Any] = Failed() if which.family == "gan" else Completed()
        self.done = threading.Event()
        open_.append(which.name)
        log.append(f"{which.name} of {len(open_)}")

    def add_done_callback(self, then: Callable[[Chain], None]) -> None:
        def end() -> None:
            self.open.remove(self.which.name)
            self.done.set()
            then(self)

        threading.Timer(0.02, end).start()

    def wait(self) -> None:
        self.done.wait()


@pytest.mark.parametrize("places", [1, 2])
def test_no_more_runs_are_open_than_have_a_place_and_a_failed_one_frees_it(
    places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    log: list[str] = []
    open_: list[str] = []

    def run_stage(name: str, environment: Mapping[str, str], **_: Any) -> State[Any]:
        stages.append(name)
        return Completed()

    monkeypatch.setattr(compare, "run_stage", run_stage)
    monkeypatch.setattr(chains, "start_run", lambda which, *_: Chain(which, open_, log))
    monkeypatch.setattr(compare.artifacts, "Progress", lambda _: Mock())
    monkeypatch.setattr(compare.artifacts, "show_leaderboard", Mock())
    families = ("vae", "gan", "gmm")
    params = Params(families=families, seeds=(0, 1), models={name: {} for name in families})
    backing = Mock()
    backing.ready.return_value = ({}, places)
    backing.done_with_ray.side_effect = lambda: stages.append("no Ray from here")
    state = compare._stages(params, backing)
    names = [f"{family}-{seed}" for seed in (0, 1) for family in families]
    assert [line.split()[0] for line in log] == names
    assert max(int(line.split()[-1]) for line in log) == places
    last = ["no Ray from here", "report", "register"]
    assert stages == ["prepare", "classifier", "features", *last]
    assert state.is_failed()
    assert "gan-0, gan-1" in str(state.message)


@pytest.mark.parametrize(("address", "ours"), [(None, True), ("10.0.0.1:6379", False)])
def test_a_flow_has_a_process_beside_it_for_workers_too_where_ray_is_its_own(
    address: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []

    @contextmanager
    def beside(workers: bool) -> Iterator[None]:
        log.append(workers)
        yield
        log.append("gone")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    params = Params(families=("vae",), models={"vae": {}}, cluster=ClusterConfig(address=address))
    monkeypatch.setattr(compare, "load_params", lambda: params)
    monkeypatch.setattr(compare, "beside", beside)
    monkeypatch.setattr(compare, "started", lambda params: nullcontext(Mock()))
    monkeypatch.setattr(compare, "_stages", lambda *_: log.append("stages") or Completed())
    assert compare.run_all().is_completed()
    assert log == [ours, "stages", "gone"]


def test_what_is_tried_again_is_what_may_go_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status of a stage decides; nothing is tried again once the flow ends."""
    states = {}
    for status in (1, 2, 75):
        line = f"ERROR: failed to reproduce 's': failed to run: x, exited with {status}"

        def ended(command: Any, environment: Any, on_line: Callable[[str], None]) -> int:
            on_line("(measure pid=7) so it went")
            on_line("(X pid=8) Failed to query Ray Train Controller actor state. State API may be")
            on_line(line)  # noqa: B023
            return 1

        monkeypatch.setattr(stage, "run_process", ended)
        monkeypatch.setattr(stage, "get_run_logger", Mock())
        states[status] = stage.run_stage.fn("s", {})
    assert [state.name for state in states.values()] == ["Failed", "Refused", "Outage"]
    assert {str(state.message) for state in states.values()} == {"so it went"}
    again = [stage.worth_another(None, None, state) for state in states.values()]
    assert again == [False, False, True]
    monkeypatch.setattr(stage, "stopping", lambda: True)
    assert not stage.worth_another(None, None, states[75])
    assert stage.run_stage.retries == 2
    assert stage.run_stage.retry_condition_fn is stage.worth_another


@pytest.mark.parametrize(
    ("reason", "code", "name"),
    [
        (UNEXPLAINED, 1, "Outage"),  # by Ray, when its node is gone
        (UNEXPLAINED, 137, "Failed"),  # by the kernel, for its memory
        ("ValueError: no", 1, "Failed"),
    ],
)
def test_a_stage_that_was_ended_without_a_word_is_tried_again(
    reason: str, code: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    record = Run("vae", 0).failure
    record.parent.mkdir()
    record.write_text(json.dumps({"stage": "train", "reason": reason}))

    def ended(command: Any, environment: Any, on_line: Callable[[str], None]) -> int:
        on_line(f"ERROR: failed to reproduce 't': failed to run: x, exited with {code}")
        return 1

    monkeypatch.setattr(stage, "run_process", ended)
    monkeypatch.setattr(stage, "get_run_logger", Mock())
    assert stage.run_stage.fn("train@vae-0", {}).name == name


def test_a_lost_node_is_an_outage_and_a_fault_of_the_training_is_none() -> None:
    import ray
    from ray.train import WorkerGroupError

    lost = ray.exceptions.ActorDiedError()
    assert nodes_lost(lost)
    assert nodes_lost(ConnectionResetError())
    assert nodes_lost(WorkerGroupError("gone", {0: ValueError("cut off"), 1: lost}))
    assert not nodes_lost(WorkerGroupError("NaN", {0: ValueError("step 3: loss is nan")}))
    assert not nodes_lost(ValueError("no"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Outage("the registry is away"), 75),
        (Unreachable("the registry does not answer"), 75),
        (ConnectionError("Ray is gone"), 75),
        (BadInput("no such model"), 2),
    ],
)
def test_the_exit_status_of_a_stage_says_whether_to_try_again(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, tasks.stage.running("register"):
        raise error
    assert ended.value.code == status
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("(measure_folder pid=123) features: 100", "features: 100"),
        ("(RayTrainWorker pid=9, ip=10.0.0.7) step 3", "[10.0.0.7] step 3"),
        ("(2 of 3) step 3", "(2 of 3) step 3"),
    ],
)
def test_the_log_has_no_names_of_ray_workers(line: str, shown: str) -> None:
    assert stage.plain(line) == shown
