"""What every stage's command does around its `run`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from models import FAMILIES
from tasks.cluster import nodes_lost
from tasks.environment import FLOW_PID, prepare_environment
from tasks.errors import AWAY, BadInput, Outage, exit_on_bad_input, nearest
from tasks.handover import COMMAND
from tasks.params import load_params
from tasks.runs import UNEXPLAINED, Run


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The arguments of the stages that exist once for each family and seed."""
    arguments = parser(name, doc)
    arguments.add_argument("family")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    arguments.add_argument("--classifier", type=Path, default=Path("artifacts/classifier"))
    return arguments


@contextmanager
def running(name: str, run: Run | None = None) -> Iterator[None]:
    """Around a stage: environment, watch over the parents, error line, failure record."""
    prepare_environment()
    _end_with_parents()
    with exit_on_bad_input(name):
        if run and run.family not in FAMILIES:
            raise BadInput(f"unknown family '{run.family}'{nearest(run.family, FAMILIES)}")
        if run and run.family not in load_params().models:
            raise BadInput(f"params.yaml: models.{run.family}: missing")
        if run and run.seed < 0:
            raise BadInput(f"--seed: {run.seed} is negative; a seed is 0 or more")
    record = run.failure if run else None
    if record:  # stands until the stage ends well, so even a kill leaves a reason behind
        _write_reason(record, name, UNEXPLAINED)
    with exit_on_bad_input(name):
        try:
            yield
        except Exception as error:
            if record:
                kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
                _write_reason(record, name, f"{kind}{error}")
            if isinstance(error, Outage):
                print(f"{name}: {error}", file=sys.stderr)
            elif nodes_lost(error):
                traceback.print_exc()
            else:
                raise
            raise SystemExit(AWAY) from error
    if record:
        record.unlink(missing_ok=True)


def _write_reason(record: Path, stage: str, reason: str) -> None:
    record.parent.mkdir(exist_ok=True)
    first_lines = " ".join(reason.split())[:500]
    record.write_text(json.dumps({"stage": stage, "reason": first_lines}) + "\n")


def _end_with_parents() -> None:
    """Interrupt this process when the one that runs the pipeline is gone.

    After a `kill -9` of `dvc repro` or of the flow, a training must not go on unseen and
    meet its own successor over the same checkpoints.
    """
    watched: list[psutil.Process] = []
    parents = psutil.Process().parents()
    if COMMAND in os.environ:  # this is the work of that process, not its own (`tasks.warm`)
        command = psutil.Process(int(os.environ.pop(COMMAND)))
        parents = [command, *command.parents()]
    for parent in parents:
        watched.append(parent)
        if any(Path(word).name == "dvc" for word in parent.cmdline()[:3]):
            break
    else:
        watched = []  # started by hand: free to outlive the shell
    if FLOW_PID in os.environ and psutil.pid_exists(int(os.environ[FLOW_PID])):
        watched.append(psutil.Process(int(os.environ[FLOW_PID])))
    if not watched:
        return

    def watch() -> None:
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in watched):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="watch-parents").start()
