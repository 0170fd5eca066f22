"""The cost model of training on N workers: its formulas, its fit, and what it says of large N."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks import scaling_check
from benchmarks.cost_model import (
    Around,
    Job,
    Loopback,
    Nccl,
    efficiency,
    exchanged,
    fit,
    fit_spread,
    limit,
    longest,
    ring,
)
from benchmarks.scaling_parts import EVERY

NODES = Nccl(inside=450e9, between=400e9)


def test_a_ring_sends_all_but_its_own_share_twice() -> None:
    assert ring(8e6, 1, 1.0, 1e9) == 0
    assert ring(8e6, 2, 0.0, 1e9) == pytest.approx(8e-3)
    assert ring(8e6, 4, 0.0, 1e9) == pytest.approx(12e-3)
    assert ring(0, 4, 0.5, 1e9) == 3.0


def test_the_fit_finds_the_link_that_made_the_numbers() -> None:
    made = Loopback(2e-4, 5e8)
    measured = [(s, n, made.seconds(s, n)) for s in (256, 1e5, 1e7) for n in (2, 4)]
    found = fit(measured)
    assert found.latency == pytest.approx(2e-4)
    assert found.bandwidth == pytest.approx(5e8)
    with pytest.raises(ValueError, match="no ring"):
        fit([(1e3, 2, 1.0), (1e6, 2, 0.1)])


def test_who_is_early_waits_for_the_last() -> None:
    assert longest(1) == pytest.approx(0, abs=1e-9)
    assert longest(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert longest(4) == pytest.approx(1.02938, abs=1e-5)  # of the tables of order statistics
    steps = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 1
    waited = float((steps.max(1).values - steps.mean(1)).mean())
    assert fit_spread([(1.0, 4, waited), (10.0, 4, 10 * waited)]) == pytest.approx(0.2, rel=0.02)
    assert fit_spread([(1.0, 2, -0.1)]) == 0


def test_nccl_is_quoted_rightly() -> None:
    """By hand, from its tuner's tables: rings of Simple, and a tree of LL over 64 nodes."""
    link = Nccl(inside=100e9, between=50e9, reached=1.0)
    assert link.choices(1e9, 8)["ring", "Simple"] == pytest.approx(
        (8.4 + 14 * 3.4) * 1e-6 + 1e9 / (100e9 * 8 / 14)
    )
    assert link.choices(1e9, 512)["tree", "LL"] == pytest.approx(
        (4.4 + 2 * (7 * 0.52 * 1.8 + 6 * 5.0)) * 1e-6 + 1e9 / (50e9 * 0.45 / 3.8)
    )
    assert link.choices(1e9, 16)["ring", "Simple"] == pytest.approx(
        (8.4 + 28 * 3.4 + 2 * 9.6) * 1e-6 + 1e9 / (50e9 * 16 / 30)
    )


def test_little_is_sent_by_trees_and_much_by_rings() -> None:
    def best(size: float, workers: int) -> str:
        found = NODES.choices(size, workers)
        return min(found, key=lambda choice: found[choice])[0]

    assert best(256, 512) == "tree"
    assert best(1e9, 16) == "ring"
    assert NODES.seconds(1e9, 1) == 0


def test_a_step_is_its_parts_and_overlaps_nothing() -> None:
    link = Loopback(1e-3, 1e9)
    job = Job((4e6, 2e6), small=6, log_every=10)
    sent = link.seconds(4e6, 4) + link.seconds(2e6, 4) + 6.3 * link.seconds(256, 4)
    assert exchanged(job, 4, link) == pytest.approx(sent)
    assert exchanged(replace(job, packing=1.0), 4, link) == pytest.approx(1 + sent)
    assert exchanged(job, 1, link) == 0
    assert efficiency(0.1, job, 4, link) == pytest.approx(0.1 / (0.1 + sent))
    assert efficiency(0.1, job, 1, link) == 1


def test_efficiency_falls_and_where_it_passes_the_floor_is_found() -> None:
    job = Job((400e6,), small=20)
    shares = [efficiency(0.01, job, 2**k, NODES) for k in range(12)]
    assert all(a >= b for a, b in pairwise(shares))
    found = limit(0.01, job, NODES)
    assert found is not None
    assert efficiency(0.01, job, found, NODES) < 0.8 <= efficiency(0.01, job, found // 2, NODES)
    assert limit(10.0, job, NODES) is None


def test_start_and_checkpoints_are_amdahls_part() -> None:
    around = Around(start=10.0, disk=1e8, checkpoint_every=100)
    job = Job((1e6,), state=1e8)
    assert around.share(job, 0.1, 1000) == pytest.approx(100 / (100 + 10 + 10))
    assert math.isclose(Around(0, math.inf).share(job, 0.1, 1000), 1)


def test_the_check_finds_the_link_and_the_spread_that_made_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of steps without noise: what is predicted from those beside others is what Ray's took."""
    link, spread, alone = Loopback(1e-3, 1e9), 0.2, 20.0
    size = scaling_check.gradients("vae")
    parts: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for n in (1, 2, 4):
        beside = alone * (1 + n)  # whatever n workers do to each other
        waiting = spread * longest(n) * beside
        sent = 1000 * exchanged(Job((size,), log_every=EVERY), n, link)
        together = {"step": beside + waiting + sent, "exchange": waiting + sent}
        sums = {str(s): link.seconds(s, n) for s in (256, 10**6, 10**7)}
        vae = {"beside": {"step": beside}, "together": together}
        parts.append({"workers": n, "all_reduce": sums, "vae": vae})
        run = {"case": "vae", "workers": n, "step_ms": together["step"], "start_s": 10.0 + n}
        runs += [run, {**run, "step_ms": 2 * run["step_ms"]}, {**run, "step_ms": 0.0}]
    monkeypatch.setattr(scaling_check, "CORES", 2)
    found = scaling_check.check(parts, runs)
    assert found["fit"]["latency"] == pytest.approx(1e-3)
    assert found["fit"]["bandwidth"] == pytest.approx(1e9)
    assert found["fit"]["spread"] == pytest.approx(spread)
    assert [row["error_from_beside"] for row in found["steps"]["vae"]] == pytest.approx([0] * 3)
    one, two, four = (row["from_one"] - row["exchange"] for row in found["steps"]["vae"])
    assert one == pytest.approx(2 * alone)
    assert two == pytest.approx(2 * alone * (1 + spread * longest(2)))
    assert four == pytest.approx(2 * 2 * alone * (1 + spread * longest(4)))  # two on each core
    assert found["starts"] == {1: 11.0, 2: 12.0, 4: 14.0}
    lines = found["tables"][0]["rows"]
    assert [line[:2] for line in lines] == [["vae", "1"], ["vae", "2"], ["vae", "4"]]
    assert {len(line) for line in lines} == {len(scaling_check.HEADINGS)}
