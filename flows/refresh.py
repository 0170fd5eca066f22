"""The nightly job: fetch data, run again what has changed, promote what is better.

Where nothing has changed it ends in seconds, so nothing heavy is imported before that is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from ruamel.yaml import YAML

from tasks import dvc
from tasks.errors import BadInput, Outage
from tasks.workspace import alone

NOTHING = "NothingToDo"  # the name of the completed state in which nothing had to run


@flow(name="refresh", task_runner=ThreadPoolTaskRunner(max_workers=64))  # type: ignore[arg-type]
def refresh(pull: bool = True, push: bool = True) -> State[Any]:
    """Run again what has changed since the last run: data, code, or `params.yaml`.

    The registry's gate makes a new version `champion` only where it is better.

    Args:
        pull: First fetch the raw data from the DVC remote, if there is one.
        push: Afterwards send data and models to the DVC remote, if there is one.
    """
    logger = get_run_logger()
    with alone(wait=False) as free:
        if not free:
            return Cancelled(message="another run is at work in this project")
        try:
            if pull:
                logger.info(dvc.pull(_data_path()))
            if not dvc.changed(logger.info):
                return Completed(name=NOTHING, message="nothing to do")
            before = dvc.stages()
            state = _run()
        except BadInput as error:
            return Failed(name="Refused", message=str(error))
        except Outage as error:
            return Failed(message=str(error))
        logger.info(_show(before))
        try:
            if push:
                logger.info(dvc.push())
        except Outage as error:
            logger.error(str(error))
            return state if state.is_failed() else Failed(message=f"{error}; what ran is kept here")
        return state


def _run() -> State[Any]:
    from flows.compare import run_all

    return run_all()


def _show(before: dvc.Stages) -> str:
    from flows.artifacts import show_refreshed

    return show_refreshed(before, dvc.stages())


def _data_path() -> str:
    """`dataset.path` as it stands; whether the file is valid is asked where something runs."""
    file = Path("params.yaml")
    if not file.exists():
        raise BadInput(f"no params.yaml in {file.absolute().parent}; set GENARENA_HOME")
    content = YAML(typ="safe", pure=True).load(file.read_text())
    return str((content.get("dataset") or {}).get("path") or "data/raw")
