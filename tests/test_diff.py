"""`genarena diff`: what changed, and whether it is more than noise."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_ind

from genarena.diff import show_difference
from tasks.reporting.difference import Comparison, changed_params, changes
from tasks.runs import Run

PARAMS = "families: [vae]\nseeds: [0, 1]\nmodels:\n  vae: {lr: 0.1}\n  gan: {lr: 0.1}\n"


def metrics(distance: float, **more: Any) -> dict[str, Any]:
    same = {"protocol": 3, "samples": 1000, "features_sha256": "f"}
    own = {"frechet_distance": distance, "frechet_distance_std": 0.1}
    return {**own, **same, "provenance": {"data_sha256": "d"}, "not_applicable": {}, **more}


def comparison(name: str, *distances: float, **more: Any) -> Comparison:
    runs = {Run("vae", seed): metrics(d, **more) for seed, d in enumerate(distances)}
    return Comparison(name, {"train.batch_size": 64}, runs)


def test_seeds_are_compared_by_welchs_test() -> None:
    before, after = [2.0, 2.4, 2.2], [3.0, 3.5, 3.1, 2.9]
    found, remarks = changes(comparison("a", *before), comparison("b", *after))
    (change,) = found
    assert change.p == pytest.approx(ttest_ind(before, after, equal_var=False).pvalue)
    assert change.word == "worse"
    assert not change.one_seed
    assert remarks == ["vae: seeds 0, 1, 2 against 0, 1, 2, 3"]


@pytest.mark.parametrize(("after", "word"), [(2.27, "noise"), (2.28, "worse"), (1.7, "better")])
def test_one_seed_is_judged_by_its_subsets(after: float, word: str) -> None:
    """1.96 standard deviations of the difference, sqrt(2) 0.1, are 0.277."""
    (change,), _ = changes(comparison("a", 2.0), comparison("b", after))
    assert change.word == word
    assert change.one_seed


def test_the_direction_is_that_of_the_metric() -> None:
    a, b = comparison("a", 2.0, psnr=20.0), comparison("b", 2.0, psnr=21.0)
    found = {change.metric: change for change in changes(a, b)[0]}
    assert found["psnr"].word == "better"
    assert found["psnr"].p is None  # no spread is known: no chance is made up
    assert found["frechet_distance"].word == "equal"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"provenance": {"data_sha256": "e"}}, "other data"),
        ({"protocol": 4}, "another protocol version"),
        ({"features_sha256": "g"}, "other features"),
    ],
)
def test_what_does_not_compare_is_not_compared(more: dict[str, Any], words: str) -> None:
    found, remarks = changes(comparison("a", 2.0), comparison("b", 1.0, **more))
    assert found == []
    assert remarks == [f"vae: not comparable: {words}"]


def test_a_float_of_mlflow_is_the_number_it_was() -> None:
    assert changes(comparison("a", 2.0), comparison("b", 1.0, protocol=3.0))[1] == []


def test_parameters_that_appear_or_vanish_are_changes() -> None:
    a, b = Comparison("a", {"x": 1, "y": 2}), Comparison("b", {"y": 3, "z": 4})
    assert changed_params(a, b) == [("x", 1, None), ("y", 2, 3), ("z", None, 4)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits, tagged; the folder as it is has a worse vae of another learning rate."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "params.yaml").write_text(PARAMS)
    write(tmp_path, 2.0, 2.1)
    git("add", "-A")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x")
    git("tag", "before")
    (tmp_path / "params.yaml").write_text(PARAMS.replace("vae: {lr: 0.1}", "vae: {lr: 0.3}"))
    write(tmp_path, 5.0, 5.1)
    return tmp_path


def git(*words: str) -> None:
    subprocess.run(["git", *words], check=True)


def write(path: Path, *distances: float) -> None:
    for seed, distance in enumerate(distances):
        (path / "metrics" / f"vae-{seed}.json").write_text(json.dumps(metrics(distance)))
    (path / "metrics" / "gan-0.json").write_text(json.dumps(metrics(9.0)))  # of an earlier run
    (path / "metrics" / "vae-7.failed.json").write_text('{"stage": "train", "reason": "x"}')


def test_a_git_revision_against_the_folder(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_difference("before", ".")
    out = capsys.readouterr().out
    assert "models.vae.lr: 0.1 -> 0.3" in out
    assert "gan" not in out
    row = next(line for line in out.splitlines() if "frechet_distance" in line)
    assert all(word in row for word in ("2.05", "5.05", "worse"))
    show_difference("before", "HEAD")
    out = capsys.readouterr().out
    assert "the parameters are the same" in out
    assert "equal" in out
