"""Checkpoints: damage is passed over, nothing pickled is loaded, writing is atomic."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from tasks.training.candidates import Candidates
from tasks.training.checkpoint import Checkpoints, StorageFailed
from tasks.training.config import Budget, TrainConfig
from tasks.training.history import Journal
from tasks.training.loop import train
from tests.conftest import tiny_data, tiny_images, tiny_model
from tests.disks import fill, small_disk


def checkpoints(directory: Path, fill: float = 0.0) -> Checkpoints:
    model = tiny_model("vae")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    optimizer = torch.optim.Adam(model.parameters())
    model.losses(type("B", (), {"x": tiny_images(4)})(), "main")["loss"].backward()
    optimizer.step()
    return Checkpoints(directory, model, AveragedModel(model), [optimizer])


def first_weight(saved: Checkpoints) -> float:
    return float(next(saved.model.parameters()).flatten()[0])


@pytest.mark.parametrize(
    "file", ["model.safetensors", "average.safetensors", "optimizer.pt", "progress.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_newest_one_falls_back(tmp_path: Path, file: str, damage: str) -> None:
    older, newer = checkpoints(tmp_path, 0.25), checkpoints(tmp_path, 0.75)
    older.save({"step": 5})
    newer.save({"step": 9})
    victim = tmp_path / "step-00000009" / file
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    fresh = checkpoints(tmp_path)
    assert fresh.load_latest() == {"step": 5}
    assert first_weight(fresh) == first_weight(older)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    saved.save({"step": 1})
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (marker,))

    with (tmp_path / "step-00000001" / "optimizer.pt").open("wb") as file:
        pickle.dump(Evil(), file)
    assert checkpoints(tmp_path).load_latest() == {}
    assert not marker.exists()


def test_the_newest_two_are_kept_and_leftovers_ignored(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    for step in (1, 2, 3):
        saved.save({"step": step})
    (tmp_path / "step-00000009.tmp").mkdir()  # a kill in the middle of writing
    assert sorted(p.name for p in tmp_path.glob("step-*[0-9]")) == [
        "step-00000002",
        "step-00000003",
    ]
    assert checkpoints(tmp_path).load_latest() == {"step": 3}


def test_a_failed_write_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoints(tmp_path)
    saved.save({"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageFailed, match=r"checkpoint of step 2 .* No space left .* are free"):
        saved.save({"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_stops_training_and_loses_nothing(tmp_path: Path) -> None:
    """Full while the checkpoint of step 6 is written, then mended: a straight run's weights."""
    settings = TrainConfig(
        batch_size=8, budget=Budget(steps=9), log_every=1, validate_every=3, checkpoint_every=3
    )

    def run(directory: Path, full_at: int | None = None) -> tuple[torch.nn.Module, int]:
        def on_record(record: dict[str, float]) -> None:
            if record["step"] == full_at:
                fill(directory)

        model = tiny_model("vae")
        data = tiny_data(40, model.data)
        return model, train(model, data, settings, directory, on_record=on_record).resumed_from

    straight, _ = run(tmp_path / "straight")
    disk = tmp_path / "disk"
    with small_disk(disk, 8):
        with pytest.raises(StorageFailed, match=r"step 6 could not .* 0\.0 MiB are free"):
            run(disk, full_at=6)
        assert [p.name for p in disk.glob("step-*")] == ["step-00000003"]
        (disk / "filler").unlink()
        resumed, resumed_from = run(disk)
    assert resumed_from == 3
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_candidates_and_records_say_that_the_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 4):
        candidates, journal = Candidates(disk), Journal(disk / "history.jsonl")
        weights = {"w": torch.zeros(1000)}
        candidates.add(1, weights)
        journal({"step": 1})
        fill(disk)
        with pytest.raises(StorageFailed, match=r"step-00000002\.safetensors could not be written"):
            candidates.add(2, weights)
        with pytest.raises(StorageFailed, match="record of step 2 could not be written"):
            journal({"step": 2, "loss": "x" * 5000})
        assert candidates.waiting() == [1]
        assert not list(disk.glob("candidates/*.tmp-*"))
