"""A training's history on its way to MLflow: what its run does not have yet, and nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.training.history import VALIDATION, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

# the last step whose record, and whose validation, the run has: validations come later
DELIVERED, VALIDATED = "genarena.delivered_step", "genarena.delivered_validation"
BATCH = 900  # log_batch takes 1,000 metrics


def send_history(client: MlflowClient, run_id: str, records: list[Record], pictures: Path) -> None:
    """Log the records (and sample grids) that the run does not have yet; safe to repeat.

    A validation that has become known since its step was logged is logged on its own.
    """
    from mlflow.entities import Metric

    tags = client.get_run(run_id).data.tags
    delivered, validated = (int(tags.get(tag, -1)) for tag in (DELIVERED, VALIDATED))
    new = [r for r in records if r["step"] > delivered]
    checked = [
        r
        for r in records
        if r["step"] > validated and any(name.startswith(VALIDATION) for name in r)
    ]
    metrics = [
        Metric(name, float(value), int(1000 * record["seconds"]), record["step"])
        for part, of_validation in ((new, False), (checked, True))
        for record in part
        for name, value in record.items()
        if name not in ("step", "seconds")
        and name.startswith(VALIDATION) == of_validation
        and isinstance(value, (int, float))
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    for record in checked:
        _send_picture(client, run_id, pictures / f"step-{record['step']:08d}.png", record["step"])
    for tag, part in ((DELIVERED, new), (VALIDATED, checked)):
        if part:
            client.set_tag(run_id, tag, str(part[-1]["step"]))


def _send_picture(client: MlflowClient, run_id: str, path: Path, step: int) -> None:
    if not path.exists():
        return
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    client.log_image(run_id, pixels, key="samples", step=step)
