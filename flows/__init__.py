"""Prefect flows: what runs when. The work itself is in `tasks`."""

import os
from pathlib import Path

from flows.database import prepare_home
from tasks.environment import prepare_environment

prepare_environment()
if "PREFECT_HOME" in os.environ:
    prepare_home(Path(os.environ["PREFECT_HOME"]))
