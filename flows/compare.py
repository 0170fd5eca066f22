"""The main job.

prepare -> classifier -> features -> (train -> evaluate) x families x seeds -> report -> register
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts
from flows.chains import measure
from flows.parameters import CompareSettings
from flows.process import allow, stop_all
from flows.stage import REFUSED, as_own, run_stage
from tasks import jobs, tracking
from tasks.errors import BadInput, Outage
from tasks.params import Params, load_params, override_params
from tasks.runs import runs
from tasks.workspace import alone


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=64))  # type: ignore[arg-type]
def compare(settings: CompareSettings = CompareSettings()) -> State[Any]:  # noqa: B008
    """Train, evaluate, rank and register every family in `params.yaml`, changed by `settings`.

    One family's failure leaves the others to finish; the flow fails at its end, and the
    leaderboard says why.
    """
    try:
        with alone(get_run_logger().info):
            override_params(settings.changes())
            return run_all()
    except BadInput as error:
        return Failed(name=REFUSED, message=str(error))
    except Outage as error:
        return Failed(message=str(error))


def run_all() -> State[Any]:
    """Every stage that has to run, on Ray, in this flow run; the caller holds the project."""
    allow()
    params = load_params()
    with jobs.for_stages(params.cluster) as (address, places):
        environment, failed = {"RAY_ADDRESS": address}, True
        parent = tracking.tolerant("starting the run", lambda: tracking.start_parent(params))
        if parent:
            environment[tracking.PARENT] = parent
            tracking.tolerant("naming the run", lambda: artifacts.show_run(params, parent))
        try:
            state = _stages(params, environment, places)
            failed = state.is_failed()
            return state
        finally:
            stop_all()  # before Ray goes, so that trainings can write their checkpoints
            if parent:
                end = partial(tracking.end_parent, params, parent, failed=failed)
                tracking.tolerant("ending the run", end)


def _stages(params: Params, environment: dict[str, str], places: int) -> State[Any]:
    asked = runs(params.families, params.seeds)
    progress = artifacts.Progress(5 + 2 * len(asked))
    for stage in ("prepare", "classifier", "features"):
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
        progress.step()
    failed = measure(asked, environment, places, progress.step)
    for stage in ("report", "register")[: 1 if len(failed) == len(asked) else 2]:
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
        progress.step()
    artifacts.show_leaderboard(params)
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}; the leaderboard says why")
    return Completed()
