"""Versions in MLflow's registry: found by what a person calls them, crowned, and rolled back.

The champions of a model, oldest first, stand in a tag of the registered model; the alias
`champion` is always the last of them.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models import FAMILIES
from tasks.errors import BadInput, Unreachable, nearest
from tasks.params import Params
from tasks.tracking import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPIONS = "genarena.champions"  # tag of the registered model: versions, oldest first
REMEMBERED = 500  # of them; a tag holds 5,000 characters


@dataclass(frozen=True)
class Found:
    """A model in MLflow: registered (then it has a name and a version) or only logged."""

    model_id: str | None
    run_id: str | None
    name: str | None = None
    version: str | None = None
    tags: dict[str, str] | None = None


@contextmanager
def reaching(params: Params, what: str = "") -> Iterator[None]:
    """Say in one line why MLflow could not be asked: `BadInput` instead of its own errors."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
        where = _shown(tracking_uri(params))
        if status == 401:
            raise BadInput(
                f"the registry at {where} refuses the user or the password; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        reason = " ".join(str(error).split())[:200]
        if status == 403:
            raise BadInput(f"the registry at {where} does not allow this ({reason})") from error
        told = f"{what} {where}" if what else f"the registry at {where} does not answer"
        raise Unreachable(f"{told} ({reason})") from error


def spelled(params: Params, model: str) -> str:
    """A model's URI; a family's name means its champion on the data that params.yaml names."""
    if model.startswith(("models:/", "runs:/")):
        return model
    name = f"{params.dataset.title}-{model}" if model in FAMILIES else model
    return f"models:/{name}@{CHAMPION}"


def find(client: MlflowClient, params: Params, uri: str) -> Found:
    """What a `models:/` or `runs:/` URI means. Raises BadInput, with what is near, when nothing."""
    scheme, _, rest = uri.partition(":/")
    rest = rest.strip("/")
    if scheme == "runs":
        return _of_run(client, uri, *rest.partition("/")[::2])
    name, at, alias = rest.partition("@")
    name, _, number = name.partition("/")
    if not at and not number:
        return _logged(client, uri, name)
    found = registered(client, params, name, uri)
    aliases = {key: str(value) for key, value in found.aliases.items()}
    numbers = [str(v.version) for v in of(client, name)]
    if at and alias not in aliases:
        raise BadInput(f"{uri}: {name} has no alias '{alias}'{nearest(alias, aliases)}")
    if number == "latest" and numbers:
        number = max(numbers, key=int)
    version = aliases[alias] if at else number
    if version not in numbers:
        known = sorted(numbers, key=int)
        raise BadInput(f"{uri}: {name} has no version {version}{nearest(version, known)}")
    it = client.get_model_version(name, version)
    source = str(it.source)  # the store keeps the logged model's id here alone
    model_id = source.removeprefix("models:/") if source.startswith("models:/m-") else it.model_id
    return Found(model_id, it.run_id, name, str(it.version), dict(it.tags))


def registered(client: MlflowClient, params: Params, name: str, asked: str = "") -> Any:
    """MLflow's registered model of that name. Raises BadInput, with what is near, for none."""
    models = {found.name: found for found in everything(client)}
    if name in models:
        return models[name]
    prefix = f"{params.dataset.title}-"
    if name.removeprefix(prefix) in FAMILIES:
        family = name.removeprefix(prefix)
        hint = f"; train it on {params.dataset.title} first: make run FAMILIES={family}"
    else:
        hint = nearest(name, models) if models else ": nothing is registered yet"
    raise BadInput(f"{asked or name}: no such model{hint}")


def everything(client: MlflowClient) -> list[Any]:
    """All registered models."""
    return _pages(lambda token: client.search_registered_models(page_token=token))


def of(client: MlflowClient, name: str) -> list[Any]:
    """All versions of a registered model."""
    return _pages(lambda t: client.search_model_versions(f"name = '{name}'", page_token=t))


def _pages(ask: Callable[[str | None], Any]) -> list[Any]:
    part = ask(None)
    found = [*part]
    while part.token:
        part = ask(part.token)
        found += part
    return found


def _of_run(client: MlflowClient, uri: str, run_id: str, name: str) -> Found:
    run = _or_none(lambda: client.get_run(run_id))
    if run is None:
        raise BadInput(f"{uri}: no run of this id")
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    named = [model for model in models if model.name == name]
    if not named:
        hint = nearest(name, {model.name for model in models})
        raise BadInput(f"{uri}: the run has no model '{name}'{hint}")
    newest = max(named, key=lambda model: model.creation_timestamp)
    return Found(newest.model_id, run_id)


def _logged(client: MlflowClient, uri: str, model_id: str) -> Found:
    model = _or_none(lambda: client.get_logged_model(model_id))
    if model is None:
        raise BadInput(f"{uri}: no such model; models:/NAME@champion or models:/NAME/1 names one")
    return Found(model.model_id, model.source_run_id)


def _or_none(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or None where MLflow says that it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.get_http_status_code() in (400, 404):
            return None
        raise


def about(name: str) -> str:
    """Description of a registered model."""
    dataset, _, family = name.rpartition("-")
    what = "The best of all families" if family == "generator" else f"The family {family}"
    return (
        f"{what} on the data set {dataset}. A version is `champion` only where it beat the "
        "champion before it on the same data and by the same protocol; each says why."
    )


def champions(client: MlflowClient, name: str) -> list[str]:
    """The versions that have been champion, oldest first; the last one is it now.

    Versions that were deleted are left out; an alias that was moved by hand counts.
    """
    model = client.get_registered_model(name)
    there = {str(v.version) for v in of(client, name)}
    past = [v for v in model.tags.get(CHAMPIONS, "").split() if v in there]
    now = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    if now is None:
        return past
    if now in past:
        return past[: len(past) - past[::-1].index(now)]
    return [*past, now]


def award(client: MlflowClient, name: str, version: str, alias: str, reason: str) -> None:
    """Give a version its alias, and write the reason where a person finds it."""
    past = champions(client, name) if alias == CHAMPION else []
    if CHALLENGER in (model := client.get_registered_model(name)).aliases and (
        str(model.aliases[CHALLENGER]) == version and alias == CHAMPION
    ):
        client.delete_registered_model_alias(name, CHALLENGER)
    client.set_registered_model_alias(name, alias, version)
    if alias == CHAMPION and past[-1:] != [version]:
        _remember(client, name, [*past, version])
    _write_reason(client, name, version, alias, reason)


def roll_back(client: MlflowClient, name: str, why: str = "") -> tuple[str, str]:
    """Make the champion before this one champion again; returns (restored, demoted).

    Raises BadInput where there is no earlier one.
    """
    past = champions(client, name)
    if len(past) < 2:
        now = f"version {past[0]} is the only champion so far" if past else "it has no champion"
        raise BadInput(f"{name}: nothing to go back to: {now}")
    *_, restored, demoted = past
    _remember(client, name, past[:-1])
    client.set_registered_model_alias(name, CHAMPION, restored)
    client.set_registered_model_alias(name, CHALLENGER, demoted)
    because = f": {why}" if why else ""
    _write_reason(client, name, restored, CHAMPION, f"rolled back from version {demoted}{because}")
    _write_reason(client, name, demoted, CHALLENGER, f"rolled back to version {restored}{because}")
    return restored, demoted


def _remember(client: MlflowClient, name: str, past: list[str]) -> None:
    client.set_registered_model_tag(name, CHAMPIONS, " ".join(past[-REMEMBERED:]))


def _write_reason(client: MlflowClient, name: str, version: str, alias: str, reason: str) -> None:
    """The last reason as a tag; all of them, one a line, as the version's description."""
    it = client.get_model_version(name, version)
    family = it.tags.get("family", name)
    lines = [*(it.description or "").splitlines(), f"{family}: {alias}, {reason}."]
    client.set_model_version_tag(name, version, "reason", reason)
    client.update_model_version(name, version, description="\n".join(lines))


def _shown(uri: str) -> str:
    """A tracking URI without the password it may have."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.password:
        return uri
    return parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}").geturl()
