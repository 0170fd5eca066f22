"""Which data: the `dataset:` section of `params.yaml`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.config import Config, Positive
from models.data import DataSpec, Modality, SourceSpec
from tasks.data.archives import is_archive, open_archive

Share = Annotated[float, Field(gt=0, lt=1)]
FOLDERS = ("image_folder", "paired_folder")
KNOWN = {  # shape and levels of sources that are always the same
    "digits": ((1, 8, 8), 17),
    "mnist": ((1, 28, 28), 256),
    "binarized_mnist": ((1, 28, 28), 2),
    "toy2d": ((2,), 256),
}
DEFAULT_PATH = "data/raw"


def plain(name: str) -> dict[str, Any]:
    """What to set in `params.yaml` for another data set: its images as they are."""
    as_is = {"dataset.derive": "none", "dataset.paired": True, "dataset.captions": []}
    return {"dataset.name": name, "dataset.path": DEFAULT_PATH, **as_is}


class DatasetConfig(Config):
    name: Literal[
        "digits", "mnist", "binarized_mnist", "image_folder", "paired_folder", "text", "toy2d"
    ] = "digits"
    path: str = DEFAULT_PATH  # folder; also a zip, a URI of fsspec (folder sources), a file (text)
    validation: Share = 0.1  # shares of the examples, chosen by the hash of their content
    test: Share = 0.2  # where the source has no official test split
    image_size: Positive | None = None  # folder sources: resize and crop to a square; null: as is
    skip_bad: bool = False  # drop and list bad files instead of refusing them
    derive: Literal["none", "edges", "low_resolution", "masked"] = "none"  # makes pairs of images
    scale: Literal[2, 4] = 2  # low_resolution: so many times smaller
    mask: Literal["random", "centre"] = "random"  # masked: where the hole of half the sides is
    paired: bool = True  # false: two domains, no training image of one has its pair in the other
    source_side: Literal["left", "right"] = "right"  # paired_folder: where the source is in A|B
    captions: tuple[str, ...] = ()  # templates, "a handwritten {name}"; captions.csv needs none
    window: int = Field(128, ge=2)  # text: bytes of one example
    toy: Literal["moons", "rings", "mixture"] = "mixture"  # toy2d: which density
    points: int = Field(100_000, ge=100)  # toy2d: how many are drawn from it

    @property
    def title(self) -> str:
        """What experiment and registered models are called: the name, or the folder's name."""
        if self.name == "toy2d":
            return f"toy2d-{self.toy}"
        if self.name not in FOLDERS and not (self.name == "text" and self.path != DEFAULT_PATH):
            return self.name
        folder = re.sub(r"(?i)\.(txt|zip)$", "", self.path.rstrip("/").rsplit("/", 1)[-1])
        return re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-") or self.name

    @property
    def modality(self) -> Modality:
        return {"text": "text", "toy2d": "points"}.get(self.name, "image")  # type: ignore[return-value]

    @property
    def has_pairs(self) -> bool:
        return self.name == "paired_folder" or self.derive != "none"

    def outline(self) -> DataSpec:
        """The data's kind as far as this section tells it; sizes are placeholders.

        A folder in an object store is not looked into: only `prepare` sees what it has.
        """
        if self.modality != "image":
            shape: tuple[int, ...] = (self.window,) if self.modality == "text" else (2,)
            return DataSpec(shape=shape, levels=256, modality=self.modality)
        side = self.image_size or 64
        shape, levels = KNOWN.get(self.name, ((1, side, side), 256))
        side = shape[1]
        source = None
        if self.has_pairs:
            kind: Literal["pair", "edges", "low_resolution", "masked"] = "pair"
            if self.derive != "none":
                kind = self.derive
            small = side // self.scale if kind == "low_resolution" else side
            channels = 2 if kind == "masked" else 1
            source = SourceSpec(kind=kind, shape=(channels, small, small), aligned=self.paired)
        labels = self.name not in ("paired_folder", "binarized_mnist")
        captions = bool(self.captions)
        if self.name == "image_folder" and Path(self.path).exists():
            labels, captions_there = self._look()
            captions |= captions_there
        return DataSpec(
            shape=shape,
            levels=levels,
            classes=("a", "b") if labels else (),
            source=source,
            text_length=int(captions or (self.name == "image_folder" and "://" in self.path)),
        )

    def _look(self) -> tuple[bool, bool]:
        """Whether the folder, or the zip file, has classes or attributes, and captions."""
        if is_archive(self.path):
            archive = open_archive(self.path)
            visible = {
                Path(e["name"]).name: e["type"] == "directory" for e in archive.ls(archive.root)
            }
        elif Path(self.path).is_dir():
            visible = {p.name: p.is_dir() for p in Path(self.path).iterdir() if p.name[0] != "."}
        else:
            return True, False
        return any(visible.values()) or "attributes.csv" in visible, "captions.csv" in visible

    @model_validator(mode="after")
    def _possible(self) -> DatasetConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test leave nothing to train on (their sum must be < 1)")
        if self.modality != "image" and (self.derive != "none" or self.captions):
            raise ValueError(f"derive and captions are for images; {self.name} has none")
        if self.name == "paired_folder" and self.derive != "none":
            raise ValueError("derive makes pairs of single images; a paired_folder has them")
        if not self.paired and not self.has_pairs:
            raise ValueError("paired: false needs two domains (name: paired_folder, or derive)")
        if any("{name}" not in template for template in self.captions):
            raise ValueError("captions: every template needs {name}, the place of the class name")
        return self
