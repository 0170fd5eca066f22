"""Where a training runs: on the Ray that this machine is a node of, or in a job elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import jobs
from tasks.cluster import connected, spare_processor, wait_for_room, workers_at_once
from tasks.errors import Outage
from tasks.params import ClusterConfig, Params
from tasks.training.launch import Interrupted, Signals, launch
from tasks.training.worker import STOP


def on_ray(
    cluster: ClusterConfig,
    spec: dict[str, Any],
    max_failures: int,
    trainings: int,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train as `spec` says beside as many `trainings` as there is room for; the outcome."""
    with connected(cluster):
        wait_for_room(cluster)
        spec["neighbours"] = workers_at_once(cluster, trainings)
        if spec["train"]["validation"] == "auto":  # the results are the same, and so is the key
            spare = spare_processor(cluster, trainings)
            spec["train"]["validation"] = "asynchronous" if spare else "synchronous"
        return launch(spec, cluster, max_failures, watch)


def on_cluster(
    params: Params, spec: dict[str, Any], trainings: int, watch: Callable[[], None]
) -> dict[str, Any]:
    """`on_ray` here, or in a job on a cluster of which this machine is no node."""
    asked = (spec, params.train.max_failures, trainings)
    if not jobs.http_address(params.cluster):
        return on_ray(params.cluster, *asked, watch)
    for name in ("prepared", "classifier"):
        spec[name] = jobs.shared(params.cluster, Path(spec[name]))
    stop = Path(spec["directory"], STOP)
    with Signals(stop) as signals:

        def poll() -> bool:
            watch()
            if signals.received is not None:
                stop.touch()  # again: one that came before the workers were is removed by `launch`
            return signals.overdue()

        function, key = "tasks.training.dispatch:on_ray", spec["directory"]
        try:
            outcome = jobs.call(params.cluster, function, list(asked), key=key, poll=poll)
        except Outage:
            if signals.received is None:
                raise
    if signals.received is not None:
        raise Interrupted(128 + signals.received)
    return outcome
