"""What is computed of the real images once, and stored: features, the judge's logits, floors.

    features.json   name, sha256, dimensions, data_sha256, classifier_sha256, rows, floors
    <split>.npy     float32 [N, D]
    <split>-logits.npy   float32 [N, C], where the dataset's classifier knows classes

Where the data are no images there is `features.json` alone, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import BadInput
from tasks.evaluation import floors
from tasks.evaluation.classifier import Classifier
from tasks.evaluation.features import Extractor, logits

FACTS = "features.json"
Rows = NDArray[np.float32]


@dataclass
class RealFeatures:
    """Features `[N, D]` and logits `[N, C]` by split; no logits where there are no classes.
    And the floors of the number of samples that was asked for."""

    features: Mapping[str, Rows]
    logits: Mapping[str, Rows]
    floors: Mapping[str, Any]

    def floors_of(self, samples: int) -> Mapping[str, Any]:
        """Floors for that many samples: the stored ones, or else new ones (translators draw
        fewer), which are kept."""
        if self.floors[floors.SIZE] != floors.size(self.features, samples):
            self.floors = floors.compute(self.features, samples)
        return self.floors


def compute(
    extractor: Extractor,
    judge: Classifier,
    splits: Mapping[str, NDArray[np.uint8] | Iterable[NDArray[np.uint8]]],
    samples: int,
) -> RealFeatures:
    """Of images `[N, C, H, W]` by split, or of such parts of it; floors for so many samples.

    Raises BadInput where features are not finite: no distance to them would be a number.
    """
    features, found = {}, {}
    for name, images in splits.items():
        rows: list[Rows] = []
        outputs: list[Rows] = []
        for part in [images] if isinstance(images, np.ndarray) else images:
            rows.append(extractor(part))
            if judge.task == "classes":
                outputs.append(logits(extractor, rows[-1], judge, part))
        features[name] = np.concatenate(rows)
        bad = ~np.isfinite(features[name]).all(1)
        if bad.any():
            raise BadInput(
                f"evaluation.features: {extractor.name}: the features of {bad.sum():,} of "
                f"{len(features[name]):,} {name} images are not finite"
            )
        if outputs:
            found[name] = np.concatenate(outputs)
    return RealFeatures(features, found, floors.compute(features, samples))


def save(
    directory: Path,
    real: RealFeatures,
    extractor: Extractor,
    data_sha256: str,
    classifier_sha256: str,
) -> dict[str, Any]:
    """Write them to `directory`; returns the facts."""
    directory.mkdir(parents=True, exist_ok=True)
    for ending, arrays in (("", real.features), ("-logits", real.logits)):
        for split, rows in arrays.items():
            np.save(directory / f"{split}{ending}.npy", rows, allow_pickle=False)
    return _write(
        directory,
        {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "dimensions": next(iter(real.features.values())).shape[1],
            "data_sha256": data_sha256,
            "classifier_sha256": classifier_sha256,
            "rows": {split: len(rows) for split, rows in real.features.items()},
            "floors": dict(real.floors),
        },
    )


def save_none(directory: Path, reason: str, data_sha256: str) -> dict[str, Any]:
    """What stands there where the data are no images."""
    directory.mkdir(parents=True, exist_ok=True)
    return _write(directory, {"name": "none", "reason": reason, "data_sha256": data_sha256})


def load(
    directory: Path, extractor: Extractor, data_sha256: str, classifier_sha256: str
) -> RealFeatures:
    """The stored arrays, mapped from their files.

    Raises BadInput where they are missing, or of other data or by another network than given.
    """
    again = "run the features stage again"
    if not (directory / FACTS).is_file():
        raise BadInput(f"{directory} holds no features; {again}")
    facts = json.loads((directory / FACTS).read_text())
    if facts["data_sha256"] != data_sha256:
        raise BadInput(f"{directory} holds features of other data; {again}")
    for key, expected in (("sha256", extractor.sha256), ("classifier_sha256", classifier_sha256)):
        if facts.get(key) != expected:
            raise BadInput(
                f"{directory} holds features by another network ({facts['name']}, {key} "
                f"{str(facts.get(key))[:12]}; now {extractor.name}, {expected[:12]}); {again}"
            )

    def arrays(ending: str) -> dict[str, Rows]:
        files = {split: directory / f"{split}{ending}.npy" for split in facts["rows"]}
        return {
            split: np.load(file, mmap_mode="r", allow_pickle=False)
            for split, file in files.items()
            if file.exists()
        }

    return RealFeatures(arrays(""), arrays("-logits"), facts["floors"])


def _write(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts
