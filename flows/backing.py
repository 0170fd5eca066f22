"""What stands behind a run's stages: Ray, and the comparison's run in MLflow.

Both take seconds to come up and the first stages need neither, so they start beside those; a Ray of
our own takes seconds to end, beside the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

from flows import artifacts
from flows.process import stop_all
from tasks import jobs, tracking
from tasks.cluster import LOCAL, given_address
from tasks.params import ClusterConfig, Params

Waiting = Callable[[], tuple[str, int]]  # the address of Ray, and how many runs it holds at once


class Backing:
    """Of one run. `failed` is told to MLflow at its end."""

    def __init__(
        self, params: Params, ray: Waiting, done: Callable[[], Any], parent: Future[str | None]
    ) -> None:
        self.params, self.ray, self.done_with_ray, self.parent = params, ray, done, parent
        self.failed = True

    def ready(self) -> tuple[dict[str, str], int]:
        """Wait for both: the environment of the stages that use them, and how many runs Ray holds
        at once. Raises what `jobs.for_stages` raises."""
        address, places = self.ray()
        environment = {"RAY_ADDRESS": address}
        if parent := self.parent.result():
            environment[tracking.PARENT] = parent
            show = partial(artifacts.show_run, self.params, parent)
            tracking.tolerant("naming the run", show)
        return environment, places


@contextmanager
def started(params: Params) -> Iterator[Backing]:
    """Ray and MLflow's run for the length of the block, on their way when it begins."""
    start = partial(tracking.start_parent, params)
    with _ray(params.cluster) as (ray, done), ThreadPoolExecutor(1) as pool:
        parent = pool.submit(tracking.tolerant, "starting the run", start)
        backing = Backing(params, ray, done, parent)
        try:
            yield backing
        finally:
            stop_all()  # before Ray goes, so that trainings can write their checkpoints
            if run := parent.result():
                end = partial(tracking.end_parent, params, run, failed=backing.failed)
                tracking.tolerant("ending the run", end)


@contextmanager
def _ray(config: ClusterConfig) -> Iterator[tuple[Waiting, Callable[[], Any]]]:
    """`jobs.for_stages`, without waiting for a Ray of our own: the block gets a call that does, and
    one by which that Ray ends while the block goes on.

    What others run is asked at once, and what it raises is raised at once.
    """
    if given_address(config) != LOCAL:
        with jobs.for_stages(config) as found:
            yield (lambda: found), (lambda: None)
        return
    ray = ExitStack()
    with ThreadPoolExecutor(1) as pool:
        end = cache(partial(pool.submit, ray.close))  # once, and its error is told in the end
        try:
            coming = pool.submit(ray.enter_context, jobs.for_stages(config))
            yield coming.result, end
        finally:  # in the same thread: the system ends Ray's processes with the one that made them
            end().result()
