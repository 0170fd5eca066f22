"""What is refused before a training starts, since it could only fail in the workers."""

from __future__ import annotations

from typing import Any

from models import FAMILIES
from models.data import DataSpec
from tasks.errors import BadInput
from tasks.params import Params
from tasks.training.data import check_batch
from tasks.training.validation import loss_unsuited


def check(family: str, params: Params, manifest: dict[str, Any]) -> None:
    """Raises BadInput where `family` cannot be trained so on the data of this manifest."""
    try:
        # an elastic group makes do with those that can share the batch
        workers = params.cluster.most if params.cluster.fewest == params.cluster.most else 1
        check_batch(manifest["counts"]["train"], params.train.batch_size, workers)
    except ValueError as error:
        raise BadInput(str(error)) from error
    data, select = DataSpec(**manifest["spec"]), params.train.select
    reason = FAMILIES[family].unsuited(data)
    if reason:
        raise BadInput(f"{family} cannot learn from this data: {reason}")
    try:  # some only notice when they are built (conditional without classes)
        model = FAMILIES[family](params.models[family], data)
    except ValueError as error:
        raise BadInput(f"{family} cannot be built for this data: {error}") from error
    if select == "frechet_distance" and data.modality != "image":
        raise BadInput(
            f"train.select: frechet_distance is for images, not {data.modality}; use auto"
        )
    if select == "bits_per_dim" and FAMILIES[family].likelihood == "none":
        raise BadInput(f"train.select: bits_per_dim, but {family} has no likelihood; use auto")
    if select == "loss" and loss_unsuited(model):
        raise BadInput(f"train.select: loss, but {family}: {loss_unsuited(model)}; use auto")
    if params.train.budget.flops is not None and not model.phases():
        raise BadInput(
            f"train.budget: flops, but {family} is fitted, not descended: its work is not "
            "counted; use steps, images or minutes"
        )
    if params.train.data == "stream" and not model.phases():
        raise BadInput(
            f"train.data: stream, but {family} is fitted to all data at once; use auto or memory"
        )
    translates = "source" in FAMILIES[family].conditions and data.source and data.source.truth
    if select in ("psnr", "perceptual_distance") and not translates:
        raise BadInput(f"train.select: {select}, but {family} translates no known pair; use auto")
