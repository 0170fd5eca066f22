"""One run at a time in one project, whoever starts it: a deployment, a command, a person."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.environment import STATE

LOOK_S = 2.0


@contextmanager
def alone(*, wait: bool = True) -> Iterator[bool]:
    """Holds the project's lock for the length of the block.

    While another process has it: wait, or, without `wait`, yield False at once. A process that
    dies lets go of it, however it dies.
    """
    file = Path(STATE, "flow.lock")
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as lock:
        held = _take(lock.fileno())
        if wait and not held:
            print("another run is at work in this project; waiting", flush=True)
        while wait and not held:
            time.sleep(LOOK_S)
            held = _take(lock.fileno())
        yield held


def _take(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
