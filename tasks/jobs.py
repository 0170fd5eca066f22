"""A cluster of which this machine is no node: what uses Ray goes there through Ray's Jobs API.

`cluster.address: http://host:8265`. Code travels as the job's working directory; data and results
lie on `cluster.storage`, a folder that this machine and the cluster's nodes share: what a stage
reads is copied there once, by the hash of its content, and what it writes is copied back. MLflow,
git and DVC stay here. Ray's token travels in the requests' headers (RAY_AUTH_TOKEN), nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from models.store import file_sha256
from tasks import cluster
from tasks.errors import BadInput, Outage
from tasks.params import ClusterConfig

REQUEST, ANSWER = "request.json", "answer.json"
POLL_S, PATIENCE_S = 1.0, 60.0  # of a Jobs API that does not answer
LEFT = (  # what a job has no use for; "/": at the top alone, for there is tasks/data
    *("/data", "/artifacts", "/metrics", "/reports", "/samples", "/docs", "/tests", "/benchmarks"),
    *("/infra", "/mlruns", "/mlflow.db*", "/.git", "/.venv", "/.dvc", "/.genarena"),
    *("__pycache__", ".*_cache"),
)


class Output(NamedTuple):
    """A folder that a function on a worker is to write."""

    path: Path


def http_address(config: ClusterConfig) -> str | None:
    """Of the Jobs API, where Ray is to be reached so: by `cluster.address`, else RAY_ADDRESS."""
    address = cluster.given_address(config)
    return address if address.startswith(("http://", "https://")) else None


@contextmanager
def for_stages(config: ClusterConfig) -> Iterator[tuple[str, int]]:
    """The Ray that a run's stages use: its address, and how many families it holds at once.

    A local Ray runs for the length of the block. A cluster that others run is asked, and let go:
    whoever stays connected ends with its head, and for a stage that begins when the head is there
    again it never was away.

    Raises:
        BadInput: it cannot hold one family.
    """
    if over_http := http_address(config):
        yield over_http, int(call(config, "tasks.job:families_at_once", []))
        return
    ours = cluster.given_address(config) == cluster.LOCAL
    with cluster.connected(config) as address:
        cluster.wait_for_room(config)
        places = cluster.families_at_once(config)
        if ours:
            yield address, places
    if not ours:
        yield address, places


def on_worker(
    config: ClusterConfig,
    function: Callable[..., Any],
    settings: BaseModel,
    *folders: Path | Output,
) -> Any:
    """As `cluster.on_worker`, of paths: what is read, and what is to be written."""
    paths = [folder.path if isinstance(folder, Output) else folder for folder in folders]
    if not http_address(config):
        return cluster.on_worker(config, function, settings, *(str(p.absolute()) for p in paths))
    results = storage(config) / "outputs" / uuid.uuid4().hex
    there = [
        str(results / folder.path.name) if isinstance(folder, Output) else shared(config, folder)
        for folder in folders
    ]
    name, kind = spelled(function), spelled(type(settings))
    known = settings.model_dump(mode="json")
    try:
        answer = call(config, "tasks.job:on_worker", [name, kind, known, there])
        for folder in folders:
            if isinstance(folder, Output) and (results / folder.path.name).exists():
                shutil.copytree(results / folder.path.name, folder.path, dirs_exist_ok=True)
    finally:
        shutil.rmtree(results, ignore_errors=True)
    return answer


def spelled(thing: Any) -> str:
    """`module:name` of a function or class, by which another process finds it: a module that is
    run has another name there."""
    module = sys.modules[thing.__module__]
    spec = module.__spec__ if thing.__module__ == "__main__" else None
    return f"{spec.name if spec else thing.__module__}:{thing.__qualname__}"


def storage(config: ClusterConfig) -> Path:
    """The folder that is shared with the cluster; BadInput where it cannot be."""
    folder = Path(config.storage)
    if not folder.is_absolute():
        raise BadInput(
            f"cluster.storage: {config.storage} is a folder of this machine; with the address "
            f"{http_address(config)} it must be an absolute path that the cluster's nodes share"
        )
    return folder


def shared(config: ClusterConfig, path: Path) -> str:
    """The same file or folder on the shared storage, copied there if nobody has."""
    path, folder = path.absolute(), storage(config)
    if path.is_relative_to(folder):
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.relative_to(path.parent)} {file_sha256(file)}\n".encode())
    there = folder / "inputs" / digest.hexdigest()[:16]
    if not there.exists():
        temporary = there.with_name(f"{there.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, temporary / path.name)
        try:
            temporary.rename(there)
        except OSError:  # somebody was quicker
            shutil.rmtree(temporary)
    return str(there / path.name)


def call(
    config: ClusterConfig,
    function: str,
    arguments: list[Any],
    *,
    key: str = "",
    poll: Callable[[], bool] = lambda: False,
) -> Any:
    """What `function(config, *arguments)` returns in a job, its log printed meanwhile.

    A job of the same `key` that a killed caller left behind is ended first. `poll` is called
    about once a second; True ends the job.

    Raises:
        BadInput: it was raised there.
        Outage: the Jobs API or the job is gone.
        RuntimeError: another error was raised there; its message says which.
    """
    folder = storage(config) / "jobs" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    there = config.model_copy(update={"address": None}).model_dump(mode="json")
    request = {"function": function, "cluster": there, "arguments": arguments}
    (folder / REQUEST).write_text(json.dumps(request))
    client = _client(config)
    if key:
        _end_others(client, key)
    job = _submit(
        client,
        entrypoint=f"python -m tasks.job {shlex.quote(str(folder))}",
        runtime_env={"working_dir": ".", "excludes": list(LEFT)},
        metadata={"genarena": key},
    )
    status = None
    try:
        status = _attend(client, job, poll)
    finally:
        if status is None:
            client.stop_job(job)
    file = folder / ANSWER
    if not file.exists():
        info = client.get_job_info(job)
        raise Outage(f"Ray's job {job} ended without an answer ({status}): {info.message}")
    answer = json.loads(file.read_text())
    shutil.rmtree(folder)
    if "error" in answer:
        kinds = {"BadInput": BadInput, "Outage": Outage}
        raise kinds.get(answer["kind"], RuntimeError)(answer["error"])
    return answer["result"]


def _attend(client: Any, job: str, poll: Callable[[], bool]) -> str | None:
    """The job's status when it has ended; None where it is to be ended."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            status, log = client.get_job_status(job), client.get_job_logs(job)
            heard = time.monotonic()
        except (OSError, RuntimeError) as error:  # the connection's errors are OSErrors
            if time.monotonic() - heard > PATIENCE_S:
                raise Outage(f"Ray's Jobs API does not answer: {error}") from error
        else:
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if status.is_terminal():
                poll()
                return str(status)
        if poll():
            return None
        time.sleep(POLL_S)


def _client(config: ClusterConfig) -> Any:
    # an address in the environment would win over the one that is given here
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    address, before = http_address(config), {n: os.environ.pop(n, None) for n in names}
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise Outage(f"cluster.address: {error}") from error
    except RuntimeError as error:  # it answers, and refuses us: a token that is wrong, or none
        raise BadInput(f"cluster.address: {address}: {' '.join(str(error).split())}") from error
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _submit(client: Any, **job: Any) -> str:
    """A job's id; a head that has just started has no agent for it for some seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise Outage(f"cluster.address: {error}") from error
            time.sleep(POLL_S)


def _end_others(client: Any, key: str) -> None:
    """Two trainings must not meet over the same checkpoints."""
    for job in client.list_jobs():
        if (job.metadata or {}).get("genarena") == key and not job.status.is_terminal():
            client.stop_job(job.submission_id)
            while not client.get_job_status(job.submission_id).is_terminal():
                time.sleep(POLL_S)
