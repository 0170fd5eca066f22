"""The project's folder. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.errors import BadInput


def enter_project() -> None:
    """Work in the project's folder: this one or one above it that holds dvc.yaml."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "dvc.yaml").exists() and (folder / "params.yaml").exists():
            os.chdir(folder)
            return
    raise BadInput("no dvc.yaml and params.yaml here or above; run this in the project's folder")
