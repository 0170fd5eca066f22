"""What stands behind a run's stages: Ray, and the comparison's run in MLflow.

Both take seconds to come up and the first stages need neither, so they start beside those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

from flows import artifacts
from flows.process import stop_all
from tasks import jobs, tracking
from tasks.cluster import LOCAL, given_address
from tasks.params import ClusterConfig, Params

Waiting = Callable[[], tuple[str, int]]  # the address of Ray, and how many runs it holds at once


class Backing:
    """Of one run. `failed` is told to MLflow at its end."""

    def __init__(self, params: Params, ray: Waiting, parent: Future[str | None]) -> None:
        self.params, self.ray, self.parent = params, ray, parent
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
    with _ray(params.cluster) as ray, ThreadPoolExecutor(1) as pool:
        backing = Backing(params, ray, pool.submit(tracking.tolerant, "starting the run", start))
        try:
            yield backing
        finally:
            stop_all()  # before Ray goes, so that trainings can write their checkpoints
            if parent := backing.parent.result():
                end = partial(tracking.end_parent, params, parent, failed=backing.failed)
                tracking.tolerant("ending the run", end)


@contextmanager
def _ray(config: ClusterConfig) -> Iterator[Waiting]:
    """`jobs.for_stages`, without waiting for a Ray of our own: the block gets a call that does.

    What others run is asked at once, and what it raises is raised at once.
    """
    if given_address(config) != LOCAL:
        with jobs.for_stages(config) as found:
            yield lambda: found
        return
    ray = ExitStack()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(ray.enter_context, jobs.for_stages(config)).result
        finally:  # in the same thread: the system ends Ray's processes with the one that made them
            pool.submit(ray.close).result()
