"""Every server of production on this machine, once for all tests here, and a project on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.process import find_program
from infra.local.servers import topology
from tests import projects
from tests.integration.production import Production, Run

SETTINGS = {
    "families": ["vae", "naive_bayes"],
    "cluster.workers": 3,  # with one processor a node, one on each
    "train.batch_size": 24,
    "models.vae.width": 8,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder: pytest hands over those of every folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(600))


def missing() -> str | None:
    """What these tests cannot do without."""
    if find_program("postgres") is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    for module in ("boto3", "dvc_s3", "flask_wtf", "moto", "psycopg2"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install -c constraints.txt -e '.[infra]'"
    return None


@pytest.fixture(scope="session")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """The project deployed, nothing run yet."""
    if reason := missing():
        pytest.skip(reason)
    path = projects.make_project(tmp_path_factory.mktemp("production") / "project", SETTINGS)
    projects.dvc(path, "remote", "add", "--default", "storage", "s3://dvc")
    with topology(path) as there:
        here = Production(path, there)
        done = here.run("prefect", "deploy", "--all")
        assert done.returncode == 0, done.stdout + done.stderr
        yield here


@pytest.fixture(scope="session")
def trained(production: Production) -> tuple[Run, Run]:
    """The first scheduled `refresh`, ended, and one that was started while it ran."""
    # Prefect plans runs that are still to come; its planner was seen to take 38 s
    production.schedule_once("refresh", 90)
    (first,) = production.until(lambda: production.runs("refresh"))
    production.until(lambda: production.look(first)["state_type"] == "RUNNING")
    second = production.start("refresh")
    return production.ended(first), production.ended(second)
