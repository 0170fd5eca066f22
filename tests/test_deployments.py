"""prefect.yaml against Prefect's own schema and the flows that it names, without a server."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools.validation import validate
from pydantic import BaseModel, ValidationError

from flows.parameters import CompareSettings
from tasks.params import load_params, override_params
from tests import projects

CONTENT: dict[str, Any] = yaml.safe_load((projects.ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: list[dict[str, Any]] = CONTENT["deployments"]
BY_NAME = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])


def names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def the_flow(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Flow[..., Any]:
    monkeypatch.chdir(projects.ROOT)
    return load_flow_from_entrypoint(deployment["entrypoint"])


def test_no_key_of_the_file_vanishes() -> None:
    """Prefect drops what it does not know, so every key is held against its own models."""
    assert set(CONTENT) <= names(PrefectYamlModel)


@BY_NAME
def test_no_key_of_a_deployment_vanishes(deployment: dict[str, Any]) -> None:
    assert set(deployment) <= names(DeploymentConfig)
    assert set(deployment.get("concurrency_limit", {})) <= names(ConcurrencyLimitSpec)
    assert set(deployment["work_pool"]) <= names(WorkPoolConfig)
    for schedule in deployment.get("schedules", []):
        RawScheduleConfig.model_validate(schedule)


@BY_NAME
def test_its_flow_takes_its_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = the_flow(deployment, monkeypatch)
    assert found.name == deployment["name"]
    schema = dict(found.parameters.model_dump_for_openapi())
    assert not validate(deployment["parameters"], schema, raise_on_error=False)
    found.validate_parameters(deployment["parameters"])
    assert validate({"nonsense": 1}, {**schema, "additionalProperties": False})


@BY_NAME
def test_its_command_is_there(deployment: dict[str, Any]) -> None:
    module = deployment["work_pool"]["job_variables"]["command"].split()[-1]
    assert importlib.util.find_spec(module)


def test_the_nightly_never_runs_twice_at_once() -> None:
    (nightly,) = (d for d in DEPLOYMENTS if "schedules" in d)
    assert nightly["name"] == "refresh"
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


FORMS = [(0, "CompareSettings"), (2, "GenerateSettings")]


@pytest.mark.parametrize(("number", "name"), FORMS, ids=str)
def test_the_form_explains_every_field(
    number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Prefect's UI makes its form from."""
    form = the_flow(DEPLOYMENTS[number], monkeypatch).parameters.definitions[name]
    assert all(field["title"] and field["description"] for field in form["properties"].values())
    assert form.get("required", []) == []


def test_the_form_of_compare_offers_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    form = the_flow(DEPLOYMENTS[0], monkeypatch).parameters.definitions["CompareSettings"]
    assert set(form["properties"]) == set(CompareSettings.model_fields)
    assert "vae" in str(form["properties"]["families"])
    assert "image_folder" in str(form["properties"]["dataset"])


def test_what_is_filled_in_is_what_params_yaml_gets(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes((projects.ROOT / "params.yaml").read_bytes())
    assert override_params(CompareSettings().changes(), file) == {}
    settings = CompareSettings.model_validate(
        {
            "dataset": "digits",
            "families": ["gmm", "naive_bayes"],
            "seeds": [1, 2],
            "budget": {"unit": "steps", "amount": 30},
            "overrides": {"train.batch_size": 8, "seeds": [3]},
        }
    )
    override_params(settings.changes(), file)
    params = load_params(file)
    assert params.families == ("gmm", "naive_bayes")
    assert (params.seeds, params.train.batch_size) == ((3,), 8)
    assert params.train.budget.steps == 30


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"families": ["dcgn"]}, "unknown family 'dcgn'; did you mean 'dcgan'?"),
        ({"dataset": "mnst"}, "unknown data set 'mnst'; did you mean 'mnist'?"),
        ({"family": ["vae"]}, "Extra inputs are not permitted"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"budget": {"unit": "hours", "amount": 1}}, "'steps', 'images', 'minutes' or 'flops'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as refused:
        CompareSettings.model_validate(given)
    assert line in str(refused.value)


ENGINE = """
import os, signal, sys, time
def end(number, frame):
    if os.path.exists("told"):
        os._exit(1)  # broken off
    open("told", "w").close()
    time.sleep(1)
    open("ended", "w").close()
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
open("session", "w").write(str(os.getsid(0)))
time.sleep(60)
"""


def test_a_killed_worker_leaves_the_engine_its_time(tmp_path: Path) -> None:
    """What a worker does to a cancelled run: SIGTERM to its process group, then SIGKILL."""
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect/__init__.py").touch()
    (tmp_path / "prefect/engine.py").write_text(ENGINE)
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.engine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{projects.ROOT}"},
        start_new_session=True,
    )
    until(lambda: (tmp_path / "session").exists() and (tmp_path / "session").read_text() != "")
    assert int((tmp_path / "session").read_text()) != run.pid
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGTERM)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "ended").exists()
    until(lambda: (tmp_path / "ended").exists())


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
