"""`genarena doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console

PACKAGES = ("torch", "torchvision", "ray", "prefect", "mlflow", "dvc", "pandas", "fastapi")
ROOM_GB = 8


def report() -> int:
    """Print the findings; returns 0 when nothing is missing, else 1."""
    findings = [_python(), *map(_package, PACKAGES), _git(), _cores(), _gpu(), _precision()]
    findings += [_disk(), _inception(), _mlflow_server(), _prefect_server(), _ray()]
    console = Console(highlight=False)
    for good, text in findings:
        console.print(f"[green]ok[/]       {text}" if good else f"[red]missing[/]  {text}")
    return 0 if all(good for good, _ in findings) else 1


Finding = tuple[bool, str]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= (3, 11), f"Python {version} (3.11 or newer)"


def _package(name: str) -> Finding:
    try:
        return True, f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return False, f"{name}: make install"


def _git() -> Finding:
    return shutil.which("git") is not None, "git (DVC versions data beside it)"


def _cores() -> Finding:
    return True, f"{os.cpu_count()} CPU cores"


def _gpu() -> Finding:
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    return True, f"{count} GPU(s): {names}" if count else "no GPU: training runs on the CPU"


def _precision() -> Finding:
    import torch

    from tasks.training.optim import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return True, f"precision 'auto' is {resolve_precision('auto', device)} here"


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return free > ROOM_GB, f"{free:.0f} GB of disk free here ({ROOM_GB} wanted)"


def _inception() -> Finding:
    from tasks.evaluation.extractors import inception_cache

    if inception_cache().is_file():
        return True, f"inception-v3 features: {inception_cache()}"
    how = "evaluation.inception_weights, or python -m tasks.features --download-inception"
    return True, f"inception-v3 features: {how} (optional)"


def _mlflow_server() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return _server("MLflow", uri, "/health", "runs are kept in mlflow.db; make ui shows them")


def _prefect_server() -> Finding:
    uri = os.environ.get("PREFECT_API_URL")
    return _server("Prefect", uri, "/health", "a temporary server for each run; make ui shows them")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    return True, f"Ray: {address}" if address else "Ray: no RAY_ADDRESS; a local one for each run"


def _server(name: str, uri: str | None, path: str, without: str) -> Finding:
    if not uri:
        return True, f"{name}: no server set; {without}"
    if not uri.startswith("http"):
        return True, f"{name}: {uri}"
    try:
        with urlopen(uri.rstrip("/") + path, timeout=5) as answer:
            return answer.status == 200, f"{name} server at {uri}"
    except (URLError, OSError) as error:
        return False, f"{name} server at {uri} does not answer ({error}); start it or unset it"
