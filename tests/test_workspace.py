"""One comparison at a time: the next waits, says for whom, and a kill frees the place."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tasks.workspace import alone

HOLD = """
import sys
from tasks.workspace import alone
with alone():
    with alone():  # as the command and the flow inside it
        pass
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_the_second_waits_until_the_first_is_gone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "inside\n"
    told: list[str] = []
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        with alone(lambda line: (told.append(line), waiting.set())):
            entered.set()

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    assert waiting.wait(60)
    assert not entered.wait(0.5)
    with alone(told.append, wait=False) as free:
        assert not free
    assert told == [
        f"another run is at work in this folder (process {first.pid}); waiting for its end"
    ]
    first.kill()
    first.wait()
    assert entered.wait(60)
    thread.join(60)
