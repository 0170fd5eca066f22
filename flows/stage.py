"""One Prefect task that runs one DVC stage."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows.process import run_process, stopping
from tasks.environment import FLOW_PID
from tasks.errors import AWAY

REFUSED = "Refused"  # the state's name when the input is at fault, not the run
OUTAGE = "Outage"  # when a node or the registry was away: tried again
ENDINGS = {"2": REFUSED, str(AWAY): OUTAGE}  # by the exit status of a stage's command
NOISE = re.compile(  # DVC's own remarks, and Ray's each second where the head has no dashboard
    r"\s*(Running stage|> |Updating lock|Generating lock|To track|To enable|Use `dvc push`"
    r"|git add|dvc config|.*Failed to query Ray Train Controller actor state)"
)
RAY_PREFIX = re.compile(r"^\([\w.<>:-]+ pid=\d+(?:, ip=(?P<ip>[^)\s]+))?\)\s?")


def worth_another(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a failed stage is run again: after an outage, and not while the flow ends."""
    return state.name == OUTAGE and not stopping()


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    task_run_name="{stage}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_another,
)
def run_stage(
    stage: str, environment: Mapping[str, str], command: tuple[str, ...] = ()
) -> State[Any]:
    """`dvc repro` of one stage, its output streamed into the log line by line.

    A failed state has the stage's own error line as its message. With `command`, that module and
    its arguments instead, for what is no stage of the pipeline.
    """
    logger = get_run_logger()
    last, name = "", "Failed"

    def on_line(text: str) -> None:
        nonlocal last, name
        if text.startswith("ERROR: failed to reproduce") and "failed to run:" in text:
            name = ENDINGS.get(text.rpartition("exited with ")[2], name)
        elif text and not NOISE.match(text):
            last = plain(text)
            logger.info(last)

    words = command or ("dvc", "--wait-for-lock", "repro", "--single-item", stage)
    ours = {**environment, FLOW_PID: str(os.getpid())}
    status = run_process([sys.executable, "-m", *words], ours, on_line)
    if status == 0:
        return Completed()
    name = ENDINGS.get(str(status), name) if command else name
    return Failed(name=name, message=last or f"{stage}: exit status {status}")


def plain(line: str) -> str:
    """Without the name that Ray puts before a worker's line; another node's address stays."""
    return RAY_PREFIX.sub(lambda m: f"[{m['ip']}] " if m["ip"] else "", line)


def as_own(state: State[Any]) -> State[Any]:
    """A stage's failure as the flow's own: a state that is passed on loses its message."""
    return Failed(name=state.name, message=state.message)
