"""The order of the main job's stages, without running any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Completed, Failed, State

from flows import compare
from tasks.params import Params
from tasks.runs import Run


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
    places: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reports").mkdir()
    Path("reports/leaderboard.csv").write_text("rank,family\n1,vae\n")
    stages: list[str] = []
    log: list[str] = []
    open_: list[str] = []

    def stage(name: str, environment: Mapping[str, str], **_: Any) -> State[Any]:
        stages.append(name)
        return Completed()

    monkeypatch.setattr(compare, "run_stage", stage)
    monkeypatch.setattr(compare, "start_run", lambda which, _: Chain(which, open_, log))
    monkeypatch.setattr(compare, "families_at_once", lambda _: places)
    monkeypatch.setattr(compare, "create_table_artifact", lambda **_: None)
    families = ("vae", "gan", "gmm")
    params = Params(families=families, seeds=(0, 1), models={name: {} for name in families})
    state = compare._stages(params, {})
    names = [f"{family}-{seed}" for seed in (0, 1) for family in families]
    assert [line.split()[0] for line in log] == names
    assert max(int(line.split()[-1]) for line in log) == places
    assert stages == ["prepare", "classifier", "features", "report", "register"]
    assert state.is_failed()
    assert "gan-0, gan-1" in str(state.message)
