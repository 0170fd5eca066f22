"""Stages and workers in a process that has imported everything already.

Importing torch, MLflow and the rest takes each stage longer than most of them work. So a flow has
a process beside it that has imported it all once, and a stage's command, started by DVC as ever,
has a fork of that one do the work: with the command's arguments, folder, environment and output,
and with its exit status. The command waits, passes signals on, and is what DVC, the flow and the
watch over the parents see (`tasks.handover`). Without such a process, or where its code is not
what lies in the folder now, the command does the work itself. The workers of a Ray of our own are
such forks too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.handover import ROOT, SOCKET, WORKERS
from tasks.warm import fork, wait_on

PROGRAM = "from tasks.warm import serve; serve()"


@contextlib.contextmanager
def standing_by() -> Iterator[Callable[[bool], None]]:
    """A fork of this process that stages may use inside the block; the call has it get ready, for
    workers too where Ray will be our own.

    To be called before there are threads, locks or connections; quicker than `beside`, for what is
    loaded here is loaded there.
    """
    if sys.platform != "linux":  # elsewhere libraries do not survive a fork
        yield lambda workers: None
        return
    with _process(_forked) as get_ready:
        yield get_ready


@contextlib.contextmanager
def beside(workers: bool) -> Iterator[None]:
    """As `standing_by`, and ready, as a process of its own, which may start at any time.

    Within a block of `standing_by` it is that one's.
    """
    if sys.platform != "linux" or SOCKET in os.environ:
        yield
        return
    with _process(_spawned) as get_ready:
        get_ready(workers)
        yield


End = Callable[[], None]
Start = Callable[[socket.socket, int, int], End]


@contextlib.contextmanager
def _process(start: Start) -> Iterator[Callable[[bool], None]]:
    """One that listens, and both ends of the pipe by which it knows that this one lives."""
    folder = tempfile.mkdtemp(prefix="genarena-")  # for nobody else
    address = str(Path(folder, "stages"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wakes, alive = os.pipe()
    end = start(listener, wakes, alive)
    listener.close()
    os.close(wakes)

    def get_ready(workers: bool) -> None:
        os.environ[SOCKET] = address
        if workers:
            os.environ[WORKERS] = "1"
        with contextlib.suppress(OSError):  # it is gone: commands do their work themselves
            os.write(alive, b"!")

    try:
        yield get_ready
    finally:
        for name in (SOCKET, WORKERS):
            os.environ.pop(name, None)
        end()  # it holds nothing
        os.close(alive)
        shutil.rmtree(folder)


def _forked(listener: socket.socket, wakes: int, alive: int) -> End:
    if (process := fork()) == 0:
        os.close(alive)
        wait_on(listener, wakes)

    def end() -> None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    return end


def _spawned(listener: socket.socket, wakes: int, alive: int) -> End:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(listener.fileno()), str(wakes)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        pass_fds=(listener.fileno(), wakes),
        start_new_session=True,
    )

    def end() -> None:
        process.kill()
        process.wait()

    return end
