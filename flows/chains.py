"""The middle of a comparison: each family with each seed is trained, then measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect.futures import PrefectFuture

from flows.stage import run_stage
from tasks.runs import Run


def measure(
    asked: Sequence[Run], environment: Mapping[str, str], places: int, on_end: Callable[[], None]
) -> list[str]:
    """Train and evaluate the runs, `places` at a time; returns the names of those that failed.

    A run has its place until it is measured: results come one by one. `on_end` is called after
    each stage, in any thread.
    """
    slots = threading.Semaphore(places)
    chains = []
    for which in asked:
        slots.acquire()
        chains.append(start_run(which, environment, on_end))
        chains[-1].add_done_callback(lambda _: slots.release())
    return [run.name for run, last in zip(asked, chains, strict=True) if failed_chain(last)]


def start_run(
    which: Run, environment: Mapping[str, str], on_end: Callable[[], None]
) -> PrefectFuture[Any]:
    """Train, then evaluate; the future is of the last stage."""
    trained = run_stage.submit(f"train@{which.name}", environment)
    measured = run_stage.submit(  # type: ignore[call-overload]
        f"evaluate@{which.name}", environment, wait_for=[trained]
    )
    for stage in (trained, measured):
        stage.add_done_callback(lambda _: on_end())
    return measured


def failed_chain(future: PrefectFuture[Any]) -> bool:
    """Wait for a run; whether any of its stages did not complete."""
    future.wait()
    return not future.state.is_completed()
