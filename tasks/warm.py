"""The process of which stages and Ray's workers are forks (`tasks.standby`)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tasks.environment import prepare_environment
from tasks.handover import COMMAND, MODULES, PASSED, REFUSED, ROOT

GRACE_S = 120.0  # for the work of a command that was killed, to write its checkpoint
Stamps = dict[str, tuple[int, int]]  # file -> time and size


def fork() -> int:
    with warnings.catch_warnings():  # the threads are those of BLAS, which are made for it
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def serve() -> NoReturn:
    """In a process that was started for it; its arguments: the listener, and the pipe's end."""
    prepare_environment()  # libraries read some of it when they are loaded
    listener, wakes = map(int, sys.argv[1:])
    wait_on(socket.socket(fileno=listener), wakes)


def wait_on(listener: socket.socket, wakes: int) -> NoReturn:
    """Until the process that started this one is gone: load when told, then work."""
    import atexit

    atexit._clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the flow, which tells the stages
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not os.read(wakes, 1):
        os._exit(0)
    loaded = None
    with contextlib.suppress(Exception, SystemExit):  # a command that does it itself will say so
        loaded = _load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend
    while True:
        ready, _, _ = select.select([listener.fileno(), wakes], [], [])
        if wakes in ready:
            os._exit(0)
        line, _ = listener.accept()
        if fork() == 0:
            listener.close()
            _attend(line, loaded)
        line.close()


def _load() -> Stamps:
    """Import what stages and workers import, except Ray, which reads its token then, and which job
    it works for; returns `_stamps`."""
    import importlib

    with contextlib.suppress(ImportError):  # the stage that needs it will say so
        for name in ("mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store"):
            importlib.import_module(name)
    for name in MODULES:
        importlib.import_module(name)
    stamps = _stamps()
    for name in MODULES:  # to be run, not imported
        del sys.modules[name]
    return stamps


def _stamps() -> Stamps:
    """Of this project's modules that are loaded."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    found = {}
    for file in filter(None, files):
        path = Path(file)
        if path.suffix == ".py" and ROOT in path.parents and ".venv" not in path.parts:
            found[file] = _stamp(path)
    return found


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def _attend(line: socket.socket, loaded: Stamps | None) -> NoReturn:
    """One command's work, in a fork of its own; what the command is told, and what it tells."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, *_ = socket.recv_fds(line, 1, 3)
    told = line.makefile()
    request = json.loads(told.readline())
    same = request["root"] == str(ROOT) and request["python"] == os.path.realpath(sys.prefix)
    if not same or _changed(loaded):
        line.sendall(f"{REFUSED}\n".encode())
        os._exit(0)
    work = fork()
    if work == 0:
        line.close()
        _work(request, descriptors)
    for descriptor in (*descriptors, 0, 1, 2):  # whoever reads them waits for their end
        os.close(descriptor)
    threading.Thread(target=_pass_on, args=(told, work), daemon=True).start()
    _, status = os.waitpid(work, 0)
    with contextlib.suppress(OSError):  # the command is gone
        line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _changed(loaded: Stamps | None) -> bool:
    """Whether this process has other code than the folder has now, and DVC has read."""
    if loaded is None:
        return True
    try:
        return any(_stamp(Path(file)) != stamp for file, stamp in loaded.items())
    except OSError:
        return True


def _pass_on(told: TextIO, work: int) -> None:
    """The command's signals; where the command is gone, SIGTERM, and later SIGKILL."""
    for number in told:
        os.kill(work, int(number))
    os.kill(work, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(work, signal.SIGKILL)


def _work(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Be the command."""
    import atexit
    import runpy
    import traceback

    for number in PASSED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"], **{COMMAND: str(request["pid"])})
    code, *sys.argv[1:] = request["words"]
    sys.path[0] = request["cwd"]
    status: Any = 0
    try:
        if code.endswith(".py"):
            sys.argv[0] = code
            runpy.run_path(code, run_name="__main__")
        else:
            runpy.run_module(code, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
        status = status if isinstance(status, int) else int(status is not None)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter's own end
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status & 255)
