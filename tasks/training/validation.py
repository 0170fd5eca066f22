"""What is measured on the validation split while training, and chooses the best checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import GenerativeModel
from tasks.evaluation.features import Extractor
from tasks.evaluation.fidelity import frechet_distance
from tasks.pictures import save_grid
from tasks.training.config import TrainConfig

GRID = 64


class Validator:
    """Call it with the model and the step; returns metrics and their `"score"`, lower better.

    `bits_per_dim` is measured where the family has a likelihood, on up to
    `validation_images`; `frechet_distance` always, on `validation_samples` samples against
    the validation split. Noise is the same at every call, so the curves are smooth.
    """

    def __init__(
        self, x: Tensor, extractor: Extractor, config: TrainConfig, pictures: Path | None = None
    ) -> None:
        self.x, self.extractor, self.config, self.pictures = x, extractor, config, pictures
        self.real = extractor(x)

    def __call__(self, model: GenerativeModel, step: int) -> dict[str, Any]:
        torch.manual_seed(self.config.seed)
        samples = torch.cat([model.sample(n) for n in _parts(self.config.validation_samples)])
        metrics = {"frechet_distance": frechet_distance(self.extractor(samples), self.real)}
        if model.likelihood != "none":
            x = self.x[: self.config.validation_images].to(model.device)
            nats = torch.cat([-model.log_prob(part) for part in x.split(256)]).double().mean()
            metrics["bits_per_dim"] = float(nats) / (model.data.dimensions * math.log(2))
        if self.pictures is not None:
            path = self.pictures / f"step-{step:08d}.png"
            save_grid(path, samples[:GRID].cpu(), model.data.levels)
        wanted = self.config.select
        if wanted == "auto":
            wanted = "bits_per_dim" if "bits_per_dim" in metrics else "frechet_distance"
        if wanted not in metrics:
            raise ValueError(
                f"train.select: {wanted} is not measured for a family without likelihood"
            )
        return {**metrics, "score": metrics[wanted]}


def _parts(total: int, size: int = 256) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
