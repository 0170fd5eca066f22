"""Feature extractors, by name and by the hash of their weights."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.store import file_sha256
from tasks.errors import BadInput
from tasks.evaluation import classifier


class Network(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass
class Extractor:
    """Levels `[N, C, H, W]` to features `[N, D]`.

    Attributes:
        name: which network.
        sha256: of its weights file; two numbers compare only where both agree.
    """

    name: str
    sha256: str
    network: Network
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, images: NDArray[np.uint8] | Tensor, batch_size: int = 500
    ) -> NDArray[np.float32]:
        x = torch.as_tensor(images)
        parts = [
            self.network(x[i : i + batch_size].to(self.device)).float().cpu()
            for i in range(0, len(x), batch_size)
        ]
        return torch.cat(parts).numpy()


def classifier_features(directory: Path, device: torch.device) -> Extractor:
    """The last hidden layer of the classifier in `directory`."""
    model = classifier.load(directory).to(device)
    name = "rotation-classifier" if model.task == "rotations" else "classifier"
    digest = file_sha256(directory / "classifier.safetensors")
    return Extractor(name, digest, model.features, device)


def inception_features(weights: str | None, levels: int, device: torch.device) -> Extractor:
    """The 2048 features of torch-fidelity's Inception-v3, the TensorFlow-equivalent one.

    `weights` is the path of torch-fidelity's weights file; no other network ever stands in
    for it. Raises BadInput where it is not given or not such a file.
    """
    if weights is None:
        raise BadInput(
            "evaluation.inception_weights: inception-v3 needs torch-fidelity's weights file "
            "(pt_inception-2015-12-05-6726825d.pth); give its path, or set features: classifier"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights).expanduser()
    try:
        torch.load(path, weights_only=True)  # torch-fidelity would run what a pickle says
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"evaluation.inception_weights: {path} does not fit: {str(error).splitlines()[0]}"
        ) from error
    network = network.eval().to(device)

    def features(x: Tensor) -> Tensor:
        rgb = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        eight_bit = (rgb.float() * (255 / (levels - 1))).round().to(torch.uint8)
        return network(eight_bit)[0]

    return Extractor("inception-v3", file_sha256(path), features, device)
