"""One run at a time in a project's folder: runs share params.yaml, dvc.lock and the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.environment import STATE

LOCK = "run.lock"


@contextmanager
def alone(tell: Callable[[str], object] = print, *, wait: bool = True) -> Iterator[bool]:
    """Inside, no other process is in such a block in this folder.

    While one is: tell so and wait, or, without `wait`, yield False at once. May be entered again
    inside. The system frees the lock of a process that dies, however it dies.
    """
    folder = Path(STATE).absolute()
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True, thread_local=False)
    holder = folder / f"{LOCK}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        by = f" (process {holder.read_text()})" if holder.exists() else ""
        tell(f"another run is at work in this folder{by}; waiting for its end")
        lock.acquire(poll_interval=0.5)
    try:
        holder.write_text(str(os.getpid()))
        yield True
    finally:
        lock.release()
