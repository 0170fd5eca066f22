"""DVC, asked: what has changed since the last run, what is to be fetched, kept and sent.

Imports nothing heavy: that there is nothing to do is found in a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tasks.errors import BadInput, Outage

LOCK = Path("dvc.lock")
BUSY_TRIES, BUSY_WAIT_S = 60, 2.0
Stages = dict[str, dict[str, Any]]


def changed(on_wait: Callable[[str], object] = print) -> list[str]:
    """The stages that DVC would run now, those that follow from them not counted.

    Everything that is not a stage (a `.dvc` file's data) is none of the pipeline's business.
    Raises BadInput where DVC cannot say.
    """
    for attempt in range(BUSY_TRIES):
        status = _dvc("--wait-for-lock", "status", "--json")
        if status.returncode == 0:
            break
        if "is busy" not in status.stderr or attempt == BUSY_TRIES - 1:
            raise BadInput(f"dvc status: {_last(status)}")
        if attempt == 0:
            on_wait("another run is at work in this project, or just ending; waiting")
        time.sleep(BUSY_WAIT_S)
    found = [name for name in json.loads(status.stdout) if not name.endswith(".dvc")]
    return found if found or LOCK.exists() else ["prepare"]


def stages() -> Stages:
    """Every stage as `dvc.lock` has it: command, dependencies, parameters, results."""
    if not LOCK.exists():
        return {}
    return dict(YAML(typ="safe", pure=True).load(LOCK.read_text()).get("stages", {}))


def reasons(before: Stages, after: Stages) -> dict[str, list[str]]:
    """Stage -> why it ran between the two readings of `dvc.lock`, as in `data/raw changed`."""
    told = {}
    for name, now in after.items():
        then = before.get(name)
        if then == now:
            continue
        if then is None:
            told[name] = ["it had not run before"]
            continue
        why = ["its command changed"] if then["cmd"] != now["cmd"] else []
        old, new = (_inputs(entry) for entry in (then, now))
        why += [f"{key} changed" for key in new if old.get(key, ...) != new[key]]
        told[name] = why or ["its result was missing or changed"]
    return told


def _inputs(entry: dict[str, Any]) -> dict[str, Any]:
    """Dependencies by path and parameters by name, each with what identifies its content."""
    inputs = {dep["path"]: dep.get("md5") or dep.get("etag") for dep in entry.get("deps", ())}
    for file, values in entry.get("params", {}).items():
        inputs |= {f"{file}: {key}": value for key, value in values.items()}
    return inputs


def has_remote() -> bool:
    """Whether a DVC remote is configured in this project."""
    return bool(_dvc("remote", "list").stdout.strip())


def pull(path: str) -> str:
    """Fetch the data at `path` where it is tracked by a `.dvc` file; what came of it, in words.

    Raises Outage where it cannot be had: what is here may be old.
    """
    if "://" in path or not (files := tracked(Path(path))):
        return f"{path} is not tracked by DVC: taken as it is"
    if not has_remote():
        return f"no DVC remote: {path} is taken as it is"
    return _moved(f"dvc pull {path}", _dvc("--wait-for-lock", "pull", *map(str, files)))


def tracked(path: Path) -> list[Path]:
    """The `.dvc` files that keep `path`: of itself, or of what lies in it."""
    own = path.with_name(f"{path.name}.dvc")
    return [own] if own.is_file() else sorted(path.glob("*.dvc"))


def push() -> str:
    """Send what the last run made to the remote, if there is one; what came of it, in words.

    Raises Outage where it does not get there.
    """
    if not has_remote():
        return "no DVC remote: nothing is pushed"
    return _moved("dvc push", _dvc("--wait-for-lock", "push"))


def _moved(what: str, done: subprocess.CompletedProcess[str]) -> str:
    told = f"{what}: {_last(done)}"
    if done.returncode:
        raise Outage(told)
    return told


def add(path: Path) -> Path:
    """Keep a folder with DVC; returns the `.dvc` file, which is for git. Raises BadInput."""
    done = _dvc("--wait-for-lock", "add", "--quiet", str(path))
    if done.returncode:
        raise BadInput(f"dvc add {path}: {_last(done)}")
    return path.with_name(f"{path.name}.dvc")


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The line that matters: the last one of what it said, or of its complaint."""
    said = done.stdout if done.returncode == 0 else done.stderr or done.stdout
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def _dvc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)
