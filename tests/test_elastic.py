"""Workers that come and go: how many there is room for, who shares a batch, and a node lost."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models import store
from tasks import cluster, prepare
from tasks.cluster import connected
from tasks.data.config import DatasetConfig
from tasks.data.shards import read_manifest
from tasks.errors import BadInput
from tasks.params import ClusterConfig, check_params
from tasks.training.candidates import load_best
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.launch import launch
from tasks.training.worker import CHECKPOINTS, work

ELASTIC = ClusterConfig(workers=(2, 4), cpus_per_worker=2)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the cluster has; two nodes."""
    found = {"CPU": 12.0, "memory": 1e9}
    monkeypatch.setattr(ray, "cluster_resources", lambda: found)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    return found


def test_an_elastic_family_asks_for_its_fewest_and_may_take_its_most(
    there: dict[str, float],
) -> None:
    assert cluster.families_at_once(ELASTIC) == 3  # six workers, two for each
    assert cluster.families_at_once(ClusterConfig(workers=4, cpus_per_worker=2)) == 1
    assert cluster.workers_at_once(ELASTIC, trainings=9) == 3  # of two nodes, each
    assert cluster.workers_at_once(ELASTIC, trainings=1) == 2
    assert cluster.spare_processor(ELASTIC, trainings=1)
    assert not cluster.spare_processor(ELASTIC, trainings=2)
    there["CPU"] = 3
    with pytest.raises(BadInput, match=r"2 worker\(s\) ask for 4 CPU, the cluster has 3 CPU;"):
        cluster.families_at_once(ELASTIC)


@pytest.mark.parametrize("given", [[4, 1], [0, 1], 0, [1, 2, 3], [], "two", True])
def test_impossible_numbers_of_workers_are_refused(given: Any) -> None:
    content = {"families": ["vae"], "models": {"vae": {}}, "cluster": {"workers": [1, 4]}}
    assert check_params(content).cluster.workers == (1, 4)
    with pytest.raises(BadInput, match=r"cluster\.workers: .* is neither a number of workers"):
        check_params({**content, "cluster": {"workers": given}})


def test_an_autoscaler_is_asked_and_waited_for(
    there: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def request(bundles: list[dict[str, float]]) -> None:
        asked.append(bundles)
        there["CPU"] += 2 * len(bundles)

    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", request)
    patient = ELASTIC.model_copy(update={"wait_s": 60.0})
    cluster.wait_for_room(patient)
    assert asked == []  # there is room
    there["CPU"] = 1
    cluster.wait_for_room(ELASTIC)
    assert asked == []  # nobody may wait
    cluster.wait_for_room(patient)
    assert asked == [[{"CPU": 2.0}] * 2, []]  # and nothing is held after
    assert cluster.families_at_once(patient) == 1


def test_an_autoscaler_that_brings_nothing_is_not_waited_for_longer(
    there: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: None)
    there["CPU"] = 1
    impatient = ELASTIC.model_copy(update={"wait_s": 0.2})
    cluster.wait_for_room(impatient)
    with pytest.raises(BadInput, match=r"ask for 4 CPU, the cluster has 1 CPU after 0\.2 s"):
        cluster.families_at_once(impatient)


def _share(rank: int, port: int, folder: str) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    comm = Comm.sharing(8)
    found: list[Any] = [None]
    if comm is not None:
        alone = torch.tensor([float(rank)])
        dist.all_reduce(alone)  # as `models.nn` does, of all there are
        found = [comm.rank, comm.world, float(alone), float(comm.mean(torch.tensor(rank + 1.0)))]
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{rank}.pt")


def test_workers_that_cannot_share_the_batch_stay_out_of_the_group(tmp_path: Path) -> None:
    assert Comm.sharing(7).world == 1  # type: ignore[union-attr]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_share, args=(port, str(tmp_path)), nprocs=3)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert found == [[0, 2, 1.0, 1.5], [1, 2, 1.0, 1.5], [None]]


@pytest.mark.pipeline
@pytest.mark.timeout(300)
def test_a_training_that_loses_a_node_goes_on_with_the_workers_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    prepare.run(DatasetConfig(name="toy2d", points=600), tmp_path / "prepared")
    settings = TrainConfig(
        batch_size=16,
        budget=Budget(steps=1200),
        checkpoint_every=20,
        validate_every=400,
        validation="synchronous",
        validation_images=64,
        precision="fp32",
        ema_decay=0.5,
    )
    spec = {
        "family": "realnvp",
        "config": {"width": 8, "blocks": 1, "point_couplings": 2, "hidden": 8},
        "data": read_manifest(tmp_path / "prepared")["spec"],
        "train": settings.model_dump(mode="json"),
        "prepared": str(tmp_path / "prepared"),
        "classifier": "/no/classifier/of/points",
        "threads": 1,
    }
    for name in ("elastic", "alone"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")  # see `launch`
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    second = nodes.add_node(num_cpus=1)
    lost = SimpleNamespace(at=0)

    def poll() -> None:
        steps = [int(p.name[5:13]) for p in (tmp_path / "elastic" / CHECKPOINTS).glob("step-*")]
        if not lost.at and max(steps, default=0) >= 40:
            lost.at = time.monotonic()
            nodes.remove_node(second, allow_graceful=False)

    try:
        elastic = ClusterConfig(address=nodes.address, workers=(1, 2))
        with connected(elastic):
            found = launch({**spec, "directory": str(tmp_path / "elastic")}, elastic, 2, poll)
    finally:
        nodes.shutdown()
    assert lost.at
    assert "error" not in found
    assert found["workers"] == 1
    assert 40 <= found["resumed_from"] < 1200
    assert found["progress"]["step"] == 1200
    work({**spec, "directory": str(tmp_path / "alone")})
    one, two = (load_best(tmp_path / name / CHECKPOINTS) for name in ("alone", "elastic"))
    for name in one:  # sums were taken in another order
        assert torch.allclose(one[name], two[name], atol=2e-3, rtol=1e-2), name
    assert store.build(spec["family"], spec["config"], spec["data"])
