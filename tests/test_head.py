"""Ray's head is ended and started again, between two families and in a training."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.process import free_port
from tasks.errors import AWAY
from tasks.runs import UNEXPLAINED, Run
from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]
PATIENCE_S = 400
NOTICED_S = 60
STEPS = 6000  # more than are done before the head is gone
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


@pytest.mark.timeout(600)
def test_a_training_whose_head_is_lost_is_an_outage_and_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    """With status 75, or ended by Ray without a word: both are tried again (`test_compare.py`)."""
    changes = {
        "train.budget": {"steps": STEPS},
        "train.checkpoint_every": 100,
        "train.validate_every": 1000,
        "train.validation": "synchronous",
    }
    path = projects.make_project(tmp_path / "project", changes)
    port = free_port(6380, HOST)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    variables = {**projects.environment(path), **token, "RAY_ADDRESS": f"{HOST}:{port}"}
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    train, log = [sys.executable, "-m", "tasks.train", "vae"], path / "train.log"
    classify = [sys.executable, "-m", "tasks.classifier"]
    projects.stage(path, "prepare")
    with head(port, variables, temporary), log.open("w") as file:
        subprocess.run(classify, cwd=path, env=variables, check=True)
        training = subprocess.Popen(
            train, cwd=path, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
        checkpoints = ".genarena/work/vae-0-*/checkpoints/step-*[0-9]/progress.json"
        _wait_for(lambda: any(path.glob(checkpoints)), training, log)
    with head(port, variables, temporary):
        try:
            status = training.wait(NOTICED_S)
            reason = json.loads((path / Run("vae", 0).failure).read_text())["reason"]
            assert status == AWAY or (status, reason) == (1, UNEXPLAINED), log.read_text()
        finally:
            training.kill()
        again = subprocess.run(train, cwd=path, env=variables, capture_output=True, timeout=200)
    assert again.returncode == 0, again.stderr.decode()
    facts = json.loads((path / "artifacts/train/vae-0/train.json").read_text())
    assert facts["train_steps"] == STEPS
    assert facts["resumed_from"] >= 100


def _wait(run: subprocess.Popen[bytes], log: Path, words: str) -> None:
    _wait_for(lambda: words in log.read_text(), run, log)


def _wait_for(there: Callable[[], bool], run: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
