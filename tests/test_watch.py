"""What the driver says of a training, and what of it reaches MLflow, late numbers included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from tasks.delivery import send_history
from tasks.training.candidates import Candidates
from tasks.training.config import Budget
from tasks.training.history import HISTORY, Journal, read_history
from tasks.training.watch import Watch

RECORD = {
    "step": 500,
    "images": 32_000,
    "seconds": 30.0,
    "flops": 4 * 10**12,
    "images_per_second": 1000.0,
    "main/loss": 1.5,
}


class Tracked:
    """In MLflow's place."""

    def __init__(self) -> None:
        self.answers = [True]
        self.sent: list[int] = []

    def deliver(self, records: list[dict[str, Any]]) -> bool:
        self.sent.append(sum("validation/score" in r for r in records))
        return self.answers.pop() if self.answers else True


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(steps=2000), "step 500/2,000 (25%)  main loss 1.500"),
        (Budget(images=64_000), "step 500  32,000/64,000 images (50%)  main loss"),
        (Budget(minutes=5), "step 500  0.5/5 minutes (10%)  main loss"),
        (Budget(flops=1e13), "step 500  4.00e+12/1.00e+13 FLOPs (40%)  main loss"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_the_line_speaks_of_every_budget(
    budget: Budget, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(tmp_path / HISTORY)(RECORD)
    Watch(tmp_path, budget, Tracked())()  # type: ignore[arg-type]
    line = capsys.readouterr().out
    assert line.startswith(words)
    share = int(line.split("(")[1].split("%")[0]) / 100
    left = round(30 * (1 - share) / share)
    assert line.endswith(f"1,000 images/s  ETA {left // 60}:{left % 60:02d}\n")


def test_late_numbers_are_shown_and_what_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100, 10_000, 10))
    monkeypatch.setattr("tasks.training.watch.time.monotonic", lambda: next(clock))
    journal, tracked = Journal(tmp_path / HISTORY), Tracked()
    watch = Watch(tmp_path, Budget(steps=500), tracked)  # type: ignore[arg-type]
    candidates = Candidates(tmp_path / "checkpoints")
    for step in (250, 500):
        journal({**RECORD, "step": step})
        candidates.add(step, {"w": torch.zeros(1)})
    watch()
    assert "bits_per_dim" not in capsys.readouterr().out
    watch()
    watch()
    assert capsys.readouterr().out == "step 500: waiting for 2 validations\n"
    candidates.put(250, {"score": 2.5})
    journal({"step": 250, "validation/score": 2.5, "validation/bits_per_dim": 2.5})
    watch()
    assert capsys.readouterr().out == "step 500: waiting for 1 validation\n"
    journal({**RECORD, "step": 501})
    watch()
    assert "validation loss" not in (line := capsys.readouterr().out)
    assert "bits_per_dim 2.500" in line
    assert tracked.sent == [0, 1, 1]  # each time that there was something new, a step or a score


def test_what_could_not_be_delivered_is_tried_again(tmp_path: Path) -> None:
    Journal(tmp_path / HISTORY)(RECORD)
    tracked = Tracked()
    tracked.answers = [True, False]  # the last first
    watch = Watch(tmp_path, Budget(steps=500), tracked)  # type: ignore[arg-type]
    for _ in range(4):
        watch()
    assert len(tracked.sent) == 2


def test_late_numbers_and_pictures_reach_mlflow_once(tmp_path: Path) -> None:
    from tasks.pictures import save_grid

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("x", f"file://{tmp_path}/mlruns")
    run = client.create_run(experiment).info.run_id
    journal, pictures = Journal(tmp_path / HISTORY), tmp_path / "samples"

    def send() -> None:
        send_history(client, run, read_history(tmp_path / HISTORY), pictures)

    def validate(step: int) -> None:
        save_grid(pictures / f"step-{step:08d}.png", torch.zeros(4, 1, 8, 8), 4)
        journal({"step": step, "validation/score": step / 100})

    for step in (100, 200, 300):
        journal({**RECORD, "step": step, "seconds": step / 10})
        send()
    assert client.get_metric_history(run, "validation/score") == []
    for step in (100, 200):  # after the step 300 has been delivered
        validate(step)
        send()
        send()
    journal.rewind(250)  # as a resumed run does; it tells again, and goes on
    for step in (100, 200):
        validate(step)
    journal({**RECORD, "step": 300, "seconds": 30.0})
    validate(300)
    journal({**RECORD, "step": 400, "seconds": 40.0})
    send()
    send()
    scores = client.get_metric_history(run, "validation/score")
    assert [(m.step, m.value, m.timestamp) for m in scores] == [
        (100, 1.0, 10_000),
        (200, 2.0, 20_000),
        (300, 3.0, 30_000),
    ]
    losses = client.get_metric_history(run, "main/loss")
    assert [m.step for m in losses] == [100, 200, 300, 400]
    images = [a.path for a in client.list_artifacts(run, "images")]
    steps = [re.search(r"step\D(\d+)", path) for path in images if path.endswith(".png")]
    assert sorted(int(found[1]) for found in steps if found) == [100, 200, 300]
