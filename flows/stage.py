"""One Prefect task that runs one DVC stage, in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.stage import FLOW_PID

GRACE_S = 120  # for a training to write its checkpoint
NOISE = (  # DVC's own remarks
    "Running stage",
    "> ",
    "Updating lock",
    "Generating lock",
    "To track",
    "To enable",
    "Use `dvc push`",
    "git add",
    "dvc config",
)
_running: set[subprocess.Popen[str]] = set()


class StageFailed(RuntimeError):
    """A stage ended with an error; the message is its last line."""


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{stage}")
def run_stage(
    stage: str, environment: Mapping[str, str], slots: threading.Semaphore | None = None
) -> None:
    """`dvc repro` of one stage, its output streamed into the log line by line.

    Raises StageFailed with the stage's own error line. `slots` bounds how many run at once.
    """
    with slots or threading.Semaphore():
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, FLOW_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        _running.add(process)
        try:
            reason = _stream(process, stage)
            if process.wait() != 0:
                raise StageFailed(reason or f"exit status {process.returncode}")
        finally:
            stop(process)
            _running.discard(process)


def _stream(process: subprocess.Popen[str], stage: str) -> str:
    """Log every line; returns the last one that is not DVC's own."""
    logger, last = get_run_logger(), ""
    assert process.stdout is not None
    for line in process.stdout:
        text = line.rstrip()
        if not text or text.lstrip().startswith(NOISE):
            continue
        if not text.startswith("ERROR: failed to reproduce"):
            last = text
        logger.info("%-18s %s", stage, text)
    return last


def stop(process: subprocess.Popen[str]) -> None:
    """End a stage's process group: SIGTERM, time to write a checkpoint, then SIGKILL."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stop_all() -> None:
    """End every stage that runs, side by side."""
    threads = [threading.Thread(target=stop, args=(process,)) for process in list(_running)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
