"""Validation that comes later: the same best, the same history, whoever is late or killed."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.base import GenerativeModel
from tasks.training.candidates import Candidates, load_best
from tasks.training.checkpoint import save_tensors
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.history import HISTORY, Journal, read_history
from tasks.training.loop import Outcome, train
from tasks.training.selection import WAITING, Scorer, score_waiting
from tasks.training.turns import NonFiniteLoss
from tests.conftest import tiny_data, tiny_model

SCORES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 1.0, 10: 2.0, 12: 1.0, 14: 6.0, 16: 7.0}
BEST = 12  # the later of equals


class Late(Scorer):
    """Scores one candidate when more than `lag` wait, or when it is polled often in a row."""

    def __init__(self, lag: int, scores: dict[int, float] = SCORES) -> None:
        self.lag, self.scores, self.polls, self.stopped = lag, scores, 0, False
        self.most_waiting, self.most_weights = 0, 0

    def start(self, candidates: Candidates, model: GenerativeModel) -> None:
        self.candidates, self.model = candidates, model

    def poll(self) -> None:
        waiting = self.candidates.waiting()
        self.most_waiting = max(self.most_waiting, len(waiting))
        weights = len(list(self.candidates.directory.glob("*.safetensors")))
        self.most_weights = max(self.most_weights, weights)
        self.polls += 1
        if len(waiting) > self.lag or (waiting and self.polls % 5 == 0):
            self.candidates.put(waiting[0], {"score": self.scores[waiting[0]]})

    def stop(self) -> None:
        self.stopped = True


class Killed(BaseException):
    """As if by `kill -9`: nothing is tidied up that a dead process would not tidy up."""


def run(
    directory: Path, scorer: Any, steps: int = 16, *, die_at: int = -1, **options: Any
) -> Outcome:
    """Train a small model; dies at call `die_at` of the loop's looking whether to stop."""
    model, calls = tiny_model("vae"), iter(range(10_000))
    settings = TrainConfig(
        batch_size=8,
        budget=Budget(steps=steps),
        log_every=1,
        validate_every=2,
        checkpoint_every=options.pop("checkpoint_every", 3),
        precision="fp32",
    )
    journal = Journal(directory / HISTORY)

    def stop() -> bool:
        if next(calls) == die_at:
            raise Killed
        return False

    options = {"should_stop": stop, "on_resume": journal.rewind, "on_record": journal, **options}
    data = tiny_data(40, model.data)
    return train(model, data, settings, directory, validate=scorer, **options)


def result(directory: Path) -> tuple[Any, ...]:
    """All that must be the same: the best weights, and the history without its clock."""
    records = [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second")}
        for r in read_history(directory / HISTORY)
    ]
    weights = {name: t.tolist() for name, t in load_best(directory).items()}
    return records, weights


def inline(model: GenerativeModel, step: int) -> dict[str, float]:
    return {"score": SCORES.get(step, 9.0)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("straight")
    outcome = run(folder, inline)
    assert (outcome.best_step, outcome.best_score) == (BEST, 1.0)
    records = read_history(folder / HISTORY)
    assert {r["step"]: r["validation/score"] for r in records if "validation/score" in r} == SCORES
    return result(folder)


@pytest.mark.parametrize("lag", [0, 1, 3, 100])
def test_a_late_scorer_finds_the_same(lag: int, tmp_path: Path, straight: tuple[Any, ...]) -> None:
    scorer = Late(lag)
    outcome = run(tmp_path, scorer)
    assert outcome.finished
    assert (outcome.best_step, outcome.best_score) == (BEST, 1.0)
    assert result(tmp_path) == straight
    assert scorer.stopped
    assert scorer.most_waiting <= WAITING + 1  # then training waits
    if lag == 100:
        assert scorer.most_waiting == WAITING + 1
    # those that wait, the best up to the older checkpoint, and what has beaten it since
    assert scorer.most_weights <= WAITING + 1 + 1 + 3


@pytest.mark.parametrize("lag", [0, 2, 100])
def test_killed_anywhere_it_goes_on_to_the_same(
    lag: int, tmp_path: Path, straight: tuple[Any, ...]
) -> None:
    for die_at in (2, 6, 9, 15):
        folder = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(folder, Late(lag), die_at=die_at)
        outcome = run(folder, Late(lag))
        assert outcome.finished
        assert (outcome.best_step, outcome.best_score) == (BEST, 1.0), die_at
        assert result(folder) == straight, die_at


def test_killed_while_it_waits_at_the_end(tmp_path: Path, straight: tuple[Any, ...]) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Never(), steps=16, die_at=15 + 40)
    waiting = Candidates(tmp_path, 2).waiting()
    assert waiting  # nothing of it was lost
    outcome = run(tmp_path, inline)
    assert outcome.finished
    assert outcome.resumed_from == max(waiting)
    assert result(tmp_path) == straight


