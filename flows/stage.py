"""One Prefect task that runs one DVC stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State

from flows.process import run_process
from tasks.runs import Run
from tasks.stage import FLOW_PID

REFUSED = "Refused"  # the state's name when the input is at fault, not the run
NOISE = (  # DVC's own remarks
    "Running stage",
    "> ",
    "Updating lock",
    "Generating lock",
    "To track",
    "To enable",
    "Use `dvc push`",
    "git add",
    "dvc config",
)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{stage}")
def run_stage(stage: str, environment: Mapping[str, str]) -> State[Any]:
    """`dvc repro` of one stage, its output streamed into the log line by line.

    A failed state has the stage's own error line as its message.
    """
    logger = get_run_logger()
    last, refused = "", False

    def on_line(text: str) -> None:
        nonlocal last, refused
        if text.startswith("ERROR: failed to reproduce") and "failed to run:" in text:
            refused = text.endswith("exited with 2")
        elif text and not text.lstrip().startswith(NOISE):
            last = text
            logger.info(text)

    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    status = run_process(command, {**environment, FLOW_PID: str(os.getpid())}, on_line)
    if status == 0:
        return Completed()
    name = REFUSED if refused else "Failed"
    return Failed(name=name, message=last or f"{stage}: exit status {status}")


def as_own(state: State[Any]) -> State[Any]:
    """A stage's failure as the flow's own: a state that is passed on loses its message."""
    return Failed(name=state.name, message=state.message)


def start_run(which: Run, environment: Mapping[str, str]) -> PrefectFuture[Any]:
    """Train, then evaluate; the future is of the last stage."""
    trained = run_stage.submit(f"train@{which.name}", environment)
    return run_stage.submit(  # type: ignore[call-overload]
        f"evaluate@{which.name}", environment, wait_for=[trained]
    )


def failed_chain(future: PrefectFuture[Any]) -> bool:
    """Wait for a run; whether any of its stages did not complete."""
    future.wait()
    return not future.state.is_completed()
