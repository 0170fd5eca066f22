"""The nightly, from its schedule to the last byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import psutil

from infra.local.storage import connect
from tests.integration.production import Production, Run


def test_the_schedule_fires_and_the_worker_runs_it_to_its_end(
    production: Production, trained: tuple[Run, Run]
) -> None:
    first, _ = trained
    assert first["state_type"] == "COMPLETED", production.words(first)
    assert first["state_name"] == "Completed"  # and not: nothing to do
    assert first["auto_scheduled"]
    assert first["work_pool_name"] == "genarena"
    assert first["infrastructure_pid"]
    board = (production.path / "reports/leaderboard.csv").read_text()
    assert "vae" in board
    assert "naive_bayes" in board


def test_a_second_run_is_cancelled_by_the_limit(
    production: Production, trained: tuple[Run, Run]
) -> None:
    _, second = trained
    assert second["state_type"] == "CANCELLED", production.words(second)
    # and not by the lock that a run takes in the project
    assert second["state"]["message"] == "Deployment concurrency limit reached."
    assert production.deployment("refresh")["global_concurrency_limit"]["limit"] == 1


def test_training_had_a_worker_on_each_of_three_nodes(
    production: Production, trained: tuple[Run, Run]
) -> None:
    assert train_facts(production)["workers"] == 3
    done = production.run(
        *("ray.scripts.scripts", "list", "actors", "--format", "json", "--detail"),
        *("--filter", "class_name=RayTrainWorker"),
    )
    assert done.returncode == 0, done.stderr
    actors = json.loads(done.stdout[done.stdout.index("[") :])
    of_a_job: dict[str, set[str]] = {}
    for actor in actors:
        of_a_job.setdefault(actor["job_id"], set()).add(actor["node_id"])
    assert [len(nodes) for nodes in of_a_job.values()] == [3, 3]  # of two families


def train_facts(production: Production) -> dict[str, int]:
    facts = (production.path / "artifacts/train/vae-0/train.json").read_text()
    return dict(json.loads(facts))


def test_postgresql_has_the_runs(production: Production, trained: tuple[Run, Run]) -> None:
    state = production.select(
        "prefect", "SELECT state_type FROM flow_run WHERE id = %s", trained[0]["id"]
    )
    assert state == [("COMPLETED",)]
    runs = production.select("mlflow", "SELECT name, status FROM runs ORDER BY name")
    title = "digits"
    assert dict(runs) == {
        f"compare-{title}": "FINISHED",
        f"naive_bayes-{title}-s0": "FINISHED",
        f"vae-{title}-s0": "FINISHED",
    }
    steps = production.select(
        "mlflow",
        "SELECT DISTINCT m.step FROM metrics m JOIN runs r USING (run_uuid) "
        "WHERE r.name = %s ORDER BY 1",
        f"vae-{title}-s0",
    )
    assert steps[-1] == (20,)


def test_s3_has_the_models(production: Production, trained: tuple[Run, Run]) -> None:
    there = stored(production, "mlflow")
    assert any(key.endswith("/MLmodel") for key in there)
    assert any(key.endswith(".safetensors") for key in there)
    assert not list(production.path.glob("mlruns*"))


def test_another_machine_pulls_what_the_run_pushed(
    production: Production, trained: tuple[Run, Run], tmp_path: Path
) -> None:
    kept = ("data/prepared", "artifacts/classifier", "artifacts/train", "artifacts/evaluate")
    without = {".genarena", "cache", "tmp", *(Path(name).name for name in kept)}
    there = tmp_path / "clone"
    shutil.copytree(
        production.path, there, symlinks=True, ignore=lambda _, names: without & set(names)
    )
    done = replace(production, path=there).run("dvc", "pull")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in kept:
        files = [path for path in (production.path / name).rglob("*") if path.is_file()]
        pulled = [path for path in files if path.name != ".gitkeep"]
        assert pulled, name
        for path in pulled:
            other = there / path.relative_to(production.path)
            assert other.read_bytes() == path.read_bytes(), other


def stored(production: Production, bucket: str) -> dict[str, bytes]:
    s3 = connect(production.there.client)
    keys = [
        entry["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for entry in page.get("Contents", ())
    ]
    return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def test_secrets_are_written_nowhere(production: Production, trained: tuple[Run, Run]) -> None:
    private = {".genarena/servers.env", ".genarena/servers/mlflow-auth.ini"}
    for name in private:
        assert (production.path / name).stat().st_mode & 0o077 == 0, name
    secrets = {name: value.encode() for name, value in production.there.secrets.items()}
    found = []

    def look(where: str, content: bytes) -> None:
        found.extend(f"{name} in {where}" for name, value in secrets.items() if value in content)

    for path in production.path.rglob("*"):
        name = str(path.relative_to(production.path))
        if path.is_file() and name not in private and not name.startswith(".venv"):
            look(name, path.read_bytes())
    scratch = production.there.scratch
    assert list(scratch.glob("ray*/session_latest/logs/*.log"))
    for path in scratch.glob("ray*/session_*/**/*"):
        if path.is_file():
            look(str(path), path.read_bytes())
    for role in ("mlflow", "mlflow_auth", "prefect"):
        for table, content in dumped(production, role).items():
            look(f"{role}: {table}", content)
    for bucket in ("mlflow", "dvc"):
        for key, content in stored(production, bucket).items():
            look(f"s3://{bucket}/{key}", content)
    for process in psutil.process_iter(["cmdline"]):
        look(f"arguments of {process.pid}", " ".join(process.info["cmdline"] or ()).encode())
    assert not found


def dumped(production: Production, role: str) -> dict[str, bytes]:
    """Every table of a database as text."""
    import io

    tables = production.select(role, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert len(tables) > 3
    content = {}
    with production.database(role) as connection, connection.cursor() as cursor:
        for (table,) in tables:
            text = io.BytesIO()
            cursor.copy_expert(f'COPY "{table}" TO STDOUT', text)
            content[table] = text.getvalue()
    return content
