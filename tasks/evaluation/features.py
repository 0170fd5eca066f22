"""Feature extractors: levels `[N, C, H, W]` to features `[N, D]`, by name and weight hash.

Here are the interface and the dataset's own classifier, which training uses too; the others are in
`extractors.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.store import file_sha256
from tasks.evaluation import classifier

BATCH = {"cpu": 100, "cuda": 500}  # a processor's caches hold no more: 1.5 times as fast as 500


@dataclass
class Extractor:
    """Levels `[N, C, H, W]` to features `[N, D]`.

    Attributes:
        name: which network.
        sha256: of its weights file; two numbers compare only where both agree.
        network: a batch of levels, uint8 on `device`, to its features.
        head: features to the logits of the dataset's classifier, where that is the network.
    """

    name: str
    sha256: str
    network: Callable[[Tensor], Tensor]
    device: torch.device
    head: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self, images: NDArray[np.uint8] | Tensor, batch_size: int | None = None
    ) -> NDArray[np.float32]:
        x, size = torch.as_tensor(images), batch_size or BATCH.get(self.device.type, 500)
        parts = [
            self.network(x[i : i + size].to(self.device)).float().cpu()
            for i in range(0, len(x), size)
        ]
        return torch.cat(parts).numpy()


def classifier_features(directory: Path, device: torch.device) -> Extractor:
    """The last hidden layer of the classifier in `directory`."""
    model = classifier.load(directory).to(device)
    name = "rotation-classifier" if model.task == "rotations" else "classifier"
    digest = file_sha256(directory / classifier.WEIGHTS)
    return Extractor(name, digest, model.features, device, model.head)


@torch.no_grad()
def logits(
    extractor: Extractor,
    features: NDArray[np.float32],
    judge: classifier.Classifier,
    images: NDArray[np.uint8],
) -> NDArray[np.float32]:
    """The judge's logits `[N, C]` of images; from their features, where those are the judge's."""
    if extractor.head is None:
        return classifier.logits(judge, images)
    return extractor.head(torch.from_numpy(features).to(extractor.device)).cpu().numpy()
