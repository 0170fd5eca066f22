"""A command's work, handed to the process that stands by (`tasks.warm`).

Also a program, `handover.py script ...`: what Ray starts in place of Python for its workers.
Imports nothing but the standard library, for this is all that such a command needs.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "GENARENA_WARM"  # where the process listens
WORKERS = "GENARENA_WARM_WORKERS"  # set where it is for Ray's workers too
COMMAND = "GENARENA_COMMAND_PID"  # of the command that a fork works for
STAGES = ("prepare", "classifier", "features", "train", "evaluate", "report", "register")
MODULES = tuple(f"tasks.{stage}" for stage in STAGES)
PASSED = (signal.SIGINT, signal.SIGTERM)
ROOT = Path(__file__).resolve().parents[1]
REFUSED = "refused"


def hand_over(words: list[str]) -> None:
    """Have `python -m <module> ...`, or `python <script>.py ...`, done by the process that stands
    by, and end as it ends.

    Returns where there is none, or where it refuses.
    """
    request: dict[str, Any] = {"words": words, "cwd": str(Path.cwd()), "pid": os.getpid()}
    request |= {"environment": dict(os.environ), "root": str(ROOT)}
    request["python"] = os.path.realpath(sys.prefix)
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(os.environ[SOCKET])
            socket.send_fds(line, [b"!"], [0, 1, 2])
            line.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            return
        before = {
            number: signal.signal(number, lambda n, _: line.sendall(f"{n}\n".encode()))
            for number in PASSED
        }
        answer = line.makefile().readline().strip()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not answer:
        raise SystemExit("the process that did the work is gone" if words[0] in MODULES else 1)
    if answer != REFUSED:
        _end(int(answer))


def _end(status: int) -> NoReturn:
    """As `status`, of the subprocess module: negative where a signal ended it."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def ray_python() -> str:
    """What Ray is to call for its workers instead of Python."""
    return shlex.join([sys.executable, "-P", str(Path(__file__).resolve())])


if __name__ == "__main__":
    if SOCKET in os.environ:
        hand_over(sys.argv[1:])
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
