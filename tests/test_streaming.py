"""Data that streams: the batches of data in memory, row for row, in bounded memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from models.data import Batch, DataSpec
from tasks import prepare
from tasks.data import blocks, shards
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput
from tasks.training import memory, order
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.loop import train
from tasks.training.stream import KEPT, StreamData
from tests.conftest import tiny_model

KINDS = {
    "labels": DatasetConfig(),
    "pairs": DatasetConfig(derive="low_resolution"),
    "domains": DatasetConfig(derive="edges", paired=False),
    "captions": DatasetConfig(captions=("a {name}",)),
}
BATCH = 16


@pytest.fixture(params=KINDS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of each kind, in blocks of 16 rows and shards of 200."""
    folder = tmp_path_factory.getbasetemp() / f"streaming-{request.param}"
    if not folder.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "ROWS_PER_SHARD", 200)
            patch.setattr(shards, "BLOCK_BYTES", 16 * 64)
            prepare.run(KINDS[request.param], folder)
    return folder


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 to 6 blocks."""
    monkeypatch.setattr(order, "WINDOW_BYTES", 6 * 16 * 72)


def spec_of(prepared: Path) -> DataSpec:
    return DataSpec(**shards.read_manifest(prepared)["spec"])


def worker(rank: int, world: int) -> Comm:
    comm = Comm.alone()
    comm.rank, comm.world = rank, world
    return comm


def assert_same(one: Batch, two: Batch) -> None:
    for name, left, right in zip(Batch._fields, one, two, strict=True):
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name  # type: ignore[arg-type]


def test_a_stream_gives_the_batches_of_data_in_memory(prepared: Path) -> None:
    spec, alone = spec_of(prepared), Comm()
    held, streamed = memory.read(prepared, spec), StreamData(prepared, spec)
    assert len(held) == len(streamed)
    epoch = len(held) // BATCH
    later = 2 * epoch + 7  # as a resumed training does, without what comes before
    repeated = [3, 4, 5, 3, 4]  # as the phases of a step do
    for number in [*range(epoch + 2), *repeated, later, 0]:
        assert_same(held.batch(number, BATCH, 5, alone), streamed.batch(number, BATCH, 5, alone))
    assert all(len(stream.order.epoch(5, 0).windows) > 3 for stream in streamed.streams)


def test_an_epoch_holds_every_row_once_with_all_that_belongs_to_it(prepared: Path) -> None:
    spec, split = spec_of(prepared), shards.read_split(prepared, "train")
    streamed = StreamData(prepared, spec)
    columns = [n for n in blocks.columns(spec) if n != "source" or spec.source.aligned]  # type: ignore[union-attr]

    def rows(parts: Any) -> list[bytes]:
        return [
            b"".join(np.asarray(cell).tobytes() for cell in row) for row in zip(*parts, strict=True)
        ]

    known, seen, orders = Counter(rows(getattr(split, n) for n in columns)), [], []
    size = len(streamed)  # of the smaller domain
    batches = size // BATCH
    for epoch in range(2):
        numbers = range(epoch * batches, (epoch + 1) * batches)
        found = [streamed.batch(number, BATCH, 1, Comm()) for number in numbers]
        orders.append([row for b in found for row in rows(getattr(b, n) for n in columns)])
        seen.append(Counter(orders[-1]))
    for counted in seen:
        assert counted <= known, "a row twice, or one whose columns are of different rows"
        assert sum(counted.values()) == batches * BATCH
    assert orders[0] != orders[1]


def test_rows_of_far_blocks_meet_in_a_batch(prepared: Path) -> None:
    spec = spec_of(prepared)
    first = StreamData(prepared, spec).streams[0].order.epoch(0, 0)
    assert first.windows != sorted(first.windows)
    (_, places), *_ = first.pieces(0, BATCH)
    assert max(places) - min(places) > BATCH
    assert sorted(first.rows().tolist()) == list(range(first.order.rows))


@pytest.mark.parametrize("prepared", ["domains"], indirect=True)
def test_two_domains_are_not_shuffled_alike(prepared: Path) -> None:
    images, sources = StreamData(prepared, spec_of(prepared)).streams
    of_window = [next(s.order.epoch(0, 0).pieces(0, 20))[1] for s in (images, sources)]
    assert not torch.equal(*of_window)
    assert images.order.epoch(0, 0).windows != sources.order.epoch(0, 0).windows


def test_two_workers_share_the_batch_of_one(prepared: Path) -> None:
    spec = spec_of(prepared)
    for number in (0, 11, 21, 200):
        whole = StreamData(prepared, spec).batch(number, BATCH, 2, Comm())
        halves = [StreamData(prepared, spec).batch(number, BATCH, 2, worker(r, 2)) for r in (0, 1)]
        joined = [None if a is None else torch.cat([a, b]) for a, b in zip(*halves, strict=True)]  # type: ignore[list-item]
        assert_same(whole, Batch(*joined))  # type: ignore[arg-type]


def test_no_more_than_three_windows_are_held_and_each_is_read_once(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, read = spec_of(prepared), []
    original = blocks.read_blocks

    def counted(asked: DataSpec, chosen: Any, names: Any) -> Any:
        if asked is spec:  # not what an earlier test's stream still reads ahead
            read.append((names[0], tuple((b.file.name, b.group) for b in chosen)))
        return original(asked, chosen, names)

    monkeypatch.setattr(blocks, "read_blocks", counted)
    streamed = StreamData(prepared, spec)
    batches = len(streamed) // BATCH
    for number in [n for step in range(1, batches) for n in (step, step - 1)]:  # as phases do
        streamed.batch(number, BATCH, 0, Comm())
        for stream in streamed.streams:
            held = [*stream._used, *([] if stream._next is None else [stream._next[0]])]
            assert len(held) <= KEPT + 1
    limit = max(stream.order.blocks for stream in streamed.streams)
    assert max(len(blocks) for _, blocks in read) <= limit
    ahead = len(streamed.streams)  # the first of the next epoch
    assert len(read) <= ahead + sum(len(s.order.epoch(0, 0).windows) for s in streamed.streams)
    assert len(set(read)) == len(read)


@pytest.mark.parametrize("prepared", ["labels"], indirect=True)
def test_a_training_that_streams_and_resumes_is_the_one_in_memory(
    prepared: Path, tmp_path: Path
) -> None:
    spec = spec_of(prepared)

    def run(directory: str, steps: int, where: str) -> Any:
        config = TrainConfig(
            batch_size=BATCH, budget=Budget(steps=steps), precision="fp32", data=where, seed=3
        )
        model = tiny_model("dcgan", spec)
        data = memory.train_data(prepared, model, config, Comm(), 1)
        assert isinstance(data, StreamData) == (where == "stream")
        train(model, data, config, tmp_path / directory)
        return model

    straight = run("straight", 50, "memory")
    run("cut", 21, "stream")
    resumed = run("cut", 50, "stream")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("prepared", ["labels"], indirect=True)
def test_what_does_not_fit_streams_and_what_is_fitted_says_so(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, config = spec_of(prepared), TrainConfig()
    needed = memory.size(prepared, spec)
    assert needed == len(shards.read_split(prepared, "train").x) * (64 + 8)
    for room, neighbours, streams in ((2 * needed, 1, False), (2 * needed, 2, True)):
        monkeypatch.setattr(memory, "cgroup_limits", lambda room=room: [room])
        model = tiny_model("vae", spec)
        data = memory.train_data(prepared, model, config, Comm(), neighbours)
        assert isinstance(data, StreamData) == streams
    with pytest.raises(BadInput, match="fitted to all training data at once, which takes"):
        memory.train_data(prepared, tiny_model("naive_bayes", spec), config, Comm(), 2)


def test_the_memory_limits_of_containers_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/pod/one\n0::/pod/two\n")
    for file, text in {
        "memory.max": "max",
        "pod/memory.max": "5000",
        "pod/two/memory.max": "3000",
        "pod/other/memory.max": "1",
        "memory/memory.limit_in_bytes": "9000",  # version 1, its path not visible inside
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text + "\n")
    assert sorted(memory.cgroup_limits(tmp_path, own)) == [3000, 5000, 9000]
    assert memory.cgroup_limits(tmp_path, tmp_path / "none") == []
    monkeypatch.setattr(memory, "cgroup_limits", list)
    cpu = torch.device("cpu")
    assert memory.memory(cpu, 3) == psutil.virtual_memory().total // 3


@pytest.mark.parametrize("prepared", ["domains", "captions"], indirect=True)
def test_the_first_rows_of_a_split_are_read_alone(prepared: Path) -> None:
    whole, head = (shards.read_split(prepared, "train", rows) for rows in (None, 21))
    for all_rows, first in zip(whole, head, strict=True):
        assert (all_rows is None) == (first is None)
        assert first is None or np.array_equal(first, all_rows[:21])  # type: ignore[index]
    parts = shards.each_image_block(prepared, "train")
    assert np.array_equal(np.concatenate(list(parts)), whole.x)
