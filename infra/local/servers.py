"""The whole topology: who knows which secret, who waits for whom, and what a client must know."""

from __future__ import annotations

import fcntl
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.local.postgres import make_databases, postgres, url
from infra.local.process import (
    HOST,
    Server,
    free_port,
    http_ok,
    plain_environment,
    stop_all,
)
from infra.local.ray_nodes import ray_nodes
from infra.local.storage import make_buckets, storage
from tasks.environment import DEFAULTS, STATE
from tasks.errors import BadInput

POOL = "genarena"
PREFIX = "genarena-"
ROLES = ("mlflow", "mlflow_auth", "prefect")  # of PostgreSQL, each with its own database
AUTH_CONFIG = """[mlflow]
default_permission = READ
database_uri = {uri}
# else each request costs a quarter of a second, of which a registered model takes hundreds
auth_cache_ttl_seconds = 60
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Topology:
    """The running servers by name, a client's environment, and every secret by its use.

    In `scratch` lie PostgreSQL's data and Ray's sessions.
    """

    servers: dict[str, Server]
    client: dict[str, str]
    secrets: dict[str, str]
    scratch: Path


@contextmanager
def topology(project: Path, cpus: int = 1) -> Iterator[Topology]:
    """Everything up for the length of the block, for the project's folder; nothing is kept.

    `cpus`: of each Ray node. Logs lie in `.genarena/servers`, a client's environment in
    `.genarena/servers.env`. Raises BadInput where PostgreSQL is missing, or where the servers of
    this project run already.
    """
    folder = project / STATE / "servers"
    servers: list[Server] = []
    with _only_here(project), _folders(folder) as scratch:
        try:
            there = _build(project, folder, scratch, cpus)
            servers += there.servers.values()
            _start(there)
            write_private(project / STATE / "servers.env", _shell(there.client))
            yield there
        finally:
            (project / STATE / "servers.env").unlink(missing_ok=True)
            stop_all(servers)


@contextmanager
def _only_here(project: Path) -> Iterator[None]:
    file = project / STATE / "servers.lock"
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"the servers of {project} run already") from None
        yield


@contextmanager
def _folders(folder: Path) -> Iterator[Path]:
    """`folder`, empty, and one for PostgreSQL and Ray, which is removed in the end.

    That is not below the project: another user runs PostgreSQL, and a socket's path must be short.
    """
    note = folder / "scratch"
    if note.exists() and PREFIX in note.read_text():  # of servers that were killed
        shutil.rmtree(note.read_text(), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX))
    note.write_text(str(scratch))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(project: Path, folder: Path, scratch: Path, cpus: int) -> Topology:
    uses = ("postgres", "s3_key", "mlflow_admin", "mlflow_cookies", "prefect_api", "ray")
    secret = {use: secrets.token_hex(24) for use in (*uses, *ROLES)}
    database, port = postgres(folder, scratch, secret["postgres"])
    s3, s3_address = storage(folder)
    aws = {
        "AWS_ACCESS_KEY_ID": "genarena",
        "AWS_SECRET_ACCESS_KEY": secret["s3_key"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_address,
    }
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret["ray"]}
    home = {**DEFAULTS, "PYTHONPATH": str(project), "GENARENA_HOME": str(project)}
    nodes, ray_address, jobs = ray_nodes(folder, scratch, {**home, **token}, cpus)
    mlflow, mlflow_address = _mlflow(folder, secret, port, aws)
    prefect, prefect_address = _prefect(folder, secret, port)
    client = {
        **aws,
        **token,
        "RAY_ADDRESS": ray_address,
        "RAY_API_SERVER_ADDRESS": jobs,
        "MLFLOW_TRACKING_URI": mlflow_address,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": secret["mlflow_admin"],
        "PREFECT_API_URL": prefect_address,
        "PREFECT_API_AUTH_STRING": f"genarena:{secret['prefect_api']}",
        "PREFECT_HOME": str(folder / "prefect"),
        "GENARENA_HOME": str(project),
    }
    worker = Server(
        "worker",
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
        plain_environment(home, client, {"PREFECT_WORKER_QUERY_SECONDS": "2"}),
        folder,
        words="started!",
        cwd=project,
    )
    all_of_them = [database, s3, *nodes, mlflow, prefect, worker]
    return Topology({server.name: server for server in all_of_them}, client, secret, scratch)


def _mlflow(
    folder: Path, secret: dict[str, str], port: int, aws: dict[str, str]
) -> tuple[Server, str]:
    config = folder / "mlflow-auth.ini"
    users = url("postgresql", port, "mlflow_auth", secret["mlflow_auth"])
    write_private(config, AUTH_CONFIG.format(uri=users))
    own = free_port(5000)
    environment = {
        # by the environment, not by arguments: these every user of the machine can read
        "MLFLOW_BACKEND_STORE_URI": url("postgresql", port, "mlflow", secret["mlflow"]),
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret["mlflow_admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret["mlflow_cookies"],
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
        *("--host", HOST, "--port", str(own), "--workers", "1"),
        *("--allowed-hosts", f"{HOST}:{own},localhost:{own}"),
        *("--artifacts-destination", "s3://mlflow/"),
    ]
    address = f"http://{HOST}:{own}"
    everything = plain_environment(DEFAULTS, aws, environment)
    ready = http_ok(f"{address}/health")
    return Server("mlflow", command, everything, folder, ready=ready, cwd=folder), address


def _prefect(folder: Path, secret: dict[str, str], port: int) -> tuple[Server, str]:
    (folder / "prefect").mkdir()
    own = free_port(4200)
    address = f"http://{HOST}:{own}/api"
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": url(
            "postgresql+asyncpg", port, "prefect", secret["prefect"]
        ),
        "PREFECT_SERVER_API_AUTH_STRING": f"genarena:{secret['prefect_api']}",
        "PREFECT_API_AUTH_STRING": f"genarena:{secret['prefect_api']}",  # its services' own
    }
    command = [
        *(sys.executable, "-m", "prefect", "server", "start"),
        *("--host", HOST, "--port", str(own)),
    ]
    everything = plain_environment(DEFAULTS, environment)
    ready = http_ok(f"{address}/ready")
    return Server("prefect", command, everything, folder, ready=ready, cwd=folder), address


def _start(there: Topology) -> None:
    """Each as soon as what it needs is there."""
    servers, secret = there.servers, there.secrets
    port = int(next(w for w in servers["postgres"].command if w.startswith("--port="))[7:])
    for name in ("postgres", "s3", "ray-head"):
        servers[name].start()
    servers["postgres"].wait()
    make_databases(port, secret["postgres"], {role: secret[role] for role in ROLES})
    for name in ("prefect", "mlflow"):
        servers[name].start()
    servers["s3"].wait()
    make_buckets(there.client)
    servers["ray-head"].wait()
    more = [name for name in servers if name.startswith("ray-node")]
    for name in more:
        servers[name].start()
    servers["prefect"].wait()
    servers["worker"].start()
    for name in (*more, "mlflow", "worker"):
        servers[name].wait()


def write_private(path: Path, text: str) -> None:
    """A file that nobody else can read, from its first byte on."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def _shell(variables: dict[str, str]) -> str:
    """For `set -a; . file`."""
    return "".join(f"{name}='{value}'\n" for name, value in variables.items())
