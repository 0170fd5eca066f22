"""`params.yaml` as typed, frozen configuration. What it does not know, it refuses."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models import FAMILIES
from models.config import Config, Positive
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput, nearest
from tasks.evaluation.decoder import AISConfig
from tasks.evaluation.likelihood import LikelihoodDraws
from tasks.evaluation.usefulness import UsefulnessConfig
from tasks.invalid import first_line
from tasks.training.config import TrainSection

PARAMS_FILE = Path("params.yaml")
EXTRACTORS = ("classifier", "inception-v3", "pixels")
OWN_EXTRACTOR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
NO_CODE = "tasks/evaluation/registered.py"  # genarena's own: there is no code of the user's


class ClusterConfig(Config):
    """Where to compute. One code path for one CPU, one GPU and many nodes."""

    # of a running Ray, host:6379, or of its Jobs API, http://host:8265, where this machine is no
    # node of it; null: RAY_ADDRESS, or a local Ray
    address: str | None = None
    # training processes per family. [1, 4]: elastic, from 1 to 4, as many as there is room for;
    # more when nodes come, fewer when they go, and those that cannot share train.batch_size idle
    workers: int | tuple[int, int] = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0)] = (
        "auto"  # auto: 1 where the cluster has GPUs
    )
    wait_s: float = Field(0, ge=0)  # how long an autoscaler has to bring what is asked for
    # checkpoints; must be shared between the cluster's nodes, and with this machine
    storage: str = ".genarena"

    @field_validator("workers", mode="before")
    @classmethod
    def _a_number_or_a_range(cls, value: Any) -> Any:
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        counts = all(type(number) is int and number > 0 for number in given)
        if not given or not counts or len(given) > 2 or given != sorted(given):
            what = "neither a number of workers, as 2, nor the fewest and the most, as [1, 4]"
            raise ValueError(f"{value!r} is {what}")
        return value

    @property
    def fewest(self) -> int:
        """Workers without which no training starts."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class ClassifierConfig(Config):
    """The network whose features measure fidelity, trained on the train split."""

    width: Positive = 32
    features: Positive = 64  # dimension of its last hidden layer
    epochs: Positive = 30
    max_steps: Positive = 2000
    batch_size: Positive = 64
    lr: float = Field(2e-3, gt=0)
    seed: int = Field(0, ge=0)


class EvaluationConfig(Config):
    """How every family is measured."""

    seed: int = Field(0, ge=0)
    samples: int = Field(10_000, ge=100)  # drawn from each model
    batch_size: Positive = 500
    features: str = "classifier"  # or inception-v3, pixels, or module:function of your own
    features_code: str = NO_CODE  # the file of that module; by it DVC sees that it has changed
    inception_weights: str | None = None  # torch-fidelity's weights file; null: its own cache
    likelihood_examples: int = Field(1_000, ge=2)  # of the test split
    likelihood_draws: LikelihoodDraws = LikelihoodDraws()
    anomaly_images: Positive = 256  # of the test split, and as many letters
    ais: AISConfig = AISConfig()
    reconstruction_images: Positive = 256  # of the test split
    usefulness: UsefulnessConfig = UsefulnessConfig()

    @field_validator("features")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EXTRACTORS and not OWN_EXTRACTOR.fullmatch(value):
            what = f"'{value}' is none of {', '.join(EXTRACTORS)} and no module:function"
            raise ValueError(f"{what}{nearest(value, EXTRACTORS)}")
        return value

    @model_validator(mode="after")
    def _code_named(self) -> EvaluationConfig:
        if self.features not in EXTRACTORS and self.features_code == NO_CODE:
            file = self.features.partition(":")[0].replace(".", "/") + ".py"
            raise ValueError(f"features: {self.features} needs features_code, its file ({file})")
        return self

    @field_validator("inception_weights")
    @classmethod
    def _file_there(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).expanduser().is_file():
            raise ValueError(f"no file at {value}")
        return value and str(Path(value).expanduser().absolute())


