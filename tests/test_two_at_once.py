"""Two comparisons in one workspace: both end well, and what they leave is one state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]


def test_two_comparisons_in_one_workspace(tmp_path: Path) -> None:
    path = projects.make_project(tmp_path / "project", {"evaluation.usefulness.steps": 1})
    words = [sys.executable, "-m", "genarena", "run", "--families", "naive_bayes"]
    both = [
        subprocess.Popen(
            words,
            cwd=path,
            env=projects.environment(path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    logs = [process.communicate()[0] for process in both]
    for process, log in zip(both, logs, strict=True):
        assert process.returncode == 0, "\n\n".join(logs)
        assert "Leaderboard: digits" in log
    assert sum("of training" in log for log in logs) == 1, logs  # the other found it done
    assert json.loads(projects.dvc(path, "status", "--json").stdout) == {}
