"""The commit that made a result, and whether the code was that commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.provenance import git_state


def git(*words: str) -> str:
    names = ("-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run(
        ["git", *names, *words], check=True, capture_output=True, text=True
    ).stdout


def test_changed_code_is_told_and_what_runs_write_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    for name in ("code.py", "params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("a")
    git("add", "-A")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state() == commit
    for name in ("params.yaml", "dvc.lock", "untracked.txt"):
        (tmp_path / name).write_text("b")
    assert git_state() == commit
    (tmp_path / "code.py").write_text("b")
    assert git_state() == f"{commit} with changes"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_state() is None
    monkeypatch.setenv("PATH", "")
    assert git_state() is None
