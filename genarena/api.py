"""Prefect's temporary server, started before Prefect is imported.

Prefect starts one by itself where it has no address, but it imports the whole server into the
process that asks, then waits for the other. This one comes up while the rest is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from flows.database import prepare_home
from genarena.project import enter_project
from tasks.environment import prepare_environment
from tasks.errors import exit_on_bad_input
from tasks.workspace import alone

HOST = "127.0.0.1"
ADDRESS = "PREFECT_API_URL"
ENVIRONMENT = {  # as Prefect's own: no pages, and only the services that one run needs
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


class Server:
    """Of this process, or of others where `process` is None."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.process = process

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError where it does not come up."""
        if self.process is None:
            return
        patience = float(os.environ.get("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"))
        deadline = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urlopen(f"{os.environ[ADDRESS]}/health", timeout=10):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        status = self.process.poll()
        raise RuntimeError(f"Prefect's temporary server did not start (exit status {status})")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.drop()

    def drop(self) -> None:
        """Stop it at once: nobody has told it anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def start_early() -> Server | None:
    """In the project's folder, from which this process works from here on; none where another run
    is at work there, whose server this one is not to meet. Exits 2 outside of a project."""
    with exit_on_bad_input("genarena"):
        enter_project()
    prepare_environment()
    with alone(wait=False) as free:
        return start_server() if free else None


def start_server() -> Server:
    """A server until this process ends, its address in the environment.

    Where there is an address, or a profile that may hold one, nothing is started.
    """
    home = Path(os.environ.get("PREFECT_HOME", ""))
    if ADDRESS in os.environ or "PREFECT_PROFILE" in os.environ or not home.name:
        return Server(None)
    if (home / "profiles.toml").exists():
        return Server(None)
    prepare_home(home)
    port = _free_port()
    words = ("--factory", "prefect.server.api.server:create_app", "--lifespan", "on")
    listen = ("--host", HOST, "--port", str(port), "--log-level", "error")
    server = Server(
        subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *words, *listen],
            env={**os.environ, **ENVIRONMENT},
            preexec_fn=_until_it_listens,
        )
    )
    os.environ[ADDRESS] = f"http://{HOST}:{port}/api"
    os.environ["PREFECT_UI_URL"] = ""  # it has no pages to name in the log
    atexit.register(server.stop)  # before Prefect's own, so after it: its last lines get through
    return server


def _until_it_listens() -> None:
    """Ctrl-C reaches it too, and would be a traceback of its imports; later it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
