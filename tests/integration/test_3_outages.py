"""What production does to a run: a server away, a server restarted, a machine lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tasks.params import override_params
from tests.integration.production import PATIENCE_S, Production, Run

AWAY_S = 60  # a minute without MLflow
QUICK_S = 15
STEPS, INTERVAL = 5000, 100
LONG = {
    "families": ["vae"],
    "train.budget": {"steps": STEPS},
    "train.checkpoint_every": INTERVAL,
    "train.validate_every": 1000,
    "train.log_every": 10,
}


class Outages(NamedTuple):
    """A `refresh` whose servers went away while it trained, and how far it was when they did."""

    run: Run
    mlflow_gone_at: int  # steps
    mlflow_back_at: int
    words: str


@pytest.fixture(scope="module")
def survived(production: Production, trained: tuple[Run, Run]) -> Outages:
    """MLflow away for a minute, and within it the Prefect server restarted."""
    servers = production.servers
    override_params(LONG, production.path / "params.yaml")
    run = production.start("refresh")

    def step() -> int:
        history = production.history()
        return int(history[-1]["step"]) if history else 0

    def trains() -> bool:
        now = production.look(run)
        assert now["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"), production.words(now)
        return step() >= 2 * INTERVAL

    production.until(trains, run)
    servers["mlflow"].stop()
    since, gone_at = time.monotonic(), step()
    servers["prefect"].stop()
    servers["prefect"].start()
    servers["prefect"].wait()
    assert production.look(run)["state_type"] == "RUNNING", production.words(run)
    time.sleep(max(0.0, since + AWAY_S - time.monotonic()))
    back_at = step() or STEPS  # or trained to its end meanwhile
    servers["mlflow"].start()
    servers["mlflow"].wait()
    return Outages(production.ended(run), gone_at, back_at, production.words(run))


def test_a_minute_without_mlflow_loses_nothing(production: Production, survived: Outages) -> None:
    assert survived.run["state_type"] == "COMPLETED", survived.words
    assert "MLflow: delivering metrics failed" in survived.words
    assert survived.mlflow_back_at - survived.mlflow_gone_at > INTERVAL  # it trained on
    path = production.path / "artifacts/train/vae-0/history.jsonl"
    kept = {
        (record["step"], name): value
        for record in map(json.loads, path.read_text().splitlines())
        for name, value in record.items()
        if name not in ("step", "seconds") and isinstance(value, (int, float))
    }
    assert {step for step, _ in kept} >= set(range(10, STEPS + 1, 10))
    rows = production.select(
        "mlflow",
        "SELECT m.step, m.key, m.value FROM metrics m JOIN runs r USING (run_uuid) "
        "JOIN params p USING (run_uuid) "
        "WHERE r.name = %s AND p.key = %s AND p.value = %s AND r.status = 'FINISHED'",
        *("vae-digits-s0", "train.budget.steps", str(STEPS)),
    )
    delivered = {(step, name): value for step, name, value in rows}
    assert {key: delivered.get(key) for key in kept} == pytest.approx(kept, nan_ok=True)


def test_a_restart_of_the_prefect_server_is_waited_for(
    production: Production, survived: Outages
) -> None:
    assert survived.run["state_type"] == "COMPLETED", survived.words
    assert survived.run["run_count"] == 1
    tasks = production.prefect(
        "POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [survived.run["id"]]}}}
    )
    assert {task["name"]: task["state_type"] for task in tasks}["train@vae-0"] == "COMPLETED"
    facts = json.loads((production.path / "artifacts/train/vae-0/train.json").read_text())
    assert facts["resumed_from"] == 0  # the training noticed nothing
    assert facts["train_steps"] == STEPS


def test_with_nothing_to_do_refresh_ends_in_seconds(
    production: Production, survived: Outages
) -> None:
    started = time.monotonic()
    run = production.ended(production.start("refresh"))
    seconds = time.monotonic() - started
    assert run["state_type"] == "COMPLETED", production.words(run)
    assert run["state_name"] == "NothingToDo"
    print(f"nothing to do: {seconds:.1f} s from the request to the end")
    assert seconds <= QUICK_S


def test_a_lost_node_costs_an_interval_and_nothing_of_the_result(
    production: Production, survived: Outages
) -> None:
    out, log = production.path / "after-loss", production.path / "after-loss.log"
    with log.open("w") as stream:
        training = subprocess.Popen(
            [sys.executable, "-m", "tasks.train", "vae", "--out", out.name],
            cwd=production.path,
            env=production.environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    def trained_to(step: int) -> bool:
        assert training.poll() is None, log.read_text()
        history = production.history()
        return bool(history) and history[-1]["step"] >= step

    try:
        production.until(lambda: trained_to(4 * INTERVAL))
        node = production.servers["ray-node-2"]
        node.kill()
        node.start()
        assert training.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        training.kill()
        training.wait()
    facts = json.loads((out / "train.json").read_text())
    assert 3 * INTERVAL <= facts["resumed_from"] < STEPS
    undisturbed = production.path / "artifacts/train/vae-0"
    assert weights(out) == weights(undisturbed)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
