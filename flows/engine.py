"""Prefect's engine, with time to end: `python -m flows.engine`, the deployments' command.

A worker gives a cancelled run 30 seconds, and kills what is left of it; no setting makes it more.
It also signals the run's whole process group at once: a Ray that the flow started there would end
before the training has written its checkpoint. So the engine has a session of its own, gets the
signal alone, and takes the time it needs, which `flows/process.py` bounds.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from types import FrameType


def main() -> int:
    """Run the flow run that the worker has named in the environment; its exit status."""
    engine = subprocess.Popen([sys.executable, "-m", "prefect.engine"], start_new_session=True)
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not told:  # a second one would break off the ending
            told.append(number)
            engine.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's: it sends SIGTERM
    status = engine.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
