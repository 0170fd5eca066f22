"""The feature extractors that `evaluation.features` names, beside the dataset's classifier.

`inception-v3` is torch-fidelity's, equal to TensorFlow's; `pixels` are the levels themselves;
`module:function` is the user's own (`registered.py`). None of them ever stands in for another.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from models.data import DataSpec
from models.store import file_sha256
from tasks.errors import BadInput
from tasks.evaluation import registered
from tasks.evaluation.features import Extractor, classifier_features

PIXELS_MOST = 4096  # values of one image: a covariance of more takes minutes and gigabytes
INCEPTION_MB = 91


def build(
    features: str,
    inception_weights: str | None,
    features_code: str,
    classifier: Path,
    data: DataSpec,
    device: torch.device,
) -> Extractor:
    """The extractor that the parameters name; BadInput, with what to do, where it is not there."""
    if features == "classifier":
        return classifier_features(classifier, device)
    if features == "inception-v3":
        return inception_features(inception_file(inception_weights), data.levels, device)
    if features == "pixels":
        return pixels(data, device)
    return registered.extractor(features, Path(features_code), data, device)


def pixels(data: DataSpec, device: torch.device) -> Extractor:
    """The levels themselves, scaled to [0, 1]."""
    if data.dimensions > PIXELS_MOST:
        raise BadInput(
            f"evaluation.features: pixels: {data.dimensions:,} values of one image are too many "
            f"(at most {PIXELS_MOST:,}); use classifier"
        )
    digest = hashlib.sha256(b"levels / (levels - 1)").hexdigest()
    return Extractor("pixels", digest, lambda x: x.flatten(1).float() / (data.levels - 1), device)


def inception_cache() -> Path:
    """Where torch-fidelity keeps the weights that it has downloaded."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)


def inception_file(path: str | None) -> Path:
    """The weights file: the one at `path`, else torch-fidelity's own copy. Nothing is downloaded.

    Raises BadInput with the ways to get it where there is neither.
    """
    file = Path(path).expanduser() if path else inception_cache()
    if not file.is_file():
        raise BadInput(
            f"evaluation.features: inception-v3 needs torch-fidelity's weights, and {file} is not "
            "there: give the file's path as evaluation.inception_weights, or allow the download "
            f"({INCEPTION_MB} MB) with `python -m tasks.features --download-inception`, "
            "or use classifier"
        )
    return file


def download_inception() -> Path:
    """Fetch torch-fidelity's weights into its cache, checked by the hash in their name."""
    file = inception_cache()
    if not file.is_file():
        print(f"downloading {INCEPTION_MB} MB from {URL_INCEPTION_V3}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.stem.rsplit("-", 1)[-1]
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"{URL_INCEPTION_V3}: {error}") from error
    return file


def inception_features(path: Path, levels: int, device: torch.device) -> Extractor:
    """The 2048 features of torch-fidelity's Inception-v3 with the weights in `path`.

    Grey images are repeated in three channels. Raises BadInput where the file is no such file.
    """
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
