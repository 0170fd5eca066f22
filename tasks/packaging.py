"""The registered model as files: logged by `register`, fetched and held against their hash by
whoever loads them.

The hash of a logged model's files stands in MLflow's database, on the logged model. Who can write
to the artifact store alone can therefore bring in nothing: neither weights, nor code, nor a pickle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import FAMILIES, store
from models.data import DataSpec
from tasks import tracking, versions
from tasks.errors import BadInput
from tasks.params import Params

FILES = "genarena.files_sha256"  # tag of MLflow's logged model
TYPES = {int: "long", float: "double", str: "string"}  # of a family's own options, in MLflow
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")
# MLflow writes the first, Python the second, into the folder of a model that is only loaded
BESIDE = ("registered_model_meta", "__pycache__")


@dataclass(frozen=True)
class Fetched:
    """A model's files on this machine, the ones that were registered."""

    path: Path
    name: str | None  # of the registered model, where it was asked for by that
    version: str | None
    run_id: str | None  # that trained it
    digest: str


def digest(folder: Path) -> str:
    """SHA-256 over the relative paths and the bytes of all files, in the order of the paths."""
    total = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if not any(part in BESIDE for part in relative.parts):
            content = bytes.fromhex(store.file_sha256(path))
            total.update(hashlib.sha256(relative.as_posix().encode()).digest() + content)
    return total.hexdigest()


def log_model(run_id: str, family: str, folder: Path, step: int = 0) -> str:
    """Log the pyfunc of the model in `folder` to its run: code, safetensors, signature, example.

    `step` of the run is the checkpoint's; the run's metrics of that step become the model's.
    Returns the id of MLflow's logged model.
    """
    import mlflow

    description, cls = store.describe(folder), FAMILIES[family]
    signature, example = _interface(description, cls.conditions - {"label"})
    packages = (*REQUIREMENTS, *cls.requirements)
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in packages]
    with (
        tempfile.TemporaryDirectory() as model,
        _quiet(),
        mlflow.start_run(run_id=run_id),
    ):
        for name in (store.CONFIG, store.WEIGHTS):
            shutil.copy(folder / name, model)
        info = mlflow.pyfunc.log_model(
            name=family,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"model": model},
            code_paths=[str(Path(store.__file__).parent)],
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            step=step,
        )
    client = mlflow.MlflowClient()
    logged = client.get_logged_model(info.model_id)
    with tempfile.TemporaryDirectory() as copy:
        files = _download(logged.artifact_location, Path(copy))
        client.set_logged_model_tags(info.model_id, {FILES: digest(files)})
    return str(info.model_id)


def fetch(params: Params, uri: str) -> Fetched:
    """Bring the files of a registered or logged model to `<cluster.storage>/models/<hash>`.

    `uri`: `models:/name@alias`, `models:/name/3`, `models:/<id>`, `runs:/<run>/<family>`, or what
    `versions.spelled` makes one of. Nothing is loaded, imported or run.

    Raises:
        BadInput: no such model; the registry does not answer, or refuses the password; the files
            in the artifact store are not the ones that were registered.
    """
    client = tracking.connect(params)
    uri = versions.spelled(params, uri)
    with versions.reaching(params):
        found = versions.find(client, params, uri)
        logged = client.get_logged_model(found.model_id) if found.model_id else None
    known = logged.tags.get(FILES) if logged else None
    if logged is None or known is None:
        told = "no hash of its files is known; only what genarena registered is loaded"
        raise BadInput(f"{uri}: {told}")
    folder = Path(params.cluster.storage).absolute() / "models"
    kept = folder / known
    if not kept.exists() or digest(kept) != known:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
        try:
            with versions.reaching(params, f"the files of {uri} cannot be had from"):
                files = _download(logged.artifact_location, fresh)
            if digest(files) != known:
                raise BadInput(
                    f"{uri}: its files in the artifact store ({logged.artifact_location}) are not "
                    "the ones that were registered; nothing of them is loaded"
                )
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):  # where another process has been faster
                files.rename(kept)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return Fetched(kept, found.name, found.version, found.run_id, known)


def load(params: Params, uri: str) -> Any:
    """The pyfunc of a registered model, from files that were held against their hash."""
    import mlflow

    path = fetch(params, uri).path
    with _quiet():
        return mlflow.pyfunc.load_model(str(path), suppress_warnings=True)


def _download(location: str, folder: Path) -> Path:
    """The files of a logged model, somewhere in `folder`, without what is none of the model's."""
    import mlflow

    with _quiet():
        found = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder))
    for name in BESIDE:
        for path in [*Path(found).rglob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Path(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's remarks on versions, examples and downloads."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _interface(description: dict[str, Any], needed: frozenset[str]) -> tuple[Any, Any]:
    """Signature and example of a model that `store.describe` tells of."""
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    data = DataSpec(**description["data"])
    kinds = {"label": "string", "text": "string", "source": "binary"}
    asked = [ColSpec(kinds[c], c, required=c in needed) for c in description["conditions"]]
    example = {"n": [4], **{c: [_example(c, data)] for c in description["conditions"]}}
    output = TensorSpec(np.dtype(np.uint8), (-1, *data.shape))
    if data.modality == "image":
        channels, height, width = data.shape
        output = TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))
    strings = Schema([ColSpec("string", "text")])
    common = [ParamSpec("seed", "long", 0), ParamSpec("temperature", "double", 1.0)]
    own = [ParamSpec(k, TYPES[type(v)], v) for k, v in description["options"].items()]
    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "n"), *asked]),
        outputs=strings if data.modality == "text" else Schema([output]),
        params=ParamSchema([*common, *own]),
    )
    return signature, pd.DataFrame(example)


def _example(condition: str, data: DataSpec) -> str | bytes:
    """A request's value for one condition, as it stands beside the registered model."""
    if condition == "label":
        return data.classes[0] if data.classes else data.attributes[0]
    if condition == "text":
        return "a"
    from PIL import Image

    assert data.source is not None
    channels, height, width = data.source.shape
    png = io.BytesIO()
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    Image.new(mode, (width, height)).save(png, format="png")
    return png.getvalue()
