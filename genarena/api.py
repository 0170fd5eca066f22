"""Prefect's temporary server, started before Prefect is imported.

Prefect starts one by itself where it has no address, but it imports the whole server into the
process that asks, then waits for the other. This one comes up while the flow is imported.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HOST = "127.0.0.1"
ADDRESS = "PREFECT_API_URL"
ENVIRONMENT = {  # as Prefect's own: no pages, and only the services that one run needs
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


def start_server() -> Callable[[], None]:
    """A server until this process ends, its address in the environment; the call waits until it
    answers.

    Where there is an address, or a profile that may hold one, nothing is started.
    """
    home = Path(os.environ.get("PREFECT_HOME", ""))
    if ADDRESS in os.environ or "PREFECT_PROFILE" in os.environ or not home.name:
        return lambda: None
    if (home / "profiles.toml").exists():
        return lambda: None
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    words = ("--factory", "prefect.server.api.server:create_app", "--lifespan", "on")
    listen = ("--host", HOST, "--port", str(port), "--log-level", "error")
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *words, *listen], env={**os.environ, **ENVIRONMENT}
    )
    os.environ[ADDRESS] = f"http://{HOST}:{port}/api"
    os.environ["PREFECT_UI_URL"] = ""  # it has no pages to name in the log
    atexit.register(_stop, server)  # before Prefect's own, so after it: its last lines get through
    return lambda: _wait(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen[bytes]) -> None:
    """Raises RuntimeError where it does not come up."""
    patience = float(os.environ.get("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"))
    deadline = time.monotonic() + patience
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{os.environ[ADDRESS]}/health", timeout=10):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Prefect's temporary server did not start (exit status {server.poll()})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
