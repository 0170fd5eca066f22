"""The Ray Train adapter: one trainer for one CPU, one GPU and many nodes."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tasks.cluster import families_at_once, nodes_lost, worker_resources
from tasks.head import attend
from tasks.params import ClusterConfig
from tasks.training.worker import STOP, work

STOP_GRACE_S = 90.0
UNUSED = (  # Ray Train's, each an actor: seconds of a processor for every training
    "DatasetsCallback",  # hands out Ray Data's, and we have none
    "PlacementGroupCleanerCallback",  # the workers' group goes with its creator by itself
)


class Interrupted(SystemExit):
    """Training was stopped by a signal and left a checkpoint; exits 128 + signal."""


def launch(
    spec: dict[str, Any],
    cluster: ClusterConfig,
    max_failures: int,
    poll: Callable[[], None],
) -> dict[str, Any]:
    """Run `work(spec)` on Ray Train workers until it ends; Ray must be connected.

    Returns what it returned on the first of them.

    Lost workers are replaced up to `max_failures` times and resume from the last checkpoint. An
    elastic group starts with as many as there is room for, goes on with those that are left, and
    is started again with more, from the last checkpoint, at most a minute after there is room.
    `poll` is called about twice a second meanwhile. SIGTERM and SIGINT make the workers write
    a checkpoint and end.

    Raises:
        BadInput: the cluster cannot hold the workers.
        Interrupted: after a signal.
        Outage: the head of Ray is gone.
        ray.train.TrainingFailedError: the workers failed, its message says how.
    """
    import ray.train
    from ray.train import LoggingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    families_at_once(cluster)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    resources = worker_resources(cluster)
    directory = Path(spec["directory"])
    (directory / STOP).unlink(missing_ok=True)

    class Trainer(TorchTrainer):
        """Without the actors that it has no use for; one of them asks a dashboard, too."""

        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ not in UNUSED]

    trainer = Trainer(
        work,
        train_loop_config={**spec, "threads": cluster.cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if resources["GPU"] else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,  # a pair: elastic
            use_gpu=resources["GPU"] > 0,
            resources_per_worker={name: n for name, n in resources.items() if n},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.time_ns()}",  # resuming is the loop's business, not Ray's
            storage_path=str(directory / "ray"),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures,
                # Ray learns of a lost node up to 20 s late, and until then starts an elastic
                # group that has no room for all, which fails after a minute
                controller_failure_limit=0 if isinstance(cluster.workers, int) else max_failures,
            ),
        ),
    )
    with Signals(directory / STOP) as signals:

        def stop() -> bool:
            poll()
            return signals.overdue()

        try:
            outcome = attend(trainer.fit, stop)
        except BaseException as error:
            if nodes_lost(error):  # workers elsewhere may live on, and would meet the next ones
                (directory / STOP).touch()
            if signals.received is None:
                raise
        finally:
            poll()  # what came last
    if signals.received is not None:
        raise Interrupted(128 + signals.received)
    assert outcome is not None
    found: dict[str, Any] = outcome.return_value
    return found


class Signals:
    """Inside, SIGINT and SIGTERM leave a stop file for the workers instead of ending us."""

    def __init__(self, stop: Path) -> None:
        self.stop = stop
        self.received: int | None = None
        self.since = 0.0

    def __enter__(self) -> Signals:
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received, self.since = number, time.monotonic()
        self.stop.touch()
        print("stopping; the workers write a checkpoint", flush=True)

    def overdue(self) -> bool:
        return self.received is not None and time.monotonic() - self.since > STOP_GRACE_S
