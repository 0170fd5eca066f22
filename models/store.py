"""A trained model on disk: `config.json` and `model.safetensors`. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from models import FAMILIES
from models.base import GenerativeModel
from models.data import DataSpec

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def build(family: str, config: dict[str, Any], data: dict[str, Any]) -> GenerativeModel:
    """A freshly initialised model; `config` and `data` as in `config.json`.

    Raises:
        KeyError: no such family.
        pydantic.ValidationError: a configuration that the family refuses.
    """
    cls = FAMILIES[family]
    return cls(cls.Config(**config), DataSpec(**data))


def save(directory: Path, model: GenerativeModel, family: str, weights: dict[str, Tensor]) -> None:
    """Write the model to `directory`, which is made; `weights` is its state dict, of which what is
    `training_only` is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in weights.items() if not k.startswith(model.training_only)}
    save_file({k: v.detach().cpu().contiguous() for k, v in kept.items()}, directory / WEIGHTS)
    description = {
        "family": family,
        "config": model.config.model_dump(mode="json"),
        "data": model.data.model_dump(mode="json"),
        "conditions": sorted(model.conditions),
        "options": model.options,
        "weights_sha256": file_sha256(directory / WEIGHTS),
    }
    (directory / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load(directory: Path) -> GenerativeModel:
    """The model in `directory`, on the CPU and in evaluation mode.

    Raises:
        ValueError: the weights are not the ones that `config.json` was written with.
    """
    description = describe(directory)
    found = file_sha256(directory / WEIGHTS)
    if found != description["weights_sha256"]:
        raise ValueError(
            f"{directory / WEIGHTS}: damaged or replaced (sha256 {found[:12]}, "
            f"expected {description['weights_sha256'][:12]})"
        )
    model = build(description["family"], description["config"], description["data"])
    keys = model.load_state_dict(load_file(directory / WEIGHTS), strict=False)
    wrong = [k for k in keys.missing_keys if not k.startswith(model.training_only)]
    if wrong or keys.unexpected_keys:
        raise ValueError(f"{directory / WEIGHTS}: lacks or adds {[*wrong, *keys.unexpected_keys]}")
    return model.eval()


def recipe(directory: Path) -> dict[str, Any]:
    """The arguments of `build` that made the model in `directory`."""
    description = describe(directory)
    return {name: description[name] for name in ("family", "config", "data")}


def describe(directory: Path) -> dict[str, Any]:
    """`config.json`: family, config, data, weights_sha256; conditions and options of `sample`."""
    return json.loads((directory / CONFIG).read_text())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
