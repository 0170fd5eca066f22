"""A project on the servers of production, and how the tests look into these."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests

from infra.local.process import HOST, Server
from infra.local.servers import Topology
from tests import projects

PATIENCE_S = 400  # of two cores
Run = dict[str, Any]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@dataclass(frozen=True)
class Production:
    path: Path
    there: Topology

    @property
    def servers(self) -> dict[str, Server]:
        return self.there.servers

    def environment(self, **changes: str | None) -> dict[str, str]:
        """A client's, changed; None takes a variable away."""
        given: dict[str, str | None] = {**projects.environment(self.path), **self.there.client}
        return {k: v for k, v in {**given, **changes}.items() if v is not None}

    def run(self, *words: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """`python -m <words>` in the project as a client."""
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.path,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def prefect(self, method: str, path: str, content: Any = None) -> Any:
        """What Prefect's API answers."""
        client = self.there.client
        user, password = client["PREFECT_API_AUTH_STRING"].split(":")
        reply = requests.request(
            method,
            client["PREFECT_API_URL"] + path,
            json=content,
            auth=(user, password),
            timeout=30,
        )
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def mlflow(self, path: str, **query: Any) -> Any:
        """What MLflow's API answers to a GET, or to a POST where there is a `query`."""
        client = self.there.client
        reply = requests.request(
            "POST" if query else "GET",
            f"{client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{path}",
            json=query or None,
            auth=(client["MLFLOW_TRACKING_USERNAME"], client["MLFLOW_TRACKING_PASSWORD"]),
            timeout=30,
        )
        reply.raise_for_status()
        return reply.json()

    def database(self, role: str, **changes: Any) -> Any:
        """A connection to a role's PostgreSQL database, each statement for itself."""
        import psycopg2

        port = next(w for w in self.servers["postgres"].command if w.startswith("--port="))[7:]
        settings = {"user": role, "dbname": role, "password": self.there.secrets[role], **changes}
        connection = psycopg2.connect(host=HOST, port=port, **settings)
        connection.autocommit = True
        return connection

    def select(self, role: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.database(role) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.prefect("GET", f"/deployments/name/{name}/{name}")
        return found

    def schedule_once(self, name: str, seconds: float) -> None:
        """Let the deployment's schedule fire that soon, and then not before tomorrow."""
        first = datetime.now(UTC) + timedelta(seconds=seconds)
        schedule = {"interval": 86400, "anchor_date": first.isoformat(), "timezone": "UTC"}
        path = f"/deployments/{self.deployment(name)['id']}/schedules"
        for old in self.prefect("GET", path):
            self.prefect("PATCH", f"{path}/{old['id']}", {"active": False})
        self.prefect("POST", path, [{"schedule": schedule, "active": True}])

    def start(self, name: str) -> Run:
        """A flow run of the deployment, as a person starts it."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        run: Run = self.prefect("POST", path, {})
        return run

    def runs(self, name: str) -> list[Run]:
        """The deployment's flow runs whose time has come, the earliest first."""
        now = datetime.now(UTC).isoformat()
        only = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}}
        found = self.prefect("POST", "/flow_runs/filter", only)
        come = [run for run in found if run["expected_start_time"] <= now]
        return sorted(come, key=lambda run: str(run["expected_start_time"]))

    def look(self, run: Run) -> Run:
        found: Run = self.prefect("GET", f"/flow_runs/{run['id']}")
        return found

    def ended(self, run: Run) -> Run:
        """The run, once it has ended."""
        return self.until(lambda: (now := self.look(run))["state_type"] in ENDED and now, run)

    def until(self, condition: Callable[[], Any], run: Run | None = None) -> Any:
        """What the condition gives, once it is true; else the end of the worker's log."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain:\n{self.words(run)}")
            time.sleep(0.2)
        return found

    def words(self, run: Run | None) -> str:
        """What a run has logged, as a person reads it in the UI; of none, the worker's log."""
        if run is None:
            return self.servers["worker"].written()[-5000:]
        only = {"flow_run_id": {"any_": [run["id"]]}}
        logs = self.prefect("POST", "/logs/filter", {"logs": only, "sort": "TIMESTAMP_ASC"})
        state = self.look(run)["state"]
        lines = [f"{run['name']}: {state['name']}: {state['message']}"]
        return "\n".join([*lines, *(line["message"] for line in logs)])

    def history(self) -> list[dict[str, Any]]:
        """The records of the training that goes on; empty before the first."""
        lines = [
            line
            for path in (self.path / ".genarena/work").glob("*/history.jsonl")
            for line in path.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines if line.endswith("}")]
