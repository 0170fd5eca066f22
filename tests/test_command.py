"""The console command and the files around it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from models import FAMILIES
from tests import projects


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return projects.make_project(tmp_path_factory.mktemp("command") / "project", {})


def test_help_imports_nothing_heavy(project: Path) -> None:
    code = (
        "import sys, genarena.cli; "
        "print([m for m in ('torch', 'ray', 'prefect', 'mlflow', 'pandas') if m in sys.modules])"
    )
    assert projects.command(project, sys.executable, "-c", code).stdout == "[]\n"
    shown = projects.genarena(project, "--help").stdout
    assert all(name in shown for name in ("run", "families", "sample", "ui", "doctor"))


WRONG = [
    (["run", "--families", "vae dcgn"], "families: unknown family 'dcgn'; did you mean 'dcgan'?"),
    (["run", "--dataset", "mnst"], "did you mean 'mnist'?"),
    (["run", "--data-path", "/nowhere"], "dataset.path: /nowhere does not exist"),
    (["run", "--set", "train.batch_size"], "expected key=value"),
    (["run", "--set", "train.select_=auto"], "train.select_: unknown key; did you mean 'select'?"),
    (
        ["run", "--families", "pix2pix"],
        "pix2pix cannot learn from this data: it needs pairs",
    ),
    (["run", "--families", "vae stackgan"], "stackgan cannot learn from this data: it needs capti"),
    (["run", "--captions", "a seven"], "every template needs {name}"),
    (["sample", "cgan", "--source", "/nowhere.png"], "--source: no file at /nowhere.png"),
    (
        ["run", "--steps", "5", "--minutes", "2"],
        "train.budget: needs exactly one of steps, images, minutes or flops; got steps and minutes",
    ),
    (["run", "--images", "5", "--flops", "1e9"], "minutes or flops; got images and flops"),
    (["run", "--flops", "-1"], "train.budget.flops: should be greater than 0, got -1"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=lambda v: str(v)[:30])
def test_bad_options_are_one_line_and_change_nothing(
    project: Path, words: list[str], line: str
) -> None:
    before = (project / "params.yaml").read_bytes()
    done = projects.genarena(project, *words)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("genarena: ")
    assert (project / "params.yaml").read_bytes() == before


def test_all_is_what_can_learn_from_the_data(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genarena.command import _suited

    monkeypatch.chdir(project)
    plain = _suited({})
    assert {"vae", "dcgan", "cgan"} <= set(plain)
    assert not {"pix2pix", "srgan", "stackgan"} & set(plain)
    assert "left out: srgan: it enlarges small images" in capsys.readouterr().out
    small = _suited({"dataset.derive": "low_resolution"})
    assert set(small) - set(plain) == {"srgan"}
    told = _suited({"dataset.captions": ["a {name}"]})
    assert set(told) - set(plain) == {"stackgan"}
    unpaired = _suited({"dataset.derive": "edges", "dataset.paired": False})
    assert set(unpaired) - set(plain) == {"cyclegan"}


def test_another_data_set_starts_from_plain_images() -> None:
    from genarena.command import _changes

    changes = _changes("digits", "", "", "", ["dataset.derive=edges"])
    assert changes["dataset.derive"] == "edges"
    assert changes["dataset.paired"] is True
    assert changes["dataset.captions"] == []
    assert _changes("", "", "", "a {name}; b {name}", []) == {
        "dataset.captions": ["a {name}", "b {name}"]
    }


def test_another_kind_of_data_starts_with_families_that_suit_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genarena.command import STARTERS, _starters

    monkeypatch.chdir(project)
    assert _starters({"dataset.name": "mnist"}) == {}
    assert _starters({"dataset.name": "text"}) == {"families": ["transformer", "hmm"]}
    assert _starters({"dataset.name": "toy2d"})["families"][0] == "realnvp"
    assert _starters({"dataset.name": "toy2d", "families": ["gmm"]}) == {}
    for modality, names in STARTERS.items():
        assert all(modality in FAMILIES[name].modalities for name in names)


def test_outside_of_a_project(tmp_path: Path) -> None:
    done = projects.run(tmp_path, sys.executable, "-m", "genarena", "run")
    assert done.returncode == 2
    assert "run this in the project's folder" in done.stderr


def test_families_lists_them_all(project: Path) -> None:
    shown = projects.genarena(project, "families").stdout
    for name, family in FAMILIES.items():
        assert re.search(rf"{name}\b.*{family.likelihood}", shown)


def test_doctor_names_what_does_not_answer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = projects.genarena(project, "doctor")
    assert done.returncode == 1
    assert re.search(r"missing\s+MLflow server at http://127.0.0.1:9 does not answer", done.stdout)
    assert re.search(r"ok\s+torch 2\.14\.1", done.stdout)


def test_dvc_stages_list_files_that_exist(root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        for dependency in stage["deps"]:
            if dependency.startswith(("tasks/", "models/")):
                for family in FAMILIES:
                    path = root / dependency.replace("${item.family}", family)
                    assert path.exists(), f"{name}: {dependency}"


def test_versions_are_pinned_without_addresses(root: Path) -> None:
    lines = [
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!\-]+", line) for line in lines)
    assert {"torch==2.14.1", "torchvision==0.29.1", "prefect==3.8.8"} <= set(lines)
