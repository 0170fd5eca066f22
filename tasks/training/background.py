"""Validation beside the training: a process that scores candidates at the lowest priority."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import tasks
from models.base import GenerativeModel
from tasks.training.candidates import Candidates
from tasks.training.selection import Scorer, ValidationFailed

SPEC, LOG = "validator.json", "validator.log"
DEATHS = 3  # of a killed validator, over the same candidate


class Background(Scorer):
    """Runs `tasks.training.validator` on this node and this device, for as long as it lives.

    A validator that is killed is replaced, for what waits is on disk; one that ends with an
    error ends the training, for another would end alike.
    """

    def __init__(self, spec: dict[str, Any], device: torch.device) -> None:
        self.spec = {**spec, "device": str(device)}
        self.process: subprocess.Popen[bytes] | None = None
        self.victim: int | None = None
        self.deaths = 0

    def start(self, candidates: Candidates, model: GenerativeModel) -> None:
        self.candidates = candidates
        candidates.directory.mkdir(parents=True, exist_ok=True)
        (candidates.directory / SPEC).write_text(json.dumps(self.spec))
        self._spawn()

    def poll(self) -> None:
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return
        waiting = self.candidates.waiting()
        victim = waiting[0] if waiting else None
        if status > 0:
            raise ValidationFailed(f"validation of {_named(victim)}: {self._last_line()}")
        self.deaths = self.deaths + 1 if victim == self.victim else 1
        self.victim = victim
        if self.deaths >= DEATHS:
            raise ValidationFailed(
                f"validation of {_named(victim)}: its process was killed {DEATHS} times, the "
                f"last time by signal {-status}; is there memory for two processes? If not, "
                "set train.validation: synchronous"
            )
        self._spawn()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            self.process.stdin.close()

    def _spawn(self) -> None:
        self.stop()
        root = str(Path(tasks.__file__).parents[1])  # a worker of Ray finds it otherwise
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with (self.candidates.directory / LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.training.validator", str(self.candidates.directory)],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,  # its end is how the validator learns of ours
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _last_line(self) -> str:
        lines = (self.candidates.directory / LOG).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")


def _named(step: int | None) -> str:
    return "no candidate yet" if step is None else f"step {step}"
