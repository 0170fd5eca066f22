"""What workers say to each other in a step, and how often: gradients once a bucket and phase."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tasks.training import comm as comm_module
from tasks.training.comm import Comm, buckets
from tasks.training.config import Budget, TrainConfig
from tasks.training.loop import train
from tests.conftest import tiny_data, tiny_model

STEPS, EVERY = 6, 3
COLLECTIVES = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_reduce_coalesced", "barrier", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "irecv", "isend", "monitored_barrier", "recv", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "send"),
}


class Done:
    def wait(self) -> None: ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A world of two whose other worker has just the same; counts who asks for what.

    What batch statistics need, in `models.nn`, is counted apart from what the loop asks for.
    """
    found: Counter[str] = Counter()

    def owner() -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name in ("torch.distributed.nn.functional", "models.nn"):
                return "model"
            if name == "tasks.training.comm":
                return str(frame.f_code.co_name)
            frame = frame.f_back
        return "unknown"

    def replacement(name: str) -> Any:
        def collective(*args: Any, **options: Any) -> Done:
            found[owner()] += 1
            if name == "all_reduce":
                args[0].mul_(2)
            elif name == "all_gather":
                for part in args[0]:
                    part.copy_(args[1])
            elif name != "broadcast":
                raise AssertionError(f"nothing asks for {name}")
            return Done()

        return collective

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, replacement(name))
    told = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "get_backend": "gloo"}
    for name, value in told.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    return found


@pytest.mark.parametrize("minutes", [False, True], ids=["steps", "minutes"])
def test_a_phase_exchanges_its_gradients_once_and_nothing_else(
    family: str, minutes: bool, asked: Counter[str], tmp_path: Path
) -> None:
    model = tiny_model(family)
    if minutes and not model.phases():
        pytest.skip("a fit is no step")
    stopping = iter([False, True])  # asked at each record
    settings = TrainConfig(
        batch_size=8,
        budget=Budget(minutes=60) if minutes else Budget(steps=STEPS),
        log_every=EVERY,
        validate_every=STEPS,
        checkpoint_every=STEPS,
        precision="fp32",
    )
    outcome = train(
        model,
        tiny_data(40, model.data),
        settings,
        tmp_path,
        comm=Comm(),
        should_stop=(lambda: next(stopping)) if minutes else (lambda: False),
    )
    steps = outcome.progress.step
    assert steps == STEPS or not model.phases()
    turns = [p for step in range(steps) for p in model.phases() if step % p.every == 0]
    records = steps // EVERY + (steps % EVERY > 0)
    assert asked["average_gradients"] == sum(phase.repeats for phase in turns)
    assert asked["mean"] == records  # of the losses, since the last
    # whether all start at one step; the clock with the wish to stop, and whether all went well
    assert asked["first"] == 1 + steps // EVERY + records
    assert set(asked) <= {"average_gradients", "mean", "first", "model"}


def test_gradients_of_one_dtype_share_buckets_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    monkeypatch.setattr(comm_module, "BUCKET_BYTES", 40)
    sizes = [(4, torch.float32), (2, torch.float64), (6, torch.float32), (1, torch.float32)]
    sizes += [(30, torch.float32), (1, torch.float32)]
    gradients = [torch.full((n,), float(i), dtype=d) for i, (n, d) in enumerate(sizes)]
    found = [[int(g[0]) for g in bucket] for bucket in buckets(gradients)]
    assert found == [[0, 2], [1], [3], [4], [5]]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters[1:], gradients[1:], strict=True):
        parameter.grad = gradient.clone()  # the first has none
    Comm().average_gradients(parameters)
    assert asked == {"average_gradients": 5}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def _gradients(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, n + 1, generator=generator) for n in (3, 40, 7, 60, 1)]


def _exchange(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for limit in (4000, 2**30):  # several buckets, and one
        comm_module.BUCKET_BYTES = limit
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in _gradients(rank)]
        for parameter, gradient in zip(parameters, _gradients(rank), strict=True):
            parameter.grad = gradient
        Comm().average_gradients(parameters)
        found.append([p.grad for p in parameters])
    torch.save([*found, Comm().first(rank + 0.1, 2.0)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_buckets_give_what_one_collective_gives_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_exchange, args=(port, str(tmp_path)), nprocs=2)
    straight = [(a + b) / 2 for a, b in zip(_gradients(0), _gradients(1), strict=True)]
    for rank in (0, 1):
        several, one, first = torch.load(tmp_path / f"{rank}.pt")
        for found in (several, one):
            assert all(torch.equal(a, b) for a, b in zip(found, straight, strict=True))
        assert first == [0.1, 2.0]
