"""docs/operations.md, run: what a person does with all servers up, top to bottom, in one shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tasks.params import override_params
from tests import projects
from tests.integration.conftest import SETTINGS
from tests.integration.production import Production, Run
from tests.operations import blocks

REGISTRY = ("genarena registry list", "prefect deployment run generate/generate")


def shell(production: Production, script: str) -> str:
    """What the commands say; the first that fails ends them, and the test."""
    path = f"{Path(sys.executable).parent}:{projects.environment(production.path)['PATH']}"
    done = subprocess.run(
        ["bash", "-xeuo", "pipefail", "-c", script],
        cwd=production.path,
        env={**projects.environment(production.path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def test_the_page_runs_from_deploy_to_cancel(
    production: Production, trained: tuple[Run, Run]
) -> None:
    # all families again: `dvc pull` takes away the results of one that is no longer asked for, and
    # then the report is made once more
    override_params({"families": SETTINGS["families"]}, production.path / "params.yaml")
    said = shell(production, "\n".join(blocks("One machine, all servers")))
    assert "compare/compare" in said
    assert len(list((production.path / "samples").glob("*.png"))) == 4
    assert "Data and pipelines are up to date" in said  # `dvc repro`, after compare and refresh
    cancelled = {"flow_runs": {"name": {"any_": ["cancelled"]}}}
    (run,) = production.prefect("POST", "/flow_runs/filter", cancelled)
    assert run["state_type"] in ("CANCELLING", "CANCELLED")


def test_the_registry_is_listed_and_generates(
    production: Production, trained: tuple[Run, Run]
) -> None:
    environment = "set -a; . .genarena/servers.env; set +a\n"
    lines = "\n".join(blocks("The registry")).splitlines()
    chosen = [line for line in lines if line.startswith(REGISTRY)]
    assert len(chosen) == len(REGISTRY)
    said = shell(production, environment + "\n".join(chosen))
    assert "digits-generator" in said
    (facts,) = (production.path / "data/generated").glob("*/generated.json")
    assert json.loads(facts.read_text())["samples"] == 100
