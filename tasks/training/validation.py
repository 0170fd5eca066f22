"""What is measured on the validation split while training, and chooses the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import GenerativeModel
from models.data import Batch, DataSpec
from tasks.data import shards
from tasks.data.shards import Split
from tasks.evaluation import conditions
from tasks.evaluation.features import Extractor, classifier_features
from tasks.evaluation.fidelity import frechet_distance
from tasks.evaluation.manifold import manifold_metrics
from tasks.evaluation.pictures import triptychs
from tasks.evaluation.reconstruction import psnr
from tasks.pictures import save_grid, show
from tasks.training.config import TrainConfig
from tasks.training.data import batch_on

GRID, TRIPTYCHS, BATCH = 64, 16, 256
PICTURES = "samples"  # the folder of a picture for each validation
COVERAGE = frozenset({"coverage"})
HIGHER_IS_BETTER = ("psnr",)


class Validator:
    """Call it with the model and the step; returns metrics and their `"score"`, lower better.

    `frechet_distance` and `coverage` of images, on `validation_samples` samples against the
    validation split, asked for with its conditions; `bits_per_dim` where the family has a
    likelihood, on up to `validation_images` examples; `psnr` and `perceptual_distance` where it
    translates and the true image is known; where it is asked for, `loss`, the mean of what
    training descends, on as many. Noise is the same at every call: curves are smooth.
    """

    def __init__(
        self,
        split: Split,
        train: NDArray[np.uint8],
        extractor: Extractor | None,
        config: TrainConfig,
        pictures: Path | None = None,
        images: Iterable[NDArray[np.uint8]] | None = None,  # of the whole split, in parts
    ) -> None:
        self.split, self.extractor, self.config, self.pictures = split, extractor, config, pictures
        if extractor is not None:
            self.real = np.concatenate([extractor(part) for part in images or [split.x]])
            self.train = extractor(train[: config.validation_samples])
        self.floors: dict[int, float] = {}  # of the coverage, by the number of samples

    @classmethod
    def of(cls, spec: dict[str, Any], device: torch.device) -> Validator:
        """The one that a training needs (`spec` as in `tasks.train`); reads data and classifier."""
        prepared, extractor = Path(spec["prepared"]), None
        if DataSpec(**spec["data"]).modality == "image":  # features are known of images
            extractor = classifier_features(Path(spec["classifier"]), device)
        config, pictures = TrainConfig(**spec["train"]), Path(spec["directory"]) / PICTURES
        rows = max(config.validation_images, config.validation_samples, GRID)
        validation = shards.read_split(prepared, "validation", rows)
        train = shards.read_split(prepared, "train", config.validation_samples)
        images = shards.each_image_block(prepared, "validation")
        return cls(validation, train.x, extractor, config, pictures, images)

    def __call__(self, model: GenerativeModel, step: int) -> dict[str, Any]:
        torch.manual_seed(self.config.seed)
        wanted = self.config.validation_samples if self.extractor else GRID
        samples = conditions.draw(model, self.split, wanted, 256)
        metrics: dict[str, Any] = {}
        if self.extractor is not None:
            features = self.extractor(samples)
            metrics["frechet_distance"] = frechet_distance(features, self.real)
            metrics |= manifold_metrics(self.real, features, keys=COVERAGE)
            metrics["coverage_floor"] = self._coverage_floor(len(samples))
            metrics |= self._translation(model, samples, features)
        if model.likelihood != "none":
            x = torch.from_numpy(self.split.x[: self.config.validation_images]).to(model.device)
            nats = torch.cat([-model.log_prob(part) for part in x.split(BATCH)]).double().mean()
            metrics["bits_per_dim"] = float(nats) / (model.data.dimensions * math.log(2))
        if self.config.select == "loss":
            metrics["loss"] = self._loss(model)
        self._picture(model, samples, step)
        select: str = self.config.select
        if select == "auto":
            preferred = ("bits_per_dim", "frechet_distance")
            select = next(name for name in preferred if name in metrics)
        if select not in metrics:
            raise ValueError(f"train.select: {select} is not measured for this family and data")
        return {**metrics, "score": metrics[select] * (-1 if select in HIGHER_IS_BETTER else 1)}

    def _loss(self, model: GenerativeModel) -> float:
        reason = loss_unsuited(model)
        if reason:
            raise ValueError(f"train.select: loss, but {reason}")
        (phase,), split = model.phases(), self.split
        total, n = 0.0, min(len(split.x), self.config.validation_images)
        for start in range(0, n, BATCH):
            rows = [None if part is None else part[start : min(start + BATCH, n)] for part in split]
            parts = [None if part is None else torch.from_numpy(part) for part in rows]
            assert parts[0] is not None
            batch = batch_on(Batch(parts[0], *parts[1:]), model.device)
            total += len(batch.x) * float(model.losses(batch, phase.name)["loss"])
        return total / n

    def _coverage_floor(self, n: int) -> float:
        """What as many training images cover."""
        if n not in self.floors:
            floor = manifold_metrics(self.real, self.train[:n], keys=COVERAGE)
            self.floors[n] = floor["coverage"]
        return self.floors[n]

    def _translation(
        self, model: GenerativeModel, samples: Tensor, features: NDArray[np.float32]
    ) -> dict[str, float]:
        spec, n = model.data.source, len(samples)
        if "source" not in model.conditions or spec is None or not spec.truth:
            return {}
        apart = np.linalg.norm(features - self.real[:n], axis=1)
        found = {"perceptual_distance": float(apart.mean())}
        value = psnr(self.split.x[:n], samples.numpy(), model.data.levels)
        return {**found, "psnr": value} if math.isfinite(value) else found

    def _picture(self, model: GenerativeModel, samples: Tensor, step: int) -> None:
        if self.pictures is None:
            return
        path, levels = self.pictures / f"step-{step:08d}.png", model.data.levels
        if model.data.modality != "image":
            show(path, samples, model.data)
            return
        spec, source = model.data.source, self.split.source
        if "source" not in model.conditions or spec is None or source is None:
            save_grid(path, samples[:GRID], levels)
            return
        truth = torch.from_numpy(self.split.x) if spec.truth else None
        shown = triptychs(source, samples[:TRIPTYCHS], truth, model.data)
        save_grid(path, shown, levels, columns=6 if spec.truth else 8)


def loss_unsuited(model: GenerativeModel) -> str | None:
    """Why the training loss does not say which of two models is better; None: it does."""
    phases = [phase.name for phase in model.phases()]
    if len(phases) == 1:
        return None
    if not phases:
        return "the family is fitted, not descended: it has no loss of a batch"
    return f"the family has {len(phases)} of them ({', '.join(phases)}), which do not add up to one"
