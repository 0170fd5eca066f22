"""What DVC's lock file tells of two runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tasks import dvc
from tasks.errors import Outage


def entry(md5: str, seed: int = 0) -> dict[str, Any]:
    return {
        "cmd": "python -m tasks.prepare",
        "deps": [{"path": "data/raw", "md5": md5}, {"path": "tasks/data", "md5": "c"}],
        "params": {"params.yaml": {"dataset": {"seed": seed}}},
        "outs": [{"path": "data/prepared", "md5": md5 * 2}],
    }


def test_why_a_stage_ran() -> None:
    before = {"prepare": entry("a")}
    assert dvc.reasons(before, before) == {}
    assert dvc.reasons({}, before) == {"prepare": ["it had not run before"]}
    assert dvc.reasons(before, {"prepare": entry("b")}) == {"prepare": ["data/raw changed"]}
    params = dvc.reasons(before, {"prepare": entry("a", seed=1)})
    assert params == {"prepare": ["params.yaml: dataset changed"]}
    lost = {"prepare": {**entry("a"), "outs": []}}
    assert dvc.reasons(before, lost) == {"prepare": ["its result was missing or changed"]}


def test_raw_data_is_fetched_only_where_dvc_tracks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, ...]] = []
    remote = ""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        said = remote if words[:2] == ("remote", "list") else "1 file fetched\n"
        return subprocess.CompletedProcess(words, 0, said, "")

    monkeypatch.setattr(dvc, "_dvc", run)
    assert dvc.pull("s3://bucket/raw") == "s3://bucket/raw is not tracked by DVC: taken as it is"
    assert "not tracked" in dvc.pull("data/raw")
    assert asked == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw.dvc").touch()
    assert dvc.pull("data/raw") == "no DVC remote: data/raw is taken as it is"
    remote = "store /somewhere\n"
    assert dvc.pull("data/raw") == "dvc pull data/raw: 1 file fetched"
    assert asked[-1] == ("--wait-for-lock", "pull", "data/raw.dvc")


def test_what_does_not_arrive_is_an_outage_and_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.dvc").touch()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        listed = words[:2] == ("remote", "list")
        said, complaint = ("store x\n", "") if listed else ("", "ERROR: no route to the store\n")
        return subprocess.CompletedProcess(words, 0 if listed else 1, said, complaint)

    monkeypatch.setattr(dvc, "_dvc", run)
    with pytest.raises(Outage, match="dvc pull raw: ERROR: no route to the store"):
        dvc.pull("raw")
    with pytest.raises(Outage, match="dvc push: ERROR: no route to the store"):
        dvc.push()
