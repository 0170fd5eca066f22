"""The project as it was when a version was trained: its commit, its parameters, its data."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from genarena.show import console
from tasks import lineage
from tasks.errors import BadInput

STAGES = ("prepare", "classifier", "features")  # what a training and its evaluation read


def clone(commit: str, out: Path) -> Path:
    """This project's folder at `commit`, in a clone of its repository at `out`.

    A clone of that commit that is there already is taken again, its code restored. Raises
    BadInput where the commit is not in this repository, or `out` is something else.
    """
    top = _git(Path(), "rev-parse", "--show-toplevel")
    if top is None:
        raise BadInput("this folder is no git repository: there is no commit to go back to")
    if _git(Path(), "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise BadInput(
            f"commit {commit[:12]} is not in this repository; fetch it (git fetch --all), or use "
            "the clone it was made in"
        )
    prefix = _git(Path(), "rev-parse", "--show-prefix") or ""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        there = _git(out, "rev-parse", "HEAD") if (out / ".git").exists() else None
        if there != commit:
            raise BadInput(f"--out: {out} is not empty; remove it or name another folder")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        _must("git", "clone", "--quiet", "--no-checkout", "--", top, str(out))
    _must("git", "-C", str(out), "checkout", "--quiet", "--force", "--detach", commit)
    folder = out / prefix
    if not (folder / "dvc.yaml").exists() or not (folder / ".dvc").is_dir():
        raise BadInput(f"commit {commit[:12]} has no dvc.yaml and .dvc: nothing to run there")
    python = folder / ".venv"  # dvc.yaml runs its Python
    if not python.exists():
        python.symlink_to(sys.prefix)
    return folder


def set_params(folder: Path, changes: dict[str, Any]) -> None:
    """Set dotted keys in the clone's params.yaml; not checked here: its own code does that."""
    yaml = YAML()
    yaml.width = 4096
    file = folder / "params.yaml"
    document = yaml.load(file.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    text = io.StringIO()
    yaml.dump(document, text)
    file.write_text(text.getvalue())


def share_storage(folder: Path) -> bool:
    """Let the clone use this project's DVC cache and remotes; whether there is a remote."""
    from dvc.config import Config
    from dvc.repo import Repo

    with Repo() as here:
        cache, remotes = here.cache.local_cache_dir, dict(here.config["remote"])
        default = here.config["core"].get("remote")
    with Config(dvc_dir=str(folder / ".dvc")).edit("local") as config:
        config["cache"]["dir"] = str(Path(cache).absolute())
        for name, remote in remotes.items():
            config["remote"][name] = {**remote}
        if default:
            config["core"]["remote"] = default
    return bool(default)


def bring_data(folder: Path, environment: dict[str, str], source: str) -> None:
    """Prepared data, classifier and features by DVC's hashes: from the cache, else the remote,
    else made again from `source` and held against the hashes. Raises BadInput for other data."""
    recorded = lineage.hashes(folder / lineage.LOCK)
    remote = share_storage(folder)
    if set(recorded) == set(lineage.OUTS):
        if _dvc(folder, environment, "checkout", "--force", *STAGES):
            console.print("data: from the cache")
            return
        if remote and _dvc(folder, environment, "pull", "--force", *STAGES):
            console.print("data: from the remote")
            return
    console.print("data: neither in the cache nor in a remote; made again")
    set_params(folder, {"dataset.path": source})
    if not _dvc(folder, environment, "repro", *STAGES, shown=True):
        raise BadInput("the data could not be made again; its own words are above")
    for path, md5 in lineage.hashes(folder / lineage.LOCK).items():
        if recorded.get(path, md5) == md5:
            continue
        told = f"{path} made again is {md5}, the version's was {recorded[path]}"
        if path == lineage.OUTS[0]:
            raise BadInput(f"{told}: the source has other data now")
        console.print(f"warning: {told}: this machine computes it differently")


def bring_features(folder: Path, environment: dict[str, str]) -> None:
    """The features stage as the clone's parameters ask for it; nothing where it is the same."""
    if not _dvc(folder, environment, "repro", "--single-item", STAGES[-1], shown=True):
        raise BadInput("the features could not be made; the stage's own words are above")


def _dvc(folder: Path, environment: dict[str, str], *words: str, shown: bool = False) -> bool:
    command = [sys.executable, "-m", "dvc", *words]
    quiet = None if shown else subprocess.DEVNULL
    done = subprocess.run(command, cwd=folder, env=environment, stdout=quiet, stderr=quiet)
    return done.returncode == 0


def environment(folder: Path) -> dict[str, str]:
    """Of the clone's processes: its own code, and an MLflow database of its own."""
    dropped = ("GENARENA_PARENT_RUN", "GENARENA_FLOW_PID")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    own = {"PYTHONPATH": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return {**inherited, **own, "PYTHONUNBUFFERED": "1"}


def _must(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise BadInput(f"{' '.join(words[:2])}: {' '.join(done.stderr.split())[:300]}")


def _git(folder: Path, *words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
