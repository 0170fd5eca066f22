"""Metrics equal independent implementations on the same features."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from models.base import DataSpec
from tasks.errors import BadInput
from tasks.evaluation import classifier, features, fidelity, reconstruction


def feature_sets(n: int = 700, d: int = 24) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mix = random.normal(size=(d, d))
    a = random.normal(size=(n, d)) @ mix
    b = np.abs(random.normal(size=(n + 57, d)) @ mix + 0.3)
    return a.astype(np.float32), b.astype(np.float32)


def theirs(a: np.ndarray, b: np.ndarray) -> float:
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(("n", "d"), [(700, 24), (3000, 64), (40, 24)])
def test_frechet_distance_equals_torch_fidelity(n: int, d: int) -> None:
    a, b = feature_sets(n, d)
    assert fidelity.frechet_distance(a, b) == pytest.approx(theirs(a, b), rel=1e-6)


def test_kid_equals_torch_fidelity() -> None:
    a, b = feature_sets()
    expected = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=50, kid_subset_size=300, verbose=False
    )
    mean, spread = fidelity.kid(a, b, subsets=50, subset_size=300)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    """Exact moments by construction; the closed form for diagonal covariances."""
    random = np.random.default_rng(1)
    white = random.normal(size=(5000, 4))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    sa, sb, shift = (
        np.array([1.0, 2.0, 0.5, 3.0]),
        np.array([2.0, 1.0, 0.5, 0.1]),
        np.array([1.0, 0, 0, 2.0]),
    )
    expected = (shift**2).sum() + ((sa - sb) ** 2).sum()
    assert fidelity.frechet_distance(white * sa, white * sb + shift) == pytest.approx(
        expected, rel=1e-9
    )


def test_frechet_distance_identical_symmetric_and_singular() -> None:
    a, b = feature_sets(50, 24)
    assert fidelity.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert fidelity.frechet_distance(a, b) == pytest.approx(
        fidelity.frechet_distance(b, a), rel=1e-9
    )
    constant = np.zeros((10, 24), np.float32)
    assert math.isfinite(fidelity.frechet_distance(constant, b))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    a, b = feature_sets(50)
    a[3, 2] = value
    for metric in (fidelity.frechet_distance, fidelity.kid):
        with pytest.raises(ValueError, match="not finite"):
            metric(a, b)
    with pytest.raises(ValueError, match="at least 2"):
        fidelity.frechet_distance(b[:1], b)


def test_spread_shrinks_with_the_sets() -> None:
    small = fidelity.frechet_distance_spread(*feature_sets(200))
    large = fidelity.frechet_distance_spread(*feature_sets(8000))
    assert 0 < large < small


def images(n: int, size: int, levels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (n, 3, size, size), np.uint8)


def test_psnr_equals_scikit_image() -> None:
    a, b = images(6, 16, 256, 0), images(6, 16, 256, 1)
    assert reconstruction.psnr(a, b, 256) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=255)
    )
    assert reconstruction.psnr(a, a, 256) == math.inf
    one_off = a.copy()
    one_off[0, 0, 0, 0] ^= 1
    assert reconstruction.psnr(a, one_off, 256) == pytest.approx(10 * math.log10(255**2 * a.size))


def test_ssim_is_the_papers_formula() -> None:
    """Wang et al. 2004, equation 13, by brute force with their Gaussian window."""
    from scipy.ndimage import gaussian_filter

    a, b = images(2, 24, 256, 2)[:, :1].astype(float), images(2, 24, 256, 3)[:, :1].astype(float)

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)

    expected = []
    for x, y in zip(a[:, 0], b[:, 0], strict=True):
        mx, my = smooth(x), smooth(y)
        vx, vy, c = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        full = (2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        expected.append(full[5:-5, 5:-5].mean())
    found = reconstruction.ssim(a.astype(np.uint8), b.astype(np.uint8), 256)
    assert found == pytest.approx(np.mean(expected), rel=1e-9)
    assert reconstruction.ssim(a.astype(np.uint8), a.astype(np.uint8), 256) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("size", "window"),
    [(28, "gaussian 11x11"), (8, "uniform 7x7"), (5, "uniform 5x5"), (4, "uniform 3x3")],
)
def test_ssim_says_its_window(size: int, window: str) -> None:
    assert reconstruction.ssim_window((size, size)) == window
    a = images(2, size, 17, 0)
    assert reconstruction.ssim(a, a, 17) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def judge() -> classifier.Classifier:
    """Tells dark images (class 0) from bright ones."""
    x, label = shades(200)
    spec = DataSpec(shape=(1, 8, 8), levels=16, classes=("dark", "bright"))
    return classifier.fit(
        spec, x, label, width=4, features=8, steps=60, batch_size=32, lr=1e-2, seed=0
    )


def shades(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    label = torch.arange(n) % 2
    x = torch.randint(0, 6, (n, 1, 8, 8)) + 9 * label.view(-1, 1, 1, 1)
    return x.to(torch.uint8), label


def test_classifier_learns_saves_and_counts_shares(
    judge: classifier.Classifier, tmp_path: Path
) -> None:
    x, label = shades(100)
    assert classifier.accuracy(judge, x, label) == 1.0
    shares = classifier.class_shares(judge, x[label == 1].numpy())
    assert shares.tolist() == [0.0, 1.0]
    classifier.save(tmp_path, judge, {"width": 4, "features": 8})
    extract = features.classifier_features(tmp_path, torch.device("cpu"))
    assert extract.name == "classifier"
    assert extract(x).shape == (100, 8)
    with torch.no_grad():
        assert np.allclose(extract(x), judge.features(x).numpy(), atol=1e-5)


def test_without_classes_rotations_are_learnt_and_named() -> None:
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 8, 6, dtype=torch.uint8)
    x[:, :, :3] = torch.randint(8, 16, (64, 1, 3, 6), dtype=torch.uint8)  # bright at the top
    spec = DataSpec(shape=(1, 8, 6), levels=16)
    model = classifier.fit(
        spec, x, None, width=4, features=8, steps=80, batch_size=16, lr=1e-2, seed=0
    )
    assert model.task == "rotations"
    assert classifier.accuracy(model, x, None) > 0.95


def test_inception_needs_its_weights_and_equals_torch_fidelity(tmp_path: Path) -> None:
    """On one random weights file, since the real one is not to be had everywhere."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import create_feature_extractor

    cpu = torch.device("cpu")
    with pytest.raises(BadInput, match="inception_weights"):
        features.inception_features(None, 256, cpu)
    broken = tmp_path / "broken.pth"
    torch.save({"nothing": torch.zeros(1)}, broken)
    with pytest.raises(BadInput, match="does not fit"):
        features.inception_features(str(broken), 256, cpu)

    weights = tmp_path / "random.pth"
    _random_inception(FeatureExtractorInceptionV3, weights)
    ours = features.inception_features(str(weights), 17, cpu)
    levels = torch.randint(0, 17, (3, 1, 8, 8), dtype=torch.uint8)
    reference = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(weights)
    )
    rgb = (levels.float() * 255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = reference(rgb)[0].numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(ours(levels), expected, rtol=1e-4, atol=1e-6)
    assert ours.name == "inception-v3"
    assert len(ours.sha256) == 64


def _random_inception(kind: type, path: Path) -> None:
    """A weights file of the right keys and shapes: take the state dict of the bare module."""
    captured: dict[str, torch.Tensor] = {}
    original = torch.nn.Module.load_state_dict

    class Stop(Exception):
        pass

    def capture(self: torch.nn.Module, *_: object, **__: object) -> None:
        torch.manual_seed(0)
        captured.update(self.state_dict())
        for tensor in captured.values():
            if tensor.ndim == 4:  # so that the activations neither vanish nor explode
                torch.nn.init.kaiming_normal_(tensor)
        raise Stop

    torch.save({}, path)
    torch.nn.Module.load_state_dict = capture  # type: ignore[assignment]
    try:
        with pytest.raises(Stop):
            kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]
    torch.save(captured, path)
