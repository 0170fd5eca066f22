"""`params.yaml`: typed, strict, and never half written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from models import FAMILIES
from tasks.errors import BadInput
from tasks.params import check_params, load_params, override_params


@pytest.fixture
def params_file(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(root / "params.yaml", tmp_path / "params.yaml"))


def test_the_projects_params_are_valid_and_frozen(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert set(params.families) <= set(FAMILIES)
    with pytest.raises(ValidationError):
        params.train.batch_size = 3  # type: ignore[misc]


def test_params_spell_every_field_and_match_the_defaults(root: Path) -> None:
    """A hyperparameter stands in two places: the Config and params.yaml, alike."""
    content = YAML(typ="safe").load((root / "params.yaml").read_text())
    params = load_params(root / "params.yaml")
    for family, section in content["models"].items():
        config = FAMILIES[family].Config
        assert set(section) == set(config.model_fields), family
        assert params.models[family] == config(), family
    for name in ("train", "dataset", "classifier", "evaluation", "cluster", "tracking"):
        assert set(content[name]) == set(type(getattr(params, name)).model_fields), name


WRONG = [
    ({"train.batch_sise": 3}, "train.batch_sise: unknown key; did you mean 'batch_size'?"),
    ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
    ({"train.batch_size": "many"}, "train.batch_size: should be a valid integer"),
    ({"train.batch_size": 0}, "train.batch_size: should be greater than 0, got 0"),
    ({"train.ema_decay": 1.5}, "train.ema_decay: should be less than 1, got 1.5"),
    ({"train.precision": "fp16"}, "got 'fp16'; did you mean 'bf16'?"),
    (
        {"train.budget": {"steps": 1, "minutes": 1}},
        "train.budget: needs exactly one of steps, images, minutes or flops; got steps and minutes",
    ),
    ({"train.budget": {}}, "minutes or flops; got none"),
    ({"train.budget": {"images": 0.5}}, "train.budget.images: should be a valid integer"),
    ({"train.budget": {"flop": 1e9}}, "train.budget.flop: unknown key; did you mean 'flops'?"),
    ({"train.validation": "async"}, "got 'async'; did you mean 'asynchronous'?"),
    ({"train.budget": {"step": 1}}, "train.budget.step: unknown key; did you mean 'steps'?"),
    ({"families": ["vae", "dcgn"]}, "families: unknown family 'dcgn'; did you mean 'dcgan'?"),
    ({"families": []}, "families: "),
    ({"families": ["vae", "vae"]}, "families: a family stands twice"),
    (
        {"dataset.name": "mnst"},
        "got 'mnst'; did you mean 'mnist'?",
    ),
    ({"dataset.test": 0.95}, "dataset: validation + test leave nothing"),
    ({"models.vaee": {}}, "models.vaee: unknown family; did you mean 'vae'?"),
    (
        {"models.vae.latent_dims": 3},
        "models.vae.latent_dims: unknown key; did you mean 'latent_dim'?",
    ),
    ({"models.vae.latent_dim": -3}, "models.vae.latent_dim: should be greater than 0, got -3"),
    ({"models.vae.optimizer.name": "adamm"}, "models.vae.optimizer.name: "),
    ({"models.realnvp.alpha": 0.5}, "models.realnvp.alpha: should be less than 0.5"),
    ({"models.vae.beta": float("nan")}, "models.vae.beta: "),
    ({"cluster.gpus_per_worker": "some"}, "cluster.gpus_per_worker: "),
    (
        {"evaluation.inception_weights": "/nowhere/w.pth"},
        "evaluation.inception_weights: no file at",
    ),
    ({"evaluation.features": "inception"}, "no module:function; did you mean 'inception-v3'?"),
    (
        {"evaluation.features": "mine.nets:f"},
        "features: mine.nets:f needs features_code, its file (mine/nets.py)",
    ),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_parameters_are_one_line_and_write_nothing(
    params_file: Path, changes: dict[str, object], words: str
) -> None:
    before = params_file.read_bytes()
    with pytest.raises(BadInput) as caught:
        override_params(changes, params_file)
    assert words in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")
    assert "\n" not in str(caught.value)
    assert params_file.read_bytes() == before
    assert [p.name for p in params_file.parent.iterdir()] == ["params.yaml"]


def test_overrides_keep_the_comments_and_report_what_changed(params_file: Path) -> None:
    before = params_file.read_text()
    changed = override_params({"classifier.seed": 7, "train.batch_size": 64}, params_file)
    assert changed == {"classifier.seed": (0, 7)}
    assert params_file.read_text() == before.replace(
        "seed: 0\n\nevaluation", "seed: 7\n\nevaluation"
    )
    assert override_params({"classifier.seed": 7}, params_file) == {}


def test_scientific_notation_is_a_number(params_file: Path) -> None:
    text = params_file.read_text().replace("lr: 1.0e-3}", "lr: 1e-3}", 1)
    params_file.write_text(text)
    assert load_params(params_file).models["vae"].optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("families: [vae]\nmodels: {vae: {}}\ntrain: 3", "train: "),
        ("seed: 1\nseed: 2", "not valid YAML"),
    ],
)
def test_what_is_not_even_sections(params_file: Path, text: str, words: str) -> None:
    params_file.write_text(text)
    with pytest.raises(BadInput, match=words):
        load_params(params_file)
    with pytest.raises(BadInput, match=r"params\.yaml not found"):
        load_params(params_file.with_name("nowhere") / "params.yaml")


def test_a_family_without_a_section_is_refused(params_file: Path) -> None:
    content = YAML(typ="safe").load(params_file.read_text())
    del content["models"]["vae"]
    with pytest.raises(BadInput, match=r"models\.vae: missing"):
        check_params(content)


def test_a_stage_exits_2_with_one_line(root: Path, params_file: Path) -> None:
    params_file.write_text(params_file.read_text().replace("batch_size: 64", "batch_sise: 64", 1))
    (params_file.parent / "artifacts").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tasks.prepare", "--out", "out"],
        cwd=params_file.parent,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "prepare: params.yaml: train.batch_sise: unknown key; did you mean 'batch_size'?\n"
    )
    assert not (params_file.parent / "out").exists()
