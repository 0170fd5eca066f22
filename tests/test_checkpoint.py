"""Checkpoints: damage is passed over, nothing pickled is loaded, writing is atomic."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from tasks.training.checkpoint import Checkpoints
from tests.conftest import tiny_images, tiny_model


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
    with pytest.raises(OSError, match="No space"):
        saved.save({"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
