"""A stage's process group: started, read line by line, and ended with time for a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

GRACE_S = 120  # for a training to write its checkpoint
_running: set[subprocess.Popen[str]] = set()


def run_process(
    command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
) -> int:
    """Run `command` in a process group of its own; returns its exit status."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _running.add(process)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip())
        return process.wait()
    finally:
        _stop(process)
        _running.discard(process)


def stop_all() -> None:
    """End every process group that runs, side by side."""
    threads = [threading.Thread(target=_stop, args=(process,)) for process in list(_running)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, time to write a checkpoint, then SIGKILL."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
