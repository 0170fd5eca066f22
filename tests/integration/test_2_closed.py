"""Every server turns away who has no secret, or a wrong one; our commands say so in one line."""

from __future__ import annotations

import pytest
import requests

from tests.integration.production import Production, Run

psycopg2 = pytest.importorskip("psycopg2")  # of the extra `infra`
WRONG = "0" * 48


@pytest.mark.parametrize("given", [None, ("genarena", WRONG)], ids=["without", "wrong"])
def test_prefect_refuses(production: Production, given: tuple[str, str] | None) -> None:
    address = production.there.client["PREFECT_API_URL"]
    for path in ("/flow_runs/filter", "/deployments/filter", "/variables/filter"):
        reply = requests.post(address + path, json={}, auth=given, timeout=30)
        assert reply.status_code == 401, path
    production.prefect("POST", "/flow_runs/filter", {})  # and lets in who has it


@pytest.mark.parametrize("given", [None, ("admin", WRONG)], ids=["without", "wrong"])
def test_mlflow_refuses(production: Production, given: tuple[str, str] | None) -> None:
    address = production.there.client["MLFLOW_TRACKING_URI"]
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    for path in (search, "/api/2.0/mlflow-artifacts/artifacts"):
        assert requests.get(address + path, auth=given, timeout=30).status_code == 401, path
    production.mlflow("experiments/search", max_results=1)


def test_mlflow_answers_to_its_own_name_only(production: Production) -> None:
    address = production.there.client["MLFLOW_TRACKING_URI"]
    search = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
    given = ("admin", production.there.secrets["mlflow_admin"])
    elsewhere = {"Host": "elsewhere.example"}
    assert requests.get(search, auth=given, headers=elsewhere, timeout=30).status_code == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [({}, 401), ({"Authorization": f"Bearer {WRONG}"}, 403)],
    ids=["without", "wrong"],
)
def test_the_ray_jobs_api_refuses(
    production: Production, given: dict[str, str], status: int
) -> None:
    address = production.there.client["RAY_API_SERVER_ADDRESS"]
    job = {"entrypoint": "true"}
    reply = requests.post(f"{address}/api/jobs/", json=job, headers=given, timeout=30)
    assert reply.status_code == status
    right = {"Authorization": f"Bearer {production.there.secrets['ray']}"}
    assert requests.get(f"{address}/api/jobs/", headers=right, timeout=30).status_code == 200


@pytest.mark.parametrize("password", ["", WRONG], ids=["without", "wrong"])
def test_postgresql_refuses(production: Production, password: str) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password"):
        production.database("mlflow", password=password)


def test_a_server_has_its_own_database_and_no_other(production: Production) -> None:
    with pytest.raises(psycopg2.OperationalError, match="permission denied"):
        production.database("prefect", dbname="mlflow")


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        ("run --steps 21", {"PREFECT_API_AUTH_STRING": None}, "PREFECT_API_AUTH_STRING"),
        ("run --steps 21", {"PREFECT_API_AUTH_STRING": f"x:{WRONG}"}, "PREFECT_API_AUTH_STRING"),
        ("run --steps 21", {"RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}, "RAY_AUTH_TOKEN"),
        ("run --steps 21", {"RAY_AUTH_TOKEN": WRONG}, "RAY_AUTH_TOKEN"),
        ("sample vae -n 1", {"MLFLOW_TRACKING_PASSWORD": None}, "MLFLOW_TRACKING_PASSWORD"),
        ("sample vae -n 1", {"MLFLOW_TRACKING_PASSWORD": WRONG}, "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_our_commands_say_in_one_line_who_refuses(
    production: Production,
    trained: tuple[Run, Run],
    command: str,
    changes: dict[str, str | None],
    says: str,
) -> None:
    done = production.run("genarena", *command.split(), **changes)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("genarena:")]
    assert says in line
    assert "refuses" in line
    assert "Traceback" not in done.stderr
    assert WRONG not in done.stdout + done.stderr
