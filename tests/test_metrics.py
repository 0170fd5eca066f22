"""Metrics equal independent implementations on the same features."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)
from torchmetrics.functional.image import (
    structural_similarity_index_measure as torchmetrics_ssim,
)

from models.data import DataSpec
from tasks.evaluation import classifier, features, fidelity, kernel_distance, reconstruction


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
    found = kernel_distance.kid(a, b, subsets=50, subset_size=300)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("subset_size", [300, 24])  # tiles of a subset's rows: several, or one
def test_kid_is_the_formula_written_out(subset_size: int) -> None:
    """In plain float64 and over all pairs, however the rows are tiled and symmetry is used."""
    a, b = feature_sets(700, 24)
    random, values = np.random.RandomState(2020), []
    for _ in range(20):
        x, y = (
            s[random.choice(len(s), subset_size, replace=False)].astype(np.float64) for s in (a, b)
        )
        same, other, across = ((p @ q.T / 24 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        different = ~np.eye(subset_size, dtype=bool)
        values.append(same[different].mean() + other[different].mean() - 2 * across.mean())
    found = kernel_distance.kid(a, b, subsets=20, subset_size=subset_size)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)


@pytest.mark.parametrize("dimensions", [4, 30])
def test_the_kernel_distances_error_is_the_jackknife(
    dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed without each row in turn; few features take another way than many."""
    for name, size in {"BLOCK": 100, "TILE": 7, "ROWS": 9, "GROUP": 3}.items():
        monkeypatch.setattr(kernel_distance, name, size)  # several blocks, the last one smaller
    random = np.random.default_rng(0)
    a = random.normal(size=(41, dimensions))
    b = random.normal(size=(33, dimensions)) + 0.3

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / dimensions + 1) ** 3

    def mmd(x: np.ndarray, y: np.ndarray) -> float:
        own = [
            (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))
        ]
        return sum(own) - 2 * kernel(x, y).mean()

    def spread(values: list[float]) -> float:
        return (len(values) - 1) / len(values) * np.square(values - np.mean(values)).sum()

    without_a = [mmd(np.delete(a, i, 0), b) for i in range(len(a))]
    without_b = [mmd(a, np.delete(b, i, 0)) for i in range(len(b))]
    expected = math.sqrt(spread(without_a) + spread(without_b))
    assert kernel_distance.mmd_std_error(a, b) == pytest.approx(expected, rel=1e-9)
    found = kernel_distance.kid(a, b, subsets=7, subset_size=20)
    assert found.std_error == pytest.approx(math.sqrt(expected**2 + found.std**2 / 7), rel=1e-9)


def test_the_kernel_distances_error_is_that_of_new_sets() -> None:
    """It is the deviation over independent sets, which that over subsets is not."""
    random = np.random.default_rng(0)
    found = [
        kernel_distance.kid(
            random.normal(size=(100, 6)), random.normal(size=(100, 6)) + 0.3, subsets=20
        )
        for _ in range(80)
    ]
    true = np.std([value.mean for value in found], ddof=1)
    assert np.mean([value.std_error for value in found]) == pytest.approx(true, rel=0.3)


@pytest.mark.parametrize("rows", [500, 503])
def test_inception_score_equals_torch_fidelity(rows: int) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(rows, 7)).astype(np.float32)
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=10, rng_seed=2020)
    score, std = fidelity.inception_score(logits)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert 1.2 < score < 6


def test_inception_score_is_one_for_one_image_and_the_classes_for_sure_ones() -> None:
    assert fidelity.inception_score(np.ones((50, 4)))[0] == pytest.approx(1.0)
    sure = 100.0 * np.eye(4)[np.arange(4000) % 4]
    assert fidelity.inception_score(sure)[0] == pytest.approx(4.0, rel=0.01)
    never = np.column_stack([sure, np.full(4000, -1e9)])  # a class of probability 0: no NaN
    assert fidelity.inception_score(never)[0] == pytest.approx(4.0, rel=0.01)
    with pytest.raises(ValueError, match="too few for 10 splits"):
        fidelity.inception_score(sure[:9])


def test_two_halves_of_one_set_are_closer_than_another_set() -> None:
    a, b = feature_sets(600, 8)
    halves = fidelity.frechet_distance(a[::2], a[1::2])
    assert 0 < halves < 0.05 * fidelity.frechet_distance(a, b)
    same, other = kernel_distance.kid(a[::2], a[1::2]), kernel_distance.kid(a, b)
    assert abs(same.mean) < 4 * same.std_error  # unbiased: about 0, on either side
    assert other.mean > 10 * other.std_error


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
    for metric in (fidelity.frechet_distance, kernel_distance.kid, kernel_distance.mmd_std_error):
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


def test_psnr_equals_scikit_image_and_torchmetrics() -> None:
    a, b = images(6, 16, 256, 0), images(6, 16, 256, 1)
    found = reconstruction.psnr(a, b, 256)
    assert found == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255))
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    assert found == pytest.approx(float(torchmetrics_psnr(x, y, data_range=255.0)), rel=1e-6)
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


def test_ssim_equals_torchmetrics() -> None:
    """Of related images. torchmetrics also averages over the border, where its window is filled up
    with a mirror image; the paper's window lies inside, and so does ours."""
    a = images(4, 24, 17, 2)
    noise = np.random.default_rng(3).integers(0, 5, a.shape, np.uint8)
    b = np.minimum(a + noise, 16).astype(np.uint8)
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    _, each = torchmetrics_ssim(x, y, data_range=16.0, sigma=1.5, return_full_image=True)
    expected = float(each[..., 5:-5, 5:-5].mean())
    assert 0.3 < expected < 0.999
    assert reconstruction.ssim(a, b, 17) == pytest.approx(expected, rel=1e-5)


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
    shares = classifier.shares(classifier.predict(judge, x[label == 1].numpy()), 2)
    assert shares.tolist() == [0.0, 1.0]
    classifier.save(tmp_path, judge, {"width": 4, "features": 8})
    extract = features.classifier_features(tmp_path, torch.device("cpu"))
    assert extract.name == "classifier"
    assert extract(x).shape == (100, 8)
    with torch.no_grad():
        assert np.allclose(extract(x), judge.features(x).numpy(), atol=1e-5)
    layers = list(classifier.load(tmp_path).modules())
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers)  # fused
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in judge.modules())


@torch.no_grad()
def test_the_quick_classifier_is_the_trained_one_but_for_rounding() -> None:
    """Features in float32 by the quick way and by the plain one, both against float64."""
    torch.manual_seed(0)
    spec = DataSpec(shape=(3, 28, 20), levels=256, classes=("a", "b"))
    plain = classifier.Classifier(spec, width=32, features=64).train()
    x = torch.randint(0, 256, (64, 3, 28, 20), dtype=torch.uint8)
    for _ in range(3):
        plain(x)  # so that the batch norms' statistics are no longer those of nothing
    plain.eval()
    exact = copy.deepcopy(plain).double().body(x.double() / 127.5 - 1)
    quick = classifier.fused(copy.deepcopy(plain))
    kept = x.clone()
    found = {name: net.features(x) for name, net in (("plain", plain), ("quick", quick))}
    assert torch.equal(x, kept)
    scale = float(exact.abs().max())
    assert scale > 0.01
    for features_found in found.values():
        assert float((features_found - exact).abs().max()) < 1e-5 * scale
    convolutions = [m for m in quick.body if isinstance(m, torch.nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


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
