"""The process that validates beside a training: the same numbers, and it may die at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from models import store
from tasks import prepare
from tasks.cluster import spare_processor
from tasks.data.config import DatasetConfig
from tasks.data.shards import read_manifest
from tasks.params import ClusterConfig
from tasks.training.background import DEATHS, Background
from tasks.training.candidates import Candidates, load_best
from tasks.training.config import Budget, TrainConfig
from tasks.training.history import HISTORY, Journal, read_history
from tasks.training.loop import Outcome, train
from tasks.training.memory import read
from tasks.training.selection import Inline, Scorer, ValidationFailed
from tasks.training.validation import PICTURES, Validator
from tasks.training.worker import CHECKPOINTS

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
SETTINGS = TrainConfig(
    batch_size=16,
    budget=Budget(steps=9),
    log_every=2,
    validate_every=2,
    checkpoint_every=2,
    validation_images=64,
    precision="fp32",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points") / "prepared"
    prepare.run(DatasetConfig(name="toy2d", points=600), folder)
    return folder


def spec_of(prepared: Path, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "family": "realnvp",
        "config": {"width": 8, "blocks": 1, "point_couplings": 2, "hidden": 8},
        "data": read_manifest(prepared)["spec"],
        "train": SETTINGS.model_dump(mode="json"),
        "prepared": str(prepared),
        "classifier": "/no/classifier/of/points",
        "directory": str(directory),
        "threads": 1,
    }


def run(spec: dict[str, Any], scorer: Scorer, **options: Any) -> Outcome:
    torch.manual_seed(0)
    model = store.build(spec["family"], spec["config"], spec["data"])
    directory = Path(spec["directory"])
    journal = Journal(directory / HISTORY)
    return train(
        model,
        read(Path(spec["prepared"]), model.data),
        TrainConfig(**spec["train"]),
        directory / CHECKPOINTS,
        validate=scorer,
        on_resume=journal.rewind,
        on_record=journal,
        **options,
    )


def result(spec: dict[str, Any]) -> tuple[Any, ...]:
    directory = Path(spec["directory"])
    records = [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second")}
        for r in read_history(directory / HISTORY)
    ]
    weights = {k: t.tolist() for k, t in load_best(directory / CHECKPOINTS).items()}
    return records, weights, sorted(p.name for p in (directory / PICTURES).glob("*.png"))


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def synchronous(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    spec = spec_of(prepared, tmp_path_factory.mktemp("synchronous"))
    outcome = run(spec, Inline(Validator.of(spec, CPU)))
    assert outcome.finished
    found = result(spec)
    assert [r["step"] for r in found[0] if "validation/bits_per_dim" in r] == [2, 4, 6, 8, 9]
    return *found, outcome.best_step, outcome.best_score


class Watched(Background):
    """Kills or freezes its process when a moment has come, once."""

    def __init__(self, spec: dict[str, Any], at: str, number: int) -> None:
        super().__init__(spec, CPU)
        self.at, self.number, self.done, self.nice = at, number, False, 0

    def poll(self) -> None:
        assert self.process is not None
        super().poll()
        scored = bool(self.candidates.scored())
        if not self.done and (self.at == "start" or (self.at == "scored" and scored)):
            self.done = True
            self.nice = psutil.Process(self.process.pid).nice()
            os.kill(self.process.pid, self.number)


@pytest.mark.parametrize("at", ["never", "start", "scored"])
def test_it_finds_what_a_training_that_waits_finds_though_it_is_killed(
    at: str, prepared: Path, tmp_path: Path, synchronous: tuple[Any, ...]
) -> None:
    spec = spec_of(prepared, tmp_path)
    scorer = Watched(spec, at, signal.SIGKILL)
    outcome = run(spec, scorer)
    assert outcome.finished
    assert (*result(spec), outcome.best_step, outcome.best_score) == synchronous
    assert scorer.done == (at != "never")
    if at == "scored":
        assert scorer.nice >= 10  # it yields
    assert scorer.process is not None
    assert scorer.process.returncode == -signal.SIGKILL  # nobody is left behind


def test_stopped_before_anything_is_scored_the_next_run_scores_it(
    prepared: Path, tmp_path: Path, synchronous: tuple[Any, ...]
) -> None:
    spec, calls = spec_of(prepared, tmp_path), iter(range(1000))
    frozen = Watched(spec, "start", signal.SIGSTOP)
    stopped = run(spec, frozen, should_stop=lambda: next(calls) >= 5)
    assert not stopped.finished
    assert stopped.best_step is None
    assert Candidates(Path(spec["directory"]) / CHECKPOINTS).waiting() == [2, 4, 6]
    assert not psutil.pid_exists(frozen.process.pid)  # type: ignore[union-attr]
    outcome = run(spec, Background(spec, CPU))
    assert (*result(spec), outcome.best_step, outcome.best_score) == synchronous


@pytest.mark.parametrize(
    ("there", "workers", "trainings", "expected"),
    [
        ({"CPU": 2.0}, 1, 1, True),
        ({"CPU": 2.0}, 1, 3, False),  # two at once take both
        ({"CPU": 2.0}, 2, 3, False),
        ({"CPU": 8.0}, 1, 3, True),
        ({"CPU": 16.0, "GPU": 1.0}, 1, 20, True),  # one at once: there is one GPU
        ({"CPU": 1.0}, 1, 1, False),
    ],
)
def test_a_spare_processor_is_one_that_no_training_takes(
    there: dict[str, float],
    workers: int,
    trainings: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    assert spare_processor(ClusterConfig(workers=workers), trainings) is expected


def test_its_error_is_the_trainings(prepared: Path, tmp_path: Path) -> None:
    spec = spec_of(prepared, tmp_path)
    broken = Background({**spec, "prepared": "/nowhere"}, CPU)
    with pytest.raises(ValidationFailed, match=r"BadInput: /nowhere holds no prepared data"):
        run(spec, broken)
    assert Candidates(tmp_path / CHECKPOINTS).waiting()  # mended, the next run scores them


def test_killed_again_and_again_it_is_given_up(prepared: Path, tmp_path: Path) -> None:
    class Doomed(Background):
        spawned = 0

        def _spawn(self) -> None:
            super()._spawn()
            self.spawned += 1
            self.process.kill()  # type: ignore[union-attr]

    spec = spec_of(prepared, tmp_path)
    doomed = Doomed(spec, CPU)
    with pytest.raises(ValidationFailed, match=r"step 2: its process was killed 3 times.*signal 9"):
        run(spec, doomed)
    assert DEATHS <= doomed.spawned <= DEATHS + 1  # once perhaps before there was a candidate


def test_it_ends_with_its_training(prepared: Path, tmp_path: Path) -> None:
    """However that dies: `kill -9` leaves nobody to tell it."""
    spec = spec_of(prepared, tmp_path)
    folder = tmp_path / CHECKPOINTS / "candidates"
    folder.mkdir(parents=True)
    (folder / "validator.json").write_text(json.dumps({**spec, "device": "cpu"}))
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.training.validator", str(folder)],
        stdin=subprocess.PIPE,
        # pytest in the background of a shell ignores it, and would hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        torch.manual_seed(0)
        model = store.build(spec["family"], spec["config"], spec["data"])
        candidates = Candidates(tmp_path / CHECKPOINTS)
        candidates.add(4, model.state_dict())
        wait_until(lambda: candidates.scored() == [4])
        process.send_signal(signal.SIGINT)  # Ctrl-C is for the training to handle
        candidates.add(6, model.state_dict())
        wait_until(lambda: process.poll() is not None or candidates.scored() == [4, 6])
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_the_loss_is_the_mean_over_the_validation_split(prepared: Path, tmp_path: Path) -> None:
    spec = spec_of(prepared, tmp_path)
    spec["train"] |= {"select": "loss", "validation_images": 59}
    validator = Validator.of(spec, CPU)

    class Told(torch.nn.Module):
        conditions, likelihood, device = frozenset[str](), "none", CPU
        data = store.build(spec["family"], spec["config"], spec["data"]).data

        def phases(self) -> tuple[Any, ...]:
            return (type("Phase", (), {"name": "only"}),)

        def losses(self, batch: Any, phase: str) -> dict[str, torch.Tensor]:
            assert phase == "only"
            return {"loss": batch.x.double().mean()}

        def sample(self, n: int, **options: Any) -> torch.Tensor:
            return torch.zeros(n, 2, dtype=torch.uint8)

    metrics = validator(Told(), 1)  # type: ignore[arg-type]
    expected = float(validator.split.x[:59].astype(float).mean())
    assert len(validator.split.x) >= 59
    assert metrics["score"] == metrics["loss"] == pytest.approx(expected)
