"""One comparison at a time in a project's folder: they share params.yaml and the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.environment import STATE

LOCK = "comparison.lock"


@contextmanager
def alone(tell: Callable[[str], object] = print) -> Iterator[None]:
    """Inside, no other process is in such a block in this folder; waits for it, and tells so once.

    May be entered again inside. The system frees the lock of a process that was killed.
    """
    folder = Path(STATE).absolute()
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True, thread_local=False)
    holder = folder / f"{LOCK}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        by = f" (process {holder.read_text()})" if holder.exists() else ""
        tell(f"another comparison is at work in this folder{by}; waiting for its end")
        lock.acquire()
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()
