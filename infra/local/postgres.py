"""PostgreSQL: a data folder made afresh, a database and a role for each server that uses it."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from infra.local.process import HOST, Server, find_program, free_port, plain_environment
from tasks.errors import BadInput

ADMIN = "genarena"
INSTALL = "PostgreSQL is needed; install it (Debian: apt-get install postgresql)"


def postgres(folder: Path, scratch: Path, password: str) -> tuple[Server, int]:
    """The server, not yet started, and its port; its data lie in `scratch`.

    PostgreSQL refuses to run as root: then it runs as `postgres`, or `nobody`, in `scratch`,
    which that user must be able to enter. Raises BadInput where it is not installed.
    """
    initdb, program = find_program("initdb"), find_program("postgres")
    if initdb is None or program is None:
        raise BadInput(INSTALL)
    user = _user()
    data, secret = scratch / "postgres", scratch / "password"
    data.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    secret.write_text(password)
    if user:
        shutil.chown(data, user)
        shutil.chown(secret, user)
    subprocess.run(
        [
            *(initdb, "--pgdata", str(data), "--username", ADMIN, "--pwfile", str(secret)),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync"),
        ],
        check=True,
        user=user,
        group=user and pwd.getpwnam(user).pw_gid,
        extra_groups=[] if user else None,
        cwd=scratch,
        stdout=subprocess.DEVNULL,
    )
    secret.unlink()
    port = free_port(5432)
    settings = {
        "listen_addresses": HOST,
        "port": str(port),
        "unix_socket_directories": "",  # a path in it may be longer than a socket's may be
        "max_connections": "200",
        "fsync": "off",  # nothing is kept
    }
    command = [program, "-D", str(data), *(f"--{k}={v}" for k, v in settings.items())]
    server = Server(
        "postgres",
        command,
        plain_environment(),
        folder,
        words="ready to accept connections",
        user=user,
        stop_with=signal.SIGINT,  # its fast shutdown: SIGTERM waits for every client to leave
        cwd=scratch,
    )
    return server, port


def _user() -> str | None:
    """Whom to run as: somebody else where we are root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    raise BadInput(
        f"PostgreSQL does not run as {getpass.getuser()}, and there is no user postgres or nobody"
    )


def make_databases(port: int, password: str, roles: Mapping[str, str]) -> None:
    """A database for each role (name -> password), owned by it and closed to the others."""
    import psycopg2
    from psycopg2 import sql

    connection = psycopg2.connect(
        host=HOST, port=port, user=ADMIN, password=password, dbname="postgres"
    )
    connection.autocommit = True  # a database is not made inside a transaction
    with connection.cursor() as cursor:
        for name, secret in roles.items():
            role = sql.Identifier(name)
            make = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            cursor.execute(make.format(role, sql.Literal(secret)))
            cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
            cursor.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(role))
    connection.close()


def url(driver: str, port: int, role: str, password: str) -> str:
    """The address of a role's database as SQLAlchemy takes it."""
    return f"{driver}://{role}:{password}@{HOST}:{port}/{role}"