def test_a_score_that_comes_between_two_looks_is_told(
    tmp_path: Path, straight: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives just before the training sees that nothing waits any more."""
    honest, seen = Candidates.waiting, set[int]()

    def waiting(self: Candidates) -> list[int]:
        for step in seen.intersection(honest(self)):  # at the second look it is there
            self.put(step, {"score": SCORES[step]})
        seen.update(honest(self))
        return honest(self)

    class Elsewhere(Late):
        def poll(self) -> None: ...

    monkeypatch.setattr(Candidates, "waiting", waiting)
    assert run(tmp_path, Elsewhere(0)).finished
    assert result(tmp_path) == straight


class Never(Late):
    """Scores only as much as lets training go on to its end."""

    def __init__(self) -> None:
        super().__init__(WAITING)

    def poll(self) -> None:
        waiting = self.candidates.waiting()
        if len(waiting) > WAITING:
            self.candidates.put(waiting[0], {"score": self.scores[waiting[0]]})


def test_asked_to_stop_it_leaves_what_waits_to_the_next(
    tmp_path: Path, straight: tuple[Any, ...]
) -> None:
    for at in (5, 16, 20):  # in the middle; in the last step; while it waits at the end
        folder, calls = tmp_path / str(at), iter(range(1000))
        stopped = run(folder, Never(), should_stop=lambda at=at, c=calls: next(c) >= at - 1)
        assert not stopped.finished
        assert stopped.progress.step == min(at, 16)
        assert Candidates(folder, 2).waiting()
        again = run(folder, Late(0))
        assert again.finished
        assert again.resumed_from == min(at, 16)
        assert result(folder) == straight


def test_a_last_candidate_off_schedule_does_not_outlive_a_longer_training(
    tmp_path: Path, straight: tuple[Any, ...]
) -> None:
    """Steps 7 and 13 end a training and beat all others; a training that goes on never had them."""
    for steps in (7, 13):
        scores = {**SCORES, steps: 0.5}
        short = run(tmp_path, Late(1, scores), steps=steps)
        assert (short.best_step, short.best_score) == (steps, 0.5)
        assert len(list((tmp_path / "candidates").glob("*.safetensors"))) <= 5
    outcome = run(tmp_path, Late(1))
    assert (outcome.best_step, outcome.best_score) == (BEST, 1.0)
    assert result(tmp_path) == straight


def test_what_came_after_a_damaged_checkpoint_is_undone(tmp_path: Path) -> None:
    """Step 8 beats step 4; training goes back to step 6 and ends there: 4 is the best again."""
    run(tmp_path, inline, steps=9)
    assert Candidates(tmp_path, 2).best() == (8, 1.0)
    (tmp_path / "step-00000009" / "optimizer.pt").unlink()
    outcome = run(tmp_path, inline, steps=6)
    assert (outcome.resumed_from, outcome.progress.step) == (6, 6)
    assert (outcome.best_step, outcome.best_score) == (4, 3.0)
    assert load_best(tmp_path)
    assert [r["step"] for r in read_history(tmp_path / HISTORY)] == [1, 2, 3, 4, 5, 6]


def test_which_weights_are_kept(tmp_path: Path) -> None:
    candidates = Candidates(tmp_path, 2)
    for step, score in SCORES.items():
        candidates.directory.mkdir(exist_ok=True)
        save_tensors({"w": torch.tensor([float(step)])}, candidates._weights(step))
        candidates.put(step, {"score": score})
    save_tensors({"w": torch.zeros(1)}, candidates._weights(18))  # still waits

    def kept() -> list[int]:
        return sorted(int(p.stem[5:]) for p in candidates.directory.glob("*.safetensors"))

    candidates.prune(5)  # training may go on from 5, or from 8: 4, 8 or 12 can be the best
    assert kept() == [4, 8, 12, 18]
    candidates.prune(9)
    assert kept() == [8, 12, 18]
    candidates.prune(16)
    assert kept() == [12, 18]
    assert candidates.load(12)["w"] == 12.0


@pytest.mark.parametrize("lag", [0, 2])
def test_a_score_that_is_not_finite_names_its_step(lag: int, tmp_path: Path) -> None:
    scorer = Late(lag, {**SCORES, 4: math.nan})
    with pytest.raises(NonFiniteLoss, match=r"step 4, validation: the score is nan"):
        run(tmp_path, scorer)
    assert scorer.stopped
    records = read_history(tmp_path / HISTORY)
    assert [r["step"] for r in records if "validation/score" in r] == [2]
    assert "NaN" not in (tmp_path / HISTORY).read_text()


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    good = run(Path(folder) / "good", Late(2), comm=Comm())
    told: dict[str, Any] = {"step": good.progress.step, "best": [good.best_step, good.best_score]}
    try:
        run(Path(folder) / "bad", Late(0, {**SCORES, 4: math.nan}), comm=Comm())
    except NonFiniteLoss as error:
        told["error"] = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_several_workers_have_one_selection_and_end_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["best"] == [BEST, 1.0]
    assert other["step"] == first["step"] == 16
    assert first["error"] == "step 4, validation: the score is nan"
    assert other["error"] == "the first worker could not go on"


def test_scoring_loads_each_candidate(tmp_path: Path) -> None:
    """Never the weights that happen to be in the model."""
    model, candidates = tiny_model("vae"), Candidates(tmp_path)
    for step in (3, 7):
        weights = {k: torch.full_like(v, step) for k, v in model.state_dict().items()}
        candidates.add(step, weights)
    seen: list[tuple[int, float]] = []

    def validate(model: GenerativeModel, step: int) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append((step, float(next(model.parameters()).flatten()[0])))
        return {"score": 0.0}

    assert score_waiting(candidates, model, validate) == 2
    assert seen == [(3, 3.0), (7, 7.0)]
    assert candidates.waiting() == []


def test_the_history_is_merged_and_rewound(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    journal = Journal(path)
    for record in (
        {"step": 2, "seconds": 1.0, "main/loss": 3.0},
        {"step": 4, "seconds": 2.0, "main/loss": 2.0},
        {"step": 2, "validation/score": 9.0},
        {"step": 6, "seconds": 3.0, "main/loss": 1.0},
    ):
        journal(record)
    with path.open("a") as file:
        file.write('{"step": 8, "main/lo')  # a kill in the middle of a line
    assert read_history(path)[0] == {
        "step": 2,
        "seconds": 1.0,
        "main/loss": 3.0,
        "validation/score": 9.0,
    }
    assert [r["step"] for r in read_history(path)] == [2, 4, 6]
    journal.rewind(4)
    journal({"step": 2, "validation/score": 9.0})
    assert [(r["step"], len(r)) for r in read_history(path)] == [(2, 4), (4, 3)]
