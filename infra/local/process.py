"""A server as a process: started, waited for, stopped, started again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

HOST = "127.0.0.1"
START_S, STOP_S = 180, 20
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_given: set[int] = set()


class Server:
    """One server. `ready` says whether it answers; `words` what its log has by then.

    Started from a thread that ends, it would end with it: on Linux the kernel sends `stop_with`
    to the process as soon as the thread that started it is gone, however that came.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        ready: Callable[[], bool] | None = None,
        words: str | None = None,
        user: str | None = None,
        stop_with: signal.Signals = signal.SIGTERM,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.command, self.environment = name, list(command), dict(environment)
        self.log = folder / f"{name}.log"
        self.ready, self.words, self.user, self.stop_with = ready, words, user, stop_with
        self.cwd = cwd
        self.process: subprocess.Popen[bytes] | None = None
        self._from = 0

    def start(self) -> None:
        """Start the process; what an earlier one wrote stays in the log."""
        assert not self.running(), self.name
        with self.log.open("ab") as log:
            self._from = log.tell()
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                user=self.user,
                group=self.user and _group(self.user),
                extra_groups=[] if self.user else None,
                start_new_session=True,  # Ctrl-C is for us; each is told by `stop`
                preexec_fn=self._end_with_parent,
            )

    def _end_with_parent(self) -> None:
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, int(self.stop_with))

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self) -> None:
        """Until it answers; RuntimeError with the end of its log when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            if not self.running() or time.monotonic() > deadline:
                tail = "\n".join(self.written().splitlines()[-20:])
                how = "is not ready" if self.running() else "ended"
                raise RuntimeError(f"{self.name} {how}; the end of {self.log}:\n{tail}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        if self.words is not None and self.words not in self.written():
            return False
        return self.ready is None or self.ready()

    def written(self) -> str:
        """What the running process has written so far."""
        with self.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def tell(self) -> None:
        """Ask it to stop, and do not wait."""
        if self.running():
            assert self.process is not None
            self.process.send_signal(self.stop_with)

    def stop(self) -> None:
        """End it and all below it, by force what has not ended after some seconds."""
        if self.process is None:
            return
        family = self.family()
        self.tell()
        _, alive = psutil.wait_procs(family, timeout=STOP_S)
        self._kill(alive)

    def kill(self) -> None:
        """End it and all below it at once, as when its machine is lost."""
        self._kill(self.family())

    def _kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.process is not None
        self.process.wait()


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def stop_all(servers: Sequence[Server]) -> None:
    """Tell every one first, then wait for each."""
    families = [p for server in servers if server.process for p in server.family()]
    for server in servers:
        server.tell()
    _, alive = psutil.wait_procs(families, timeout=STOP_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for server in servers:
        if server.process is not None:
            server.process.wait()


def http_ok(url: str) -> Callable[[], bool]:
    """Whether a GET of the address is answered with 200."""

    def probe() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    return probe


def free_port(wanted: int, host: str = HOST) -> int:
    """`wanted` where it is free, else another; never the same twice."""
    for port in (wanted, *[0] * 20):
        with socket.socket() as probe:
            # as servers do: what an earlier one has just left is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((host, port))
                found = int(probe.getsockname()[1])
                if found not in _given:
                    _given.add(found)
                    return found
    raise RuntimeError("no free port on this machine")


def find_program(name: str) -> str | None:
    """Path of a program of PostgreSQL, on PATH or where Debian puts it."""
    import shutil

    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(newest[0]) if newest else None)


def plain_environment(*more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what belongs to some server's client, and `more`."""
    dropped = ("RAY_", "PREFECT_", "MLFLOW_", "AWS_", "PG")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    for addition in more:
        inherited.update(addition)
    return inherited
