"""A family is a folder: what depends on its code depends on all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import models
from models import FAMILIES
from tasks import train

SPEC = {"family": "pixelrnn", "config": {}, "data": {}, "train": {}}


def test_importing_the_families_imports_no_compiler(root: Path) -> None:
    """torch's takes a second of every process that needs a model."""
    code = "import sys, models; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_key_of_a_training_follows_its_familys_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(Path(models.__file__).parent, folder)
    monkeypatch.setattr(models, "__file__", str(folder / "__init__.py"))
    keys = [train._key(SPEC, "data")]
    for edited in ("pixelrnn/__init__.py", "pixelrnn/lstm.py", "nn.py", "data.py"):
        with (folder / edited).open("a") as file:
            file.write("# edited\n")
        keys.append(train._key(SPEC, "data"))
    assert len(set(keys)) == len(keys)
    for other in ("vae/__init__.py", "stylegan2/networks.py"):
        with (folder / other).open("a") as file:
            file.write("# edited\n")
        assert train._key(SPEC, "data") == keys[-1]


def test_the_key_and_the_pipeline_know_the_same_shared_files(root: Path) -> None:
    """And every shared file is known: but the dictionary, each is in both."""
    found = {path.stem for path in (root / "models").glob("*.py")} - {"__init__", "store"}
    assert found == set(train.SHARED)
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name in ("train", "evaluate"):
        known = {d for d in stages[name]["deps"] if d.startswith("models/")}
        expected = {f"models/{file}.py" for file in (*train.SHARED, "store")}
        assert known == {*expected, "models/${item.family}"}, name


def test_every_folder_of_code_is_a_family(root: Path) -> None:
    folders = {path.name for path in (root / "models").iterdir() if any(path.glob("*.py"))}
    assert folders == set(FAMILIES)
