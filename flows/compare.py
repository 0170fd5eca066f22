"""The main job.

prepare -> classifier -> features -> (train -> evaluate) x families x seeds -> report -> register
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pandas as pd
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.process import allow, stop_all
from flows.stage import REFUSED, as_own, failed_chain, run_stage, start_run
from tasks import tracking
from tasks.cluster import connected, families_at_once
from tasks.errors import BadInput
from tasks.params import Params, load_params, override_params
from tasks.runs import runs


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=64))  # type: ignore[arg-type]
def compare(overrides: dict[str, Any] | None = None) -> State[Any]:
    """Train, evaluate, rank and register every family in `params.yaml`.

    `overrides` are dotted keys to set in `params.yaml` first. One family's failure leaves the
    others to finish; the flow fails at its end, and the leaderboard says why.
    """
    allow()
    try:
        override_params(overrides or {})
        params = load_params()
        with connected(params.cluster) as address:
            try:
                return _run(params, address)
            finally:
                stop_all()  # before Ray goes, so that trainings can write their checkpoints
    except BadInput as error:
        return Failed(name=REFUSED, message=str(error))


def _run(params: Params, address: str) -> State[Any]:
    environment = {"RAY_ADDRESS": address}
    parent = tracking.tolerant("starting the run", lambda: tracking.start_parent(params))
    if parent:
        environment[tracking.PARENT] = parent
    failed = True
    try:
        state = _stages(params, environment)
        failed = state.is_failed()
        return state
    finally:
        if parent:
            end = partial(tracking.end_parent, params, parent, failed=failed)
            tracking.tolerant("ending the run", end)


def _stages(params: Params, environment: dict[str, str]) -> State[Any]:
    slots = threading.Semaphore(families_at_once(params.cluster))
    for stage in ("prepare", "classifier", "features"):
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
    asked = runs(params.families, params.seeds)
    chains = []
    for which in asked:  # a run has its place until it is measured: results come one by one
        slots.acquire()
        chains.append(start_run(which, environment))
        chains[-1].add_done_callback(lambda _: slots.release())
    failed = [run.name for run, last in zip(asked, chains, strict=True) if failed_chain(last)]
    for stage in ("report", "register")[: 1 if len(failed) == len(chains) else 2]:
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
    table = pd.read_csv("reports/leaderboard.csv").astype(object)
    rows: list[Any] = table.where(table.notna(), None).to_dict("records")
    create_table_artifact(key="leaderboard", table=rows, description=params.dataset.title)
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}; the leaderboard says why")
    return Completed()
