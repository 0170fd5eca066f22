"""Samples asked of a registered model: what can be asked, what is refused, what comes back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from models.config import Config, Positive
from tasks.errors import BadInput, nearest

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Request = dict[str, Any]  # `n`, and what the model takes: `label`, `text`, `source`


class GenerateSettings(Config):
    """Which samples to draw. Several conditions of a kind: `n` samples of each."""

    model: str = Field(
        "",
        title="Model",
        description="models:/name@champion, a name, or a family. Left empty: the champion among "
        "the generators of the data set in params.yaml.",
    )
    n: Positive = Field(1000, title="Samples", description="Of each condition.")
    labels: tuple[str, ...] = Field((), title="Classes", description="Their names.")
    texts: tuple[str, ...] = Field(
        (), title="Texts", description="Captions, or what a model of text is to continue."
    )
    sources: tuple[str, ...] = Field(
        (), title="Source images", description="Files, as the worker can read them."
    )
    seed: int = Field(0, ge=0, title="Seed", description="Same seed, same samples.")
    temperature: float = Field(1.0, ge=0, title="Temperature", description="Spread of latents.")
    options: dict[str, Any] = Field(
        {}, title="Options", description='Of the family, as in {"steps": 20}.'
    )
    name: str = Field(
        "",
        title="Name of the result",
        description="A folder below data/generated; replaced if it is there. Left empty: made of "
        "the model's name, its version and the seed.",
    )
    batch: Positive = Field(500, title="Batch", description="Samples of one Ray task.")

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if value and not NAME.fullmatch(value):
            raise ValueError(f"'{value}' is no folder's name: letters, digits, '.', '-' and '_'")
        return value


def requests(settings: GenerateSettings) -> Iterator[tuple[Request, dict[str, str]]]:
    """Every combination of conditions, as the model takes it and as the files name it."""
    kinds = {"label": settings.labels, "text": settings.texts, "source": settings.sources}
    given = {kind: values for kind, values in kinds.items() if values}
    for values in itertools.product(*given.values()):
        told = dict(zip(given, values, strict=True))
        request: Request = {"n": settings.n, **told}
        if "source" in told:
            file = Path(told["source"]).expanduser()
            if not file.is_file():
                raise BadInput(f"sources: no file at {file}")
            request["source"] = file.read_bytes()
        yield request, {f"asked_{kind}": value for kind, value in told.items()}


def checked(
    loaded: Any, uri: str, requests: Sequence[Request], options: dict[str, Any]
) -> dict[str, Any]:
    """The options as the model's types; BadInput for what it does not take.

    MLflow drops, without a word, columns and parameters that the model does not know.
    """
    takes = loaded.metadata.get_input_schema().input_names()
    for name in {name: None for request in requests for name in request}:
        if name not in takes:
            raise BadInput(f"--{name}: {uri} takes no {name}; it takes {', '.join(takes)}")
    schema = {p.name: p for p in loaded.metadata.get_params_schema().params}
    typed = {}
    for name, value in options.items():
        if name not in schema:
            hint = nearest(name, schema) or f"; it takes {', '.join(schema)}"
            raise BadInput(f"--set: {uri} takes no option '{name}'{hint}")
        try:
            typed[name] = type(schema[name].default)(value)
        except (TypeError, ValueError) as error:
            raise BadInput(f"--set: {name}={value} is not like {schema[name].default}") from error
    return typed


def drawn(
    loaded: Any, uri: str, requests: Sequence[Request], options: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """The samples, in the order of the requests: images `[N, H, W, C]`, strings, or cells
    `[N, 2]`; BadInput for a request that the model cannot answer."""
    import pandas as pd
    from mlflow.exceptions import MlflowException

    try:
        return loaded.predict(pd.DataFrame(list(requests)), params=options)
    except (MlflowException, ValueError) as error:
        raise BadInput(f"{uri}: {' '.join(str(error).split())}") from error


def draw_slice(
    folder: str, uri: str, request: Request, options: dict[str, Any], threads: int
) -> np.ndarray[Any, Any]:
    """What a Ray worker runs: `request` asked of the model whose files lie in `folder`."""
    from tasks.environment import keep_freed_memory, use_threads

    use_threads(threads)
    keep_freed_memory()
    return drawn(_loaded(folder), uri, [request], options)


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Any:
    """Once in each worker, however many slices it draws."""
    import mlflow

    from tasks.environment import prepare_environment

    prepare_environment()
    return mlflow.pyfunc.load_model(folder, suppress_warnings=True)
