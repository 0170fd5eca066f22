"""The registered model: MLflow loads this file by path, with `models/` beside it and nothing
else of the project. Input: a DataFrame, one request a row, with the column `n` (and `label`
where the family takes it). Parameters: `seed`, `temperature`. Output: uint8 images
`[N, H, W, C]`, the requests' samples in the order of their rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch

from models import store

LARGEST_BATCH = 500


class Sampler(mlflow.pyfunc.PythonModel):
    """Draws samples from a model stored as safetensors and JSON."""

    def load_context(self, context: Any) -> None:
        self.model = store.load(Path(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Raises ValueError for a request that is not `n` >= 0 or asks for a label in vain."""
        params = {"seed": 0, "temperature": 1.0, **(params or {})}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(params["seed"]))
            parts = [
                self._draw(row, float(params["temperature"]))
                for row in model_input.to_dict("records")
            ]
        levels = torch.cat(parts) if parts else torch.empty(0, *self.model.data.shape)
        scale = 255 / (self.model.data.levels - 1)
        images = (levels.float() * scale).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).numpy()

    def _draw(self, request: dict[Any, Any], temperature: float) -> torch.Tensor:
        n = int(request["n"])
        if n < 0:
            raise ValueError(f"n: {n} samples cannot be drawn; give 0 or more")
        unknown = set(request) - {"n"} - set(self.model.conditions)
        if unknown:
            takes = sorted({"n", *self.model.conditions})
            raise ValueError(f"{sorted(unknown)[0]}: unknown column; this model takes {takes}")
        conditions: dict[str, Any] = {}
        if "label" in request:
            conditions["label"] = torch.full((n,), int(request["label"]))
        parts = []
        for start in range(0, n, LARGEST_BATCH):
            part = slice(start, min(start + LARGEST_BATCH, n))
            given = {name: value[part] for name, value in conditions.items()}
            count = part.stop - part.start
            parts.append(self.model.sample(count, temperature=temperature, **given))
        return torch.cat(parts) if parts else torch.empty(0, *self.model.data.shape)


if __name__ != "tasks.serving":  # loaded by MLflow, not imported by a test or by a tool
    mlflow.models.set_model(Sampler())
