"""The pictures of an evaluation: samples, samples by class, reconstructions, translations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.base import GenerativeModel
from models.data import DataSpec
from tasks.data.shards import Split
from tasks.evaluation.translation import naive
from tasks.pictures import histogram, save_grid, save_plane, show

if TYPE_CHECKING:
    from tasks.evaluation.measured import Measured

SAMPLES, BY_CLASS, TRIPTYCHS = 64, 8, 16
COLUMNS = 16  # of originals above their reconstructions, of samples above their neighbours
STRIPS, STEPS, PLANE = 6, 10, 16  # interpolations and their steps; side of the latent plane
FINEST = 128  # cells to a side of the density's picture
DENSITY_DRAWS = 4  # of dequantisation noise or of latents, in each cell


def draw(folder: Path, found: Measured, model: GenerativeModel, test: Split) -> None:
    """Write what applies to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    levels = model.data.levels
    assert found.samples is not None
    if model.data.modality != "image":
        show(folder / "samples.png", found.samples, model.data)
        if model.data.modality == "points" and model.likelihood != "none":
            save_plane(folder / "density.png", density(model))
            save_plane(folder / "data.png", histogram(torch.from_numpy(test.x), levels))
        return
    save_grid(folder / "samples.png", found.samples[:SAMPLES], levels)
    if model.latent_dim is not None and not model.conditions - {"label"}:
        strips = interpolations(model)
        save_grid(folder / "interpolations.png", strips, levels, columns=STEPS)
    if model.latent_dim == 2:
        save_grid(folder / "latent_plane.png", latent_plane(model), levels, columns=PLANE)
    if found.pairs is not None:
        rows = torch.stack([p[:COLUMNS] for p in found.pairs]).flatten(0, 1)
        save_grid(folder / "reconstructions.png", rows, levels, columns=COLUMNS)
    if found.neighbours is not None:
        rows = torch.from_numpy(np.concatenate(found.neighbours))
        columns = min(COLUMNS, len(found.neighbours[0]))
        save_grid(folder / "neighbours.png", rows, levels, columns=columns)
    if "condition_accuracy" in found.metrics and model.data.classes:
        grid = by_class(found.samples, test, len(model.data.classes))
        save_grid(folder / "conditions.png", grid, levels, columns=BY_CLASS)
    if model.data.source is not None and "source" in model.conditions:
        assert test.source is not None
        known = torch.from_numpy(test.x) if found.truth else None
        shown = triptychs(test.source, found.samples[:TRIPTYCHS], known, model.data)
        save_grid(folder / "translations.png", shown, levels, columns=6 if found.truth else 8)


@torch.no_grad()
def interpolations(model: GenerativeModel, seed: int = 0) -> Tensor:
    """Rows of samples between two latents each, along the great circle (White 2016)."""
    assert model.latent_dim is not None
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, STRIPS, 1, model.latent_dim, generator=generator)
    t = torch.linspace(0, 1, STEPS).view(1, STEPS, 1)
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-0.999, 0.999)[..., None]
    angle = torch.arccos(cosine)
    z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return _sampled(model, z.flatten(0, 1))


@torch.no_grad()
def latent_plane(model: GenerativeModel) -> Tensor:
    """Samples of a two-dimensional latent space at the normal distribution's quantiles."""
    quantiles = torch.special.ndtri((torch.arange(PLANE) + 0.5) / PLANE)
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return _sampled(model, torch.stack([columns, rows], -1).flatten(0, 1))


def _sampled(model: GenerativeModel, z: Tensor) -> Tensor:
    """One sample for each latent; all of one class where the model takes a class."""
    asked: dict[str, Tensor] = {}
    if "label" in model.conditions:
        width = len(model.data.attributes)
        asked["label"] = torch.zeros((len(z), width) if width else len(z), dtype=torch.long)
    given: dict[str, Any] = {n: rows.to(model.device) for n, rows in {"z": z, **asked}.items()}
    return model.sample(len(z), **given).cpu()


@torch.no_grad()
def density(model: GenerativeModel) -> Tensor:
    """The probabilities of the plane's cells, of every second one where they are many."""
    stride = max(1, model.data.levels // FINEST)
    cells = torch.arange(stride // 2, model.data.levels, stride, dtype=torch.uint8)
    grid = torch.cartesian_prod(cells, cells).to(model.device)
    draws = 1 if model.likelihood == "ode" else DENSITY_DRAWS  # each of those is a solver's run
    parts = [model.log_prob(part, samples=draws).cpu() for part in grid.split(4096)]
    return torch.cat(parts).view(len(cells), len(cells)).float().exp()


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
