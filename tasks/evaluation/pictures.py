"""The pictures of an evaluation: samples, samples by class, reconstructions, translations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.base import DataSpec, GenerativeModel
from tasks.data.shards import Split
from tasks.evaluation.translation import naive
from tasks.pictures import save_grid

if TYPE_CHECKING:
    from tasks.evaluation.protocol import Measured

SAMPLES, BY_CLASS, TRIPTYCHS = 64, 8, 16


def draw(folder: Path, found: Measured, model: GenerativeModel, test: Split) -> None:
    """Write what applies to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    levels = model.data.levels
    assert found.samples is not None
    save_grid(folder / "samples.png", found.samples[:SAMPLES], levels)
    if found.pairs is not None:
        rows = torch.stack([p[:16] for p in found.pairs]).flatten(0, 1)
        save_grid(folder / "reconstructions.png", rows, levels, columns=16)
    if "condition_accuracy" in found.metrics and model.data.classes:
        grid = by_class(found.samples, test, len(model.data.classes))
        save_grid(folder / "conditions.png", grid, levels, columns=BY_CLASS)
    if model.data.source is not None and "source" in model.conditions:
        assert test.source is not None
        known = torch.from_numpy(test.x) if found.truth else None
        shown = triptychs(test.source, found.samples[:TRIPTYCHS], known, model.data)
        save_grid(folder / "translations.png", shown, levels, columns=6 if found.truth else 8)


def by_class(samples: Tensor, test: Split, classes: int) -> Tensor:
    """A row of samples for each class that was asked for, `[classes * 8, C, H, W]`; black where
    there are fewer."""
    assert test.label is not None
    asked = test.label[np.arange(len(samples)) % len(test.label)]
    rows = torch.zeros(classes, BY_CLASS, *samples.shape[1:], dtype=samples.dtype)
    for label in range(classes):
        mine = samples[torch.from_numpy(asked == label)][:BY_CLASS]
        rows[label, : len(mine)] = mine
    return rows.flatten(0, 1)


def triptychs(source: np.ndarray, outputs: Tensor, truth: Tensor | None, data: DataSpec) -> Tensor:
    """Input, output and truth (where it is known) of each, one after the other."""
    n = len(outputs)
    assert data.source is not None
    source = source[:n]
    if data.source.kind == "masked":  # the hole is shown grey
        hole = source[:, -1:] > 0
        shown = np.where(hole, (data.levels - 1) // 2, source[:, :-1]).astype(np.uint8)
    else:
        shown = naive(source, data.source, data)
    panels = [torch.from_numpy(shown), outputs, *([truth[:n]] if truth is not None else [])]
    return torch.stack(panels, 1).flatten(0, 1)
