"""Which Ray a run is connected to."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
import ray

from tasks import cluster, head, jobs
from tasks.cluster import connected
from tasks.errors import Outage
from tasks.params import ClusterConfig
from tasks.training import launch
from tasks.training.worker import STOP


@pytest.mark.parametrize(
    ("configured", "environment", "asked"),
    [
        (None, None, "local"),  # never the cluster that `ray start` left on this machine
        (None, "there:6379", "there:6379"),
        ("here:6379", "there:6379", "here:6379"),
    ],
)
def test_without_an_address_a_run_has_a_ray_of_its_own(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, environment: str | None, asked: str
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(cluster, "_ask_for_entry", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **settings: seen.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="x"))
    with connected(ClusterConfig(address=configured)):
        pass
    assert seen["address"] == asked
    assert ("_node_ip_address" in seen) == (asked == "local")


@pytest.mark.parametrize(
    ("environment", "held"),
    [(None, True), ("local", True), ("10.0.0.1:6379", False)],
)
def test_only_a_ray_of_our_own_is_held_for_all_stages(
    environment: str | None, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stays connected to a cluster of others ends with its head."""
    open_: list[str] = []

    @contextmanager
    def connected(config: ClusterConfig) -> Iterator[str]:
        open_.append("x")
        yield "there"
        open_.clear()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(cluster, "connected", connected)
    monkeypatch.setattr(cluster, "wait_for_room", lambda config: None)
    monkeypatch.setattr(cluster, "families_at_once", lambda config: 2)
    with jobs.for_stages(ClusterConfig()) as found:
        assert found == ("there", 2)
        assert bool(open_) is held
    assert not open_


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([b"a", b"a", b"b"], "was started again"),
        ([b"a", grpc.RpcError()], "has not answered for 0.5 s"),
        ([b"a", grpc.RpcError(), b"a", grpc.RpcError(), b"b"], "was started again"),
    ],
    ids=["anew", "gone", "blip"],
)
def test_who_waits_for_ray_learns_that_its_head_is_lost(
    answers: list[Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, left = threading.Event(), list(answers)

    def ask(address: str) -> bytes:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:1"))
    monkeypatch.setattr(head, "cluster_id", ask)
    monkeypatch.setattr(head, "ASK_S", 0.01)
    monkeypatch.setattr(head, "PATIENCE_S", 0.5)
    with pytest.raises(Outage, match=f"Ray's head at here:1 {re.escape(words)}"):
        head.attend(lambda: never.wait(4))
    never.set()


def test_what_ends_before_its_head_has_its_result_and_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:1"))
    monkeypatch.setattr(head, "cluster_id", lambda address: b"a")
    polls: list[bool] = [False, True]
    assert head.attend(lambda: 7) == 7
    assert head.attend(lambda: time.sleep(9), lambda: polls.pop(0)) is None
    with pytest.raises(ZeroDivisionError):
        head.attend(lambda: 1 / 0)


def test_a_head_that_only_ray_can_reach_is_not_taken_for_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:1"))
    monkeypatch.setattr(head, "cluster_id", Mock(side_effect=grpc.RpcError()))
    monkeypatch.setattr(head, "ASK_S", 0.01)
    monkeypatch.setattr(head, "PATIENCE_S", 0.05)
    assert head.attend(lambda: time.sleep(1) or 7) == 7


@pytest.mark.parametrize(("error", "told"), [(Outage("lost"), True), (ValueError("NaN"), False)])
def test_workers_that_outlive_their_head_are_told_to_stop(
    error: Exception, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(action: Any, poll: Any) -> None:
        assert not (tmp_path / STOP).exists()
        raise error

    monkeypatch.setattr(launch, "attend", attend)
    monkeypatch.setattr(launch, "families_at_once", lambda config: 1)
    monkeypatch.setattr(launch, "worker_resources", lambda config: {"CPU": 1.0, "GPU": 0.0})
    (tmp_path / STOP).touch()  # of an earlier end
    polled = Mock()
    with pytest.raises(type(error)):
        launch.launch({"directory": str(tmp_path)}, ClusterConfig(), 0, polled)
    assert (tmp_path / STOP).exists() is told
    polled.assert_called_once_with()  # for what came last


@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another"])
def test_ray_takes_no_signal_from_us(main: bool) -> None:
    seen: list[int] = []
    ignore = ctypes.c_void_p(1)  # SIG_IGN

    def start() -> None:
        with cluster._own_signals():  # as Ray does, below Python
            ctypes.CDLL(None).signal(signal.SIGTERM, ignore)

    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        if main:
            start()
        else:
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