class TrackingConfig(Config):
    uri: str = "sqlite:///mlflow.db"  # MLFLOW_TRACKING_URI, when set, wins


class Params(Config):
    """Everything in `params.yaml`."""

    dataset: DatasetConfig = DatasetConfig()
    families: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1
    )  # each family is trained with each
    train: TrainSection = TrainSection()
    models: dict[str, Any]  # family name -> its Config
    cluster: ClusterConfig = ClusterConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("families")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FAMILIES:
                raise ValueError(f"unknown family '{name}'{nearest(name, FAMILIES)}")
        if len(set(names)) < len(names):
            raise ValueError(f"a family stands twice in {list(names)}")
        return names

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed stands twice in {list(seeds)}")
        return seeds


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check `params.yaml`; raises BadInput with the key, the value and what is near."""
    return check_params(_read(path), path.name)


def check_params(content: Any, name: str = "params.yaml", *, suited: bool = True) -> Params:
    """Typed parameters from parsed YAML; `name` stands in the errors.

    `suited`: refuse a family that cannot learn from the kind of data that `dataset` names.
    """
    if not isinstance(content, dict):
        raise BadInput(f"{name}: must be a mapping of sections")
    if isinstance(content.get("train"), dict) and "seed" in content["train"]:
        raise BadInput(
            f"{name}: train.seed: unknown key; seeds are a list of their own, seeds: [0]"
        )
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{name}: {first_line(error, Params)}") from error
    typed = {}
    for family, config in params.models.items():
        if family not in FAMILIES:
            raise BadInput(f"{name}: models.{family}: unknown family{nearest(family, FAMILIES)}")
        try:
            typed[family] = FAMILIES[family].Config.model_validate(config or {})
        except ValidationError as error:
            where = f"{name}: models.{family}"
            raise BadInput(f"{where}.{first_line(error, FAMILIES[family].Config)}") from error
    for family in params.families:
        if family not in typed:
            raise BadInput(
                f"{name}: models.{family}: missing; families names it (an empty {{}} will do)"
            )
        reason = FAMILIES[family].unsuited(params.dataset.outline()) if suited else None
        if reason:
            raise BadInput(f"{name}: families: {family} cannot learn from this data: {reason}")
    return params.model_copy(update={"models": typed})


def override_params(
    changes: dict[str, Any], path: Path = PARAMS_FILE
) -> dict[str, tuple[Any, Any]]:
    """Set dotted keys in `params.yaml`, comments kept; nothing is written unless all is valid.

    Returns what changed: key -> (old, new).
    """
    text, changed, _ = _overridden(changes, path)
    if changed:
        temporary = path.with_name(path.name + f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    return changed


def preview_params(changes: dict[str, Any], path: Path = PARAMS_FILE) -> Params:
    """The parameters as they would be with these changes; whether the families in the file suit
    the data is not asked, for they may be about to change too."""
    return _overridden(changes, path, suited=False)[2]


def _overridden(
    changes: dict[str, Any], path: Path, *, suited: bool = True
) -> tuple[str, dict[str, tuple[Any, Any]], Params]:
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    document = _read(path, yaml)
    changed = {}
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise BadInput(f"{path.name}: {key}: '{key.rsplit('.', 1)[0]}' is not a section")
        if section.get(last) != value or last not in section:
            changed[key] = (section.get(last), value)
            section[last] = value
    text = io.StringIO()
    yaml.dump(document, text)
    content = YAML(typ="safe", pure=True).load(text.getvalue())
    return text.getvalue(), changed, check_params(content, path.name, suited=suited)


def _read(path: Path, yaml: YAML | None = None) -> Any:
    try:
        return (yaml or YAML(typ="safe", pure=True)).load(path.read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{path} not found; run this in the project's folder") from error
    except YAMLError as error:
        raise BadInput(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from error
