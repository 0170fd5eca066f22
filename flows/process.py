"""A stage's process group: started, read line by line, and ended with time for a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

GRACE_S = 120  # for a training to write its checkpoint
_running: set[subprocess.Popen[str]] = set()
_lock = threading.Lock()
_stopping = threading.Event()  # set: nothing new is started


def run_process(
    command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
) -> int:
    """Run `command` in a process group of its own; returns its exit status, -1 when stopping."""
    with _lock:
        if _stopping.is_set():
            return -1
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


def allow() -> None:
    """Let processes start again after `stop_all`."""
    _stopping.clear()


def stopping() -> bool:
    """Whether `stop_all` was called: what ends now was ended."""
    return _stopping.is_set()


def stop_all() -> None:
    """End every process group that runs, side by side, and start no more."""
    with _lock:
        _stopping.set()
    threads = [threading.Thread(target=_stop, args=(process,)) for process in list(_running)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the group, time to write a checkpoint, then SIGKILL.

    Waits for the whole group: its leader, DVC, dies at once, the training it runs does not.
    """
    deadline = time.monotonic() + GRACE_S
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # takes the dead leader out of the group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
