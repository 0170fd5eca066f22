"""Waiting for Ray with an eye on its head.

Who waits for a result when the head is lost may wait for nothing; after a minute without a head
Ray ends the process, with status 1 and no word, which looks like a fault of what ran. So the head
is asked all the while, and its loss is an outage before that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tasks.errors import Outage

ASK_S = 2.0
PATIENCE_S = 30.0  # half of Ray's own (gcs_rpc_server_reconnect_timeout_s)
T = TypeVar("T")


def cluster_id(address: str) -> bytes:
    """Of the cluster whose head is at the address: a head that is started again has another.

    Raises:
        grpc.RpcError: none answers within 5 s, or it wants another token.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    with init_grpc_channel(address) as channel:
        head = services.NodeInfoGcsServiceStub(channel)
        reply = head.GetClusterId(messages.GetClusterIdRequest(), timeout=5)
        return bytes(reply.cluster_id)


class Watch:
    """Asks a head whether it is there, in a thread, inside `with`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.lost = ""  # how, as soon as it is
        self.ended = threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._ask, daemon=True, name="watch-head").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def _ask(self) -> None:
        import grpc

        known, heard = b"", time.monotonic()
        while not self.lost and not self.ended.is_set():
            try:
                found = cluster_id(self.address)
            except grpc.RpcError:
                # one that never answered us (a proxy?) may well answer Ray
                if known and time.monotonic() - heard > PATIENCE_S:
                    self.lost = f"has not answered for {PATIENCE_S:g} s"
            else:
                known, heard = known or found, time.monotonic()
                if found != known:
                    self.lost = "was started again"
            self.ended.wait(ASK_S)


def attend(action: Callable[[], T], poll: Callable[[], bool] = lambda: False) -> T | None:
    """What `action()` returns or raises, in a thread; Ray must be connected.

    `poll` is called about twice a second meanwhile; None as soon as it returns True.

    Raises:
        Outage: the head is gone, or another one is in its place.
    """
    import ray

    outcome: list[T] = []
    failure: list[BaseException] = []

    def act() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            failure.append(error)

    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(target=act, daemon=True, name="ray-action")
    with Watch(address) as head:
        thread.start()
        while True:
            thread.join(0.5)
            if poll():
                return None
            if not thread.is_alive():
                break
            if head.lost:
                raise Outage(f"Ray's head at {address} {head.lost}")
    if failure:
        raise failure[0]
    return outcome[0]
