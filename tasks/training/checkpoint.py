"""Checkpoints that survive a kill at any moment, and load without running code.

    step-00000500/  model.safetensors  average.safetensors  optimizer.pt  progress.json

Each is written under a temporary name and renamed. A damaged newest one is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)
KEPT = 2


class StorageFailed(RuntimeError):
    """The disk did not take what training has to write; what is there already is whole."""


@contextmanager
def writing(what: str, directory: Path) -> Iterator[None]:
    """Inside, a failed write becomes `StorageFailed`, which says what, where and how much is free.

    safetensors and torch have errors of their own for what the system says.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(directory).free / 2**20
        reason = " ".join(str(error).split())[:200]
        raise StorageFailed(
            f"{what} could not be written to {directory} ({reason}; {free:,.1f} MiB are free). "
            "Nothing that was there is lost: make room, and the same command goes on"
        ) from error


class Checkpoints:
    """The checkpoints of one training run, in one directory."""

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        average: nn.Module,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self.directory = directory
        self.model, self.average, self.optimizers = model, average, optimizers
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, progress: dict[str, Any]) -> None:
        """Write a checkpoint of the current state, then drop all but the newest two.

        Raises:
            StorageFailed: it could not be written; the former ones are as they were.
        """
        step = progress["step"]
        final = self.directory / f"step-{step:08d}"
        with (
            writing(f"the checkpoint of step {step:,}", self.directory),
            _Replacing(final) as temporary,
        ):
            save_tensors(self.model.state_dict(), temporary / "model.safetensors")
            save_tensors(self.average.state_dict(), temporary / "average.safetensors")
            torch.save([o.state_dict() for o in self.optimizers], temporary / "optimizer.pt")
            (temporary / "progress.json").write_text(json.dumps(progress))
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def oldest(self) -> int:
        """The step of the oldest that is kept: training may have to go on from there."""
        return int(self._all()[0].name.removeprefix("step-"))

    def load_latest(self) -> dict[str, Any]:
        """Load the newest checkpoint that is whole; returns its progress, `{}` if there is none."""
        for path in reversed(self._all()):
            try:
                model = load_file(path / "model.safetensors")
                average = load_file(path / "average.safetensors")
                states = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
                progress = json.loads((path / "progress.json").read_text())
            except (
                SafetensorError,
                OSError,
                RuntimeError,
                ValueError,
                EOFError,
                pickle.UnpicklingError,
            ) as error:
                logger.warning(
                    "checkpoint %s is damaged (%s); trying the one before it", path.name, error
                )
                continue
            self.model.load_state_dict(model)
            self.average.load_state_dict(average)
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
            return progress
        return {}

    def _all(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.is_dir() and "." not in p.name)


class _Replacing:
    """A temporary directory that takes the place of `final` when the block ends well."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.temporary = final.with_name(final.name + ".tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return self.temporary

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for file in self.temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        old = self.final.with_name(self.final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.temporary.rename(self.final)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
