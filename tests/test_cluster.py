"""Which Ray a run is connected to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tasks import cluster, jobs
from tasks.cluster import connected
from tasks.params import ClusterConfig


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
