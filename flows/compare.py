"""The main job: prepare -> classifier -> (train -> evaluate) x families -> report -> register."""

from __future__ import annotations

import threading
from typing import Any

import pandas as pd
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.process import stop_all
from flows.stage import REFUSED, run_stage
from tasks import tracking
from tasks.cluster import connected, families_at_once
from tasks.errors import BadInput
from tasks.params import Params, load_params, override_params


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=64))  # type: ignore[arg-type]
def compare(overrides: dict[str, Any] | None = None) -> State[Any]:
    """Train, evaluate, rank and register every family in `params.yaml`.

    `overrides` are dotted keys to set in `params.yaml` first. One family's failure leaves the
    others to finish; the flow fails at its end, and the leaderboard says why.
    """
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
    slots = threading.Semaphore(families_at_once(params.cluster))
    parent = tracking.tolerant("starting the run", lambda: tracking.start_parent(params))
    if parent:
        environment[tracking.PARENT] = parent
    for stage in ("prepare", "classifier"):
        if (state := run_stage(stage, environment, return_state=True)).is_failed():
            return _same(state)
    chains = [_family(family, environment, slots) for family in params.families]
    failed = [f for f, last in zip(params.families, chains, strict=True) if _failed(last)]
    if (state := run_stage("report", environment, return_state=True)).is_failed():
        return _same(state)
    _publish(parent, params, failed)
    if len(failed) == len(params.families):
        return Failed(message="every family failed; the leaderboard says why")
    if (state := run_stage("register", environment, return_state=True)).is_failed():
        return _same(state)
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}; the leaderboard says why")
    return Completed()


def _same(state: State[Any]) -> State[Any]:
    """A stage's failure as the flow's own: a state that is passed on loses its message."""
    return Failed(name=state.name, message=state.message)


def _family(
    family: str, environment: dict[str, str], slots: threading.Semaphore
) -> PrefectFuture[None]:
    trained = run_stage.submit(f"train@{family}", environment, slots)
    return run_stage.submit(  # type: ignore[call-overload]
        f"evaluate@{family}", environment, slots, wait_for=[trained]
    )


def _failed(future: PrefectFuture[None]) -> bool:
    future.wait()
    return not future.state.is_completed()


def _publish(parent: str | None, params: Params, failed: list[str]) -> None:
    """The leaderboard as a Prefect artifact, and the end of the comparison's MLflow run."""
    table = pd.read_csv("reports/leaderboard.csv").astype(object)
    rows: list[dict[str, Any]] = table.where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
    create_table_artifact(key="leaderboard", table=rows, description=f"{params.dataset.name}")
    get_run_logger().info("leaderboard: reports/leaderboard.html")
    if parent:
        status = "FAILED" if failed else "FINISHED"
        end = lambda: tracking.connect(params).set_terminated(parent, status)  # noqa: E731
        tracking.tolerant("ending the run", end)
