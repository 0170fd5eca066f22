"""Ray: join the cluster there is, or start a local one; and say early what it cannot give."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks import handover
from tasks.errors import BadInput, Outage
from tasks.head import attend, cluster_id
from tasks.params import ClusterConfig

LOCAL = "local"  # a Ray of our own
LOST = (  # Ray's errors when a node, a worker's process or the connection is gone
    "ActorDiedError",
    "ActorUnschedulableError",
    "ActorUnavailableError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "RaySystemError",
    "RpcError",
    "TaskUnschedulableError",
    "WorkerCrashedError",
)


def nodes_lost(error: BaseException) -> bool:
    """Whether the cluster is at fault, not what ran on it: the same may go well again."""
    if isinstance(error, ConnectionError | Outage):
        return True
    if "ray" not in sys.modules:
        return False
    import ray

    of_workers = getattr(error, "worker_failures", None) or {}  # of a Ray Train's group
    kinds = tuple(getattr(ray.exceptions, name) for name in LOST)
    return isinstance(error, kinds) or any(nodes_lost(one) for one in of_workers.values())


def given_address(config: ClusterConfig) -> str:
    """`cluster.address`, else RAY_ADDRESS, else `LOCAL`.

    Without any, Ray would join whatever `ray start` left on this machine, and wait for ever where
    that is gone.
    """
    return config.address or os.environ.get("RAY_ADDRESS") or LOCAL


@contextmanager
def connected(config: ClusterConfig) -> Iterator[str]:
    """Connected to Ray for the length of the block; yields the cluster's address.

    The address comes from `cluster.address`, else RAY_ADDRESS; with neither, a local Ray is
    started that ends with this block, closed to others by a token.

    Raises:
        BadInput: the cluster wants another token.
        Outage: nothing answers at the address.
    """
    address = given_address(config)
    if address.startswith("http"):  # of its Jobs API: this machine is no node (`tasks.jobs`)
        yield address
        return
    local: dict[str, Any] = {}
    if address == LOCAL:
        if "ray" in sys.modules and "RAY_AUTH_TOKEN" not in os.environ:
            raise RuntimeError("import ray inside connected(): it reads its token when imported")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # nobody is told of its dashboard, whose processes take ten seconds of a processor
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    if handover.WORKERS in os.environ:
        local["runtime_env"] = {"py_executable": handover.ray_python()}
    import ray

    if threading.current_thread() is not threading.main_thread():  # of no use there, so no news
        log = logging.getLogger("ray._private.worker")
        log.addFilter(lambda record: "SIGTERM handler is not set" not in record.getMessage())
    if ":" in address and "://" not in address:
        _ask_for_entry(address)
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, **local)
    except ConnectionError as error:
        raise Outage(f"no Ray answers at {address}: {error}") from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGINT and SIGTERM did before, they do after: Ray's own would end us without a word."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return
    # Python's handlers are its main thread's; Ray replaces the system's, which are everybody's
    system = ctypes.CDLL(None)
    actions = {number: ctypes.create_string_buffer(1024) for number in numbers}  # room for any
    for number, action in actions.items():
        system.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in actions.items():
            system.sigaction(number, action, None)


def _ask_for_entry(address: str) -> None:
    """BadInput where a Ray answers that wants another token.

    Ray itself tries for half a minute, and then says only that it could not connect.
    """
    import grpc

    try:
        cluster_id(address)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise BadInput(
                f"the Ray at {address} refuses the token; set RAY_AUTH_MODE to token, and "
                "RAY_AUTH_TOKEN to the cluster's"
            ) from None  # nothing answers: Ray's own waiting begins


def on_worker(config: ClusterConfig, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args, threads, gpu)` returns on one Ray worker; `gpu`: whether it has one.

    An error is raised as it was there, the worker's traceback behind it.
    """
    with connected(config):
        import ray

        wait_for_room(config)
        families_at_once(config)
        resources = worker_resources(config)
        task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources["GPU"])(function)
        try:
            answer = task.remote(*args, config.cpus_per_worker, resources["GPU"] > 0)
            return attend(lambda: ray.get(answer))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BadInput):
                raise error.cause from None
            raise error.cause from error


def worker_resources(config: ClusterConfig) -> dict[str, float]:
    """What one worker asks for, with `auto` resolved; Ray must be connected."""
    import ray

    gpus = config.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    return {"CPU": float(config.cpus_per_worker), "GPU": float(gpus)}


def spare_processor(config: ClusterConfig, trainings: int) -> bool:
    """Whether one is left when as many of the `trainings` run at once as the cluster holds, each
    with as many workers as it may have."""
    import ray

    at_once = min(families_at_once(config), trainings)
    taken = at_once * config.most * worker_resources(config)["CPU"]
    return ray.cluster_resources().get("CPU", 0) - taken >= 1


def workers_at_once(config: ClusterConfig, trainings: int) -> int:
    """How many of them share a node when as many of the `trainings` run as the cluster holds."""
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    workers = min(_workers(config), min(families_at_once(config), trainings) * config.most)
    return -(-workers // nodes)


def families_at_once(config: ClusterConfig) -> int:
    """How many families' workers the cluster holds side by side; BadInput where it is none."""
    import ray

    there, asked = ray.cluster_resources(), worker_resources(config)
    at_once = _workers(config) // config.fewest
    if at_once < 1:
        wanted = ", ".join(f"{a * config.fewest:g} {n}" for n, a in asked.items() if a)
        has = ", ".join(f"{there.get(n, 0):g} {n}" for n, a in asked.items() if a)
        waited = f" after {config.wait_s:g} s" if config.wait_s else ""
        raise BadInput(
            f"cluster: {config.fewest} worker(s) ask for {wanted}, the cluster has {has}{waited}; "
            "lower cluster.workers or cluster.cpus_per_worker"
        )
    return at_once


def wait_for_room(config: ClusterConfig) -> None:
    """Ask the cluster's autoscaler for one family's workers where there is no room for them, and
    give it `cluster.wait_s` seconds; whether they came is for `families_at_once` to say."""
    if not config.wait_s or _workers(config) >= config.fewest:
        return
    from ray.autoscaler.sdk import request_resources

    until = time.monotonic() + config.wait_s
    worker = {name: amount for name, amount in worker_resources(config).items() if amount}
    request_resources(bundles=[worker] * config.fewest)
    try:
        while _workers(config) < config.fewest and time.monotonic() < until:
            time.sleep(0.5)
    finally:
        request_resources(bundles=[])  # else the nodes would be held for ever


def _workers(config: ClusterConfig) -> int:
    """How many there is room for."""
    import ray

    there, asked = ray.cluster_resources(), worker_resources(config)
    return min(int(there.get(name, 0) // amount) for name, amount in asked.items() if amount)
