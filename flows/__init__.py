"""Prefect flows: what runs when. The work itself is in `tasks`."""

import os
from pathlib import Path

from tasks.environment import prepare_environment

prepare_environment()
if "PREFECT_HOME" in os.environ:  # Prefect makes its database there, but not the folder
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
