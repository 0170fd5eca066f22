"""The main job: prepare -> classifier -> (train -> evaluate) x families -> report -> register."""

from __future__ import annotations

import threading
from typing import Any

import pandas as pd
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows.stage import StageFailed, run_stage, stop_all
from tasks import tracking
from tasks.cluster import connected, families_at_once
from tasks.params import load_params, override_params


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=64))  # type: ignore[arg-type]
def compare(overrides: dict[str, Any] | None = None) -> None:
    """Train, evaluate, rank and register every family in `params.yaml`.

    `overrides` are dotted keys to set in `params.yaml` first. One family's failure leaves the
    others to finish; the flow fails at its end, and the leaderboard says why.
    """
    override_params(overrides or {})
    params = load_params()
    try:
        with connected(params.cluster) as address:
            environment = {"RAY_ADDRESS": address}
            slots = threading.Semaphore(families_at_once(params.cluster))
            parent = tracking.tolerant("starting the run", lambda: tracking.start_parent(params))
            if parent:
                environment[tracking.PARENT] = parent
            for stage in ("prepare", "classifier"):
                run_stage(stage, environment)
            chains = [_family(family, environment, slots) for family in params.families]
            failed = [f for f, last in zip(params.families, chains, strict=True) if _failed(last)]
            run_stage("report", environment)
            _publish(parent, params, failed)
            if len(failed) < len(params.families):
                run_stage("register", environment)
    finally:
        stop_all()
    if failed:
        raise StageFailed(f"failed: {', '.join(failed)}; reports/leaderboard.html says why")


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


def _publish(parent: str | None, params: Any, failed: list[str]) -> None:
    """The leaderboard as a Prefect artifact, and the end of the comparison's MLflow run."""
    table = pd.read_csv("reports/leaderboard.csv").astype(object)
    rows: list[dict[str, Any]] = table.where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
    create_table_artifact(key="leaderboard", table=rows, description=f"{params.dataset.name}")
    get_run_logger().info("leaderboard: reports/leaderboard.html")
    if parent:
        status = "FAILED" if failed else "FINISHED"
        end = lambda: tracking.connect(params).set_terminated(parent, status)  # noqa: E731
        tracking.tolerant("ending the run", end)
