"""Ray's head is ended and started again between two families; the run goes on as if it had not."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.process import free_port
from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]
PATIENCE_S = 400
HOST = "127.0.0.2"  # Ray takes 127.0.0.1 for an address by which other machines reach it


@contextmanager
def head(port: int, variables: dict[str, str], temporary: Path) -> Iterator[None]:
    """A Ray of one processor, so that families have to take turns; ended by force."""
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")),
            *("start", "--head", "--block", f"--port={port}", f"--node-ip-address={HOST}"),
            *("--num-cpus=1", "--include-dashboard=false", f"--temp-dir={temporary}"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
        ],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while socket.socket().connect_ex((HOST, port)) != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        process.terminate()  # ends what it has started as well
        process.wait(60)


def test_a_head_that_is_started_again_between_families(tmp_path: Path) -> None:
    changes = {"train.validation": "synchronous", "train.budget": {"steps": 5}}
    path = projects.make_project(tmp_path / "project", changes)
    port = free_port(6379, HOST)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    variables = {**projects.environment(path), **token}
    log = path / "run.log"
    temporary = Path("/tmp") / f"ray-{os.getpid()}"  # sockets have short names
    with head(port, variables, temporary), log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "genarena", "run", "--families", "naive_bayes gmm"],
            cwd=path,
            env={**variables, "RAY_ADDRESS": f"{HOST}:{port}"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(run, log, "evaluate@naive_bayes-0 Finished in state Completed()")
        except BaseException:
            run.kill()
            raise
    assert "train@gmm-0        best" not in log.read_text()
    with head(port, variables, temporary):
        try:
            assert run.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            run.kill()
    assert "Leaderboard: digits" in log.read_text()
    assert (path / "artifacts/evaluate/gmm-0").is_dir()


def _wait(run: subprocess.Popen[bytes], log: Path, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in log.read_text():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
