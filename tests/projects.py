"""A project of its own for tests that run real stages: the real code, small settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tasks.params import override_params

ROOT = Path(__file__).resolve().parents[1]
CODE = ("flows", "genarena", "models", "tasks", "dvc.yaml", "params.yaml", "prefect.yaml")
SMALL = {
    "train.budget": {"steps": 20},
    "train.batch_size": 16,
    "train.log_every": 5,
    "train.validate_every": 10,
    "train.checkpoint_every": 5,
    "train.validation_images": 32,
    "train.validation_samples": 32,
    "classifier.epochs": 2,
    "evaluation.samples": 100,
    "evaluation.likelihood_examples": 16,
    "evaluation.likelihood_draws": {"exact": 2, "bound": 2, "ode": 1, "ais": 1},
    "evaluation.anomaly_images": 16,
    "evaluation.ais": {"images": 4, "chains": 1, "steps": 4, "leapfrog": 2},
    "evaluation.reconstruction_images": 8,
    "evaluation.usefulness": {"samples": 50, "steps": 3, "batch_size": 16, "per_class": 2},
    "models.dcgan.inversion_steps": 5,
}


def make_project(path: Path, changes: dict[str, object]) -> Path:
    """A git and DVC repository at `path` with the project's code and small parameters."""
    path.mkdir(parents=True)
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, path / name)
    for folder in ("metrics", "artifacts/train", "artifacts/evaluate", "data/raw", "reports"):
        (path / folder).mkdir(parents=True)
        (path / folder / ".gitkeep").touch()
    shutil.copy(ROOT / ".gitignore", path)
    (path / ".venv").symlink_to(sys.prefix)
    command(path, "git", "init", "-q")
    command(
        path,
        "git",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "commit",
        "-qm",
        "x",
        "--allow-empty",
    )
    command(path, sys.executable, "-m", "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvcignore", path)
    override_params({**SMALL, **changes}, path / "params.yaml")
    return path


def environment(path: Path) -> dict[str, str]:
    """Environment of a command in the project: its own code, its own state, no servers."""
    dropped = ("RAY_", "PREFECT_", "PYTHONDONTWRITEBYTECODE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**inherited, "PYTHONPATH": str(path), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def command(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project; its output in the error when it fails."""
    done = run(path, *words)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=path, env=environment(path), capture_output=True, text=True, timeout=1200
    )


def stage(path: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m tasks.<name>` in the project."""
    return command(path, sys.executable, "-m", f"tasks.{name}", *words)


def genarena(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The console command in the project."""
    return run(path, sys.executable, "-m", "genarena", *words)


def dvc(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return command(path, sys.executable, "-m", "dvc", *words)
