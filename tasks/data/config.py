"""Which data: the `dataset:` section of `params.yaml`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.base import Config, Positive

Share = Annotated[float, Field(gt=0, lt=1)]


class DatasetConfig(Config):
    name: Literal["digits", "mnist", "image_folder"] = "digits"
    path: str = "data/raw"  # folder (or, for image_folder, any fsspec URI) with the source
    validation: Share = 0.1  # shares of the examples, chosen by the hash of their content
    test: Share = 0.2  # where the source has no official test split
    image_size: Positive | None = None  # image_folder: resize and crop to a square; null: as is
    skip_bad: bool = False  # drop and list bad files instead of refusing them

    @property
    def title(self) -> str:
        """What experiment and registered models are called: the name, or the folder's name."""
        if self.name != "image_folder":
            return self.name
        folder = self.path.rstrip("/").rsplit("/", 1)[-1]
        return re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-") or self.name

    @model_validator(mode="after")
    def _something_left(self) -> DatasetConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test leave nothing to train on (their sum must be < 1)")
        return self
