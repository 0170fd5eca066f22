"""What stage II of a trained StackGAN adds: both stages' Fréchet distance and obedience.

Run in the project's folder after `make run FAMILIES=stackgan ...`:

    .venv/bin/python benchmarks/stackgan_stages.py

Stage I is enlarged to the full size. Same captions, the test split's; same features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models import store
from models.stackgan import StackGAN
from tasks.data import shards
from tasks.evaluation import classifier
from tasks.evaluation.features import classifier_features
from tasks.evaluation.fidelity import frechet_distance

SAMPLES, BATCH = 10_000, 500


@torch.no_grad()
def main() -> None:
    model = store.load(Path("artifacts/train/stackgan"))
    assert isinstance(model, StackGAN)
    test = shards.read_split(Path("data/prepared"), "test")
    judge = classifier.load(Path("artifacts/classifier"))
    extract = classifier_features(Path("artifacts/classifier"), torch.device("cpu"))
    assert test.text is not None
    assert test.label is not None
    rows = np.arange(SAMPLES) % len(test.text)
    text, label = torch.from_numpy(test.text[rows]), test.label[rows]
    real = extract(test.x)
    for name, draw in (("stage I, enlarged", model.stage_one), ("stage II", model.sample)):
        torch.manual_seed(0)
        samples = torch.cat([draw(len(part), text=part) for part in text.split(BATCH)])
        distance = frechet_distance(extract(samples), real)
        right = (classifier.predict(judge, samples.numpy()) == label).mean()
        print(f"{name}: Fréchet distance {distance:.2f}, {right:.1%} as asked")


if __name__ == "__main__":
    main()
