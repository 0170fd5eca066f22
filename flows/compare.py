"""The main job.

prepare -> classifier -> features -> (train -> evaluate) x families x seeds -> report -> register
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts
from flows.backing import Backing, started
from flows.chains import measure
from flows.parameters import CompareSettings
from flows.process import allow
from flows.stage import REFUSED, as_own, run_stage
from tasks.cluster import LOCAL, given_address
from tasks.errors import BadInput, Outage
from tasks.params import Params, load_params, override_params
from tasks.runs import runs
from tasks.standby import beside
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
    with beside(given_address(params.cluster) == LOCAL), started(params) as backing:
        state = _stages(params, backing)
        backing.failed = state.is_failed()
        return state


def _stages(params: Params, backing: Backing) -> State[Any]:
    asked = runs(params.families, params.seeds)
    progress = artifacts.Progress(5 + 2 * len(asked))
    environment: dict[str, str] = {}
    for stage in ("prepare", "classifier", "features"):
        if stage == "features":  # the first that uses Ray
            environment, places = backing.ready()
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
        progress.step()
    failed = measure(asked, environment, places, progress.step)
    backing.done_with_ray()
    for stage in ("report", "register")[: 1 if len(failed) == len(asked) else 2]:
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return as_own(state)
        progress.step()
    artifacts.show_leaderboard(params)
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}; the leaderboard says why")
    return Completed()
