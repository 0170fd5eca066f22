"""`genarena ui`: the MLflow UI and the Prefect UI, on localhost, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from flows.database import prepare_home
from genarena.project import enter_project
from tasks import tracking
from tasks.environment import STATE, prepare_environment
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import load_params

HOST = "127.0.0.1"
START_S = 120


def serve(mlflow_port: int, prefect_port: int) -> None:
    """Start both servers, print their addresses, and end them together."""
    console = Console(highlight=False)
    with exit_on_bad_input("genarena"):
        enter_project()
        prepare_environment()
        prepare_home(Path(os.environ.get("PREFECT_HOME", STATE)))
        store = tracking.tracking_uri(load_params())
        commands = {
            "Prefect": (prefect_port, ["prefect", "server", "start", "--host", HOST, "--port"]),
        }
        if store.startswith("http"):
            console.print(f"MLflow:  {store} (a server of its own)")
        else:
            mlflow = ["mlflow", "server", "--backend-store-uri", store, "--host", HOST, "--port"]
            commands["MLflow"] = (mlflow_port, mlflow)
        for name, (port, _) in commands.items():
            if _answers(port):
                raise BadInput(f"{name}: port {port} is taken; choose another (genarena ui --help)")
    processes = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for port, command in commands.values():
            processes.append(_start([*command, str(port)]))
        console.print("starting; this can take a minute")
        for name, (port, _) in commands.items():
            _wait(name, port, processes)
            console.print(f"{name + ':':8} http://{HOST}:{port}")
        console.print("Ctrl-C ends both.")
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the server; one that is still starting may not listen to SIGTERM."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait(name: str, port: int, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(port):
        if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
            raise SystemExit(f"genarena: {name} did not start; try: {name.lower()} server --help")
        time.sleep(0.2)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
