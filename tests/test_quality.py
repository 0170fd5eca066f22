"""The fidelity and memorisation groups on samplers whose answers are known, and on broken ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config
from models.data import DataSpec, from_signed, from_unit
from tasks.data.shards import Split
from tasks.evaluation import extractors, fidelity, floors, kernel_distance, pictures, protocol, real
from tasks.evaluation.classifier import Classifier, predict
from tasks.evaluation.features import Extractor
from tasks.evaluation.manifold import manifold_metrics, nearest
from tasks.evaluation.measured import Measured, Unmeasurable
from tasks.evaluation.quality import Yardstick
from tasks.reporting import table
from tests.measuring import measured

CPU = torch.device("cpu")
CLASSES = ("dark", "grey", "bright")
DATA = DataSpec(shape=(1, 8, 8), levels=16, classes=CLASSES)
Images = np.ndarray


def split_of(n: int, seed: int, labels: tuple[int, ...] = (0, 1, 2)) -> Split:
    """Noise at three brightnesses, no two images alike."""
    random = np.random.default_rng(seed)
    label = random.choice(labels, n)
    x = random.integers(0, 3, (n, 1, 8, 8)) + 6 * label[:, None, None, None]
    return Split(x.astype(np.uint8), label, None, None)


class Sees(Classifier):
    """Its features are the means of the image's rows, its answer the nearest brightness."""

    def __init__(self) -> None:
        super().__init__(DATA, width=1, features=8)
        k = torch.arange(3.0)  # -(b - k)^2, but for b^2; b = (mean - 1) / 6
        with torch.no_grad():
            self.head.weight.copy_(30 * 2 * k[:, None].expand(3, 8) / (6 * 8))
            self.head.bias.copy_(30 * (-2 * k / 6 - k**2))

    def features(self, x: Tensor) -> Tensor:
        return x.float().mean(3)[:, 0]


@pytest.fixture(scope="module")
def judge() -> Classifier:
    split = split_of(400, 9)
    assert (predict(Sees(), split.x) == split.label).all()
    return Sees()


class Deals(GenerativeModel):
    """Its samples are the images that it was given, one after the other."""

    Config = Config
    paper = "none"

    def __init__(self, images: Images) -> None:
        super().__init__(None, DATA)
        self.images, self.dealt = torch.from_numpy(images), 0
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def sample(self, n: int, **asked: Any) -> Tensor:
        self.dealt += n
        return self.images[self.dealt - n : self.dealt]


def yardstick_of(
    judge: Classifier, *, extractor: Extractor | None = None, test: Split | None = None
) -> Yardstick:
    extractor = extractor or Extractor("classifier", "f" * 64, judge.features, CPU, judge.head)
    train, validation, test = split_of(400, 0), split_of(60, 1), test or split_of(200, 2)
    splits = {"train": train.x, "validation": validation.x, "test": test.x}
    return Yardstick(
        train, validation.x, test, extractor, real.compute(extractor, judge, splits, 300), judge
    )


def measure(
    model: GenerativeModel, yardstick: Yardstick, samples: int = 300, untrained: Any = None
) -> Measured:
    return measured(model, yardstick, samples, untrained or Deals(split_of(300, 7).x))


def told(found: Measured) -> str:
    return " ".join(table.warnings(found.metrics))


def test_real_images_as_samples_score_about_the_floor(judge: Classifier) -> None:
    found = measure(Deals(split_of(300, 5).x), yardstick_of(judge))
    m = found.metrics
    assert 0 < m["frechet_distance"] < 4 * m["frechet_distance_floor"]
    assert m["frechet_distance_untrained"] < 4 * m["frechet_distance_floor"]  # real as well, here
    assert abs(m["kid"]) < 4 * m["kid_std_error"]
    assert m["inception_score"] == pytest.approx(m["inception_score_floor"], rel=0.05)
    assert 2.5 < m["inception_score"] < 3.001  # three classes, each for sure
    for name in ("precision", "recall", "density", "coverage"):
        assert m[name] == pytest.approx(m[f"{name}_floor"], abs=0.15), name
    assert 0.85 < m["nearest_train_ratio"] < 1.15
    assert m["train_duplicates"] == m["train_duplicates_floor"] == 0
    assert m["distinct_samples"] == 300
    assert told(found) == ""


def test_the_training_set_as_samples_is_called_memorised(judge: Classifier, tmp_path: Path) -> None:
    yardstick = yardstick_of(judge)
    model = Deals(yardstick.train.x)
    found = measure(model, yardstick, 400)
    m = found.metrics
    assert m["nearest_train_ratio"] == 0.0
    assert m["train_duplicates"] == 400
    assert m["train_duplicate_share"] == 1.0
    assert m["train_duplicate_share_floor"] == 0.0
    assert m["frechet_distance_train"] == pytest.approx(0.0, abs=1e-6)
    assert m["frechet_distance"] == pytest.approx(m["frechet_distance_floor"])
    assert m["frechet_distance_train_floor"] == pytest.approx(m["frechet_distance_floor"])
    assert "Memorised: 100% of its samples" in told(found)
    assert found.neighbours is not None
    assert (found.neighbours[0] == found.neighbours[1]).all()
    pictures.draw(tmp_path / "out", found, model, yardstick.test)
    assert (tmp_path / "out/neighbours.png").exists()


def test_near_copies_are_called_memorised_too(judge: Classifier) -> None:
    yardstick = yardstick_of(judge)
    near = yardstick.train.x[:300].copy()
    near[:, 0, 0, 0] ^= 1
    found = measure(Deals(near), yardstick)
    assert found.metrics["train_duplicates"] == 0
    assert 0 < found.metrics["nearest_train_ratio"] < 1 / 3
    assert "Memorised: its samples lie 0." in told(found)


def test_copies_among_the_test_images_are_the_floor(judge: Classifier) -> None:
    train, test = split_of(400, 0), split_of(200, 2)
    mixed = test._replace(x=np.concatenate([train.x[:50], test.x[50:]]))
    assert train.label is not None
    assert test.label is not None
    mixed = mixed._replace(label=np.concatenate([train.label[:50], test.label[50:]]))
    found = measure(Deals(mixed.x), yardstick_of(judge, test=mixed), 200)
    assert found.metrics["train_duplicates_floor"] == found.metrics["train_duplicates"] == 50
    assert told(found) == ""  # no more copies than the data itself has
    copies = test._replace(x=train.x[:200], label=train.label[:200])
    none = measure(Deals(split_of(300, 5).x), yardstick_of(judge, test=copies))
    assert "half of the test images" in none.not_applicable["nearest_train_ratio"]


def test_one_image_repeated_is_called_what_it_is(judge: Classifier) -> None:
    yardstick = yardstick_of(judge)
    found = measure(Deals(np.repeat(split_of(1, 5).x, 300, 0)), yardstick)
    m = found.metrics
    assert m["recall"] == 0.0
    assert m["coverage"] < 0.1
    assert m["distinct_samples"] == 1
    assert m["inception_score"] == pytest.approx(1.0)
    assert m["frechet_distance"] > 10 * m["frechet_distance_floor"]
    assert "Mode collapse" in told(found)
    assert "Every sample is the same image." in told(found)
    assert "Memorised" not in told(found)
    assert all(math.isfinite(v) for v in m.values() if isinstance(v, float))


def test_distances_by_class_are_those_of_the_class_alone(judge: Classifier) -> None:
    yardstick = yardstick_of(judge)
    samples = split_of(300, 5)
    found = measure(Deals(samples.x), yardstick).metrics
    assert yardstick.extractor is not None
    assert samples.label is not None
    mine = yardstick.extractor(samples.x)
    theirs = yardstick.extractor(yardstick.test.x)
    expected = {
        name: fidelity.frechet_distance(mine[samples.label == i], theirs[yardstick.test.label == i])
        for i, name in enumerate(CLASSES)
    }
    assert found["class_frechet_distances"] == pytest.approx(expected, rel=1e-9)
    assert found["class_frechet_distances_floor"].keys() == set(CLASSES)
    assert found["class_frechet_distances_by"] == "the judge's class"
    assert found["class_frechet_distance_max"] == max(found["class_frechet_distances"].values())
    worst = found["class_frechet_distance_max_of"]
    assert found["class_frechet_distances"][worst] == found["class_frechet_distance_max"]


def test_floors_are_computed_once_for_so_many_samples(
    judge: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    yardstick = yardstick_of(judge)  # with the floors of 300 samples
    assert yardstick.real is not None
    train, test = (yardstick.real.features[name] for name in ("train", "test"))
    asked: list[int] = []

    def counted(features: Any, samples: int) -> dict[str, Any]:
        asked.append(samples)
        return compute(features, samples)

    compute = floors.compute
    monkeypatch.setattr(floors, "compute", counted)
    found = measure(Deals(split_of(300, 5).x), yardstick).metrics
    assert asked == []
    assert found["frechet_distance_floor"] == fidelity.frechet_distance(train[:300], test)
    assert found["kid_floor"] == kernel_distance.kid(train[:300], test).mean
    assert found["recall_floor"] == manifold_metrics(test, train[:300])["recall"]
    fewer = measure(Deals(split_of(150, 5).x), yardstick, 150).metrics
    assert asked == [150]
    assert fewer["frechet_distance_floor"] == fidelity.frechet_distance(train[:150], test)
    assert fewer["frechet_distance_train_floor"] == fidelity.frechet_distance(test[:150], train)


def test_a_class_that_the_test_split_lacks_is_named(judge: Classifier) -> None:
    found = measure(Deals(split_of(300, 5).x), yardstick_of(judge, test=split_of(200, 2, (0, 2))))
    reason = "8 features take more of either: grey (no test images)"
    assert found.not_applicable["class_frechet_distances"] == reason
    assert found.not_applicable["class_share_min"] == "of grey: the test split has none"
    assert found.metrics["class_frechet_distances"].keys() == {"dark", "bright"}
    shares = found.metrics["class_shares"]
    assert found.metrics["class_share_min"] == pytest.approx(min(shares[0], shares[2]), abs=1e-4)
    few = measure(Deals(split_of(300, 5, (0, 2)).x), yardstick_of(judge))
    reason = "8 features take more of either: grey (no samples)"
    assert few.not_applicable["class_frechet_distances"] == reason
    assert few.metrics["class_share_min"] == 0.0


def test_too_few_rows_for_the_features_have_no_frechet_distance(judge: Classifier) -> None:
    """64 features: a covariance of 50 rows has no full rank, and the distance would be of its
    making."""
    pixels = extractors.pixels(DATA, CPU)
    found = measure(Deals(split_of(300, 5).x), yardstick_of(judge, extractor=pixels), 50)
    reason = "50 samples are too few for the covariance of 64 features"
    for name in ("frechet_distance", "frechet_distance_train"):
        assert found.not_applicable[name] == reason
        assert name not in found.metrics
    assert {"kid", "kid_floor", "coverage", "nearest_train_ratio"} <= set(found.metrics)
    small = yardstick_of(judge, extractor=pixels, test=split_of(64, 2))
    found = measure(Deals(split_of(300, 5).x), small)
    assert "64 test images are too few" in found.not_applicable["frechet_distance"]
    assert found.metrics["frechet_distance_train"] > 0
    assert "frechet_distance_floor" not in found.metrics
    enough = yardstick_of(judge, extractor=pixels, test=split_of(65, 2))
    assert "frechet_distance" in measure(Deals(split_of(300, 5).x), enough).metrics


def test_weights_that_are_no_numbers_fail_the_family(judge: Classifier) -> None:
    model = Deals(split_of(300, 5).x)
    with torch.no_grad():
        model.weight[1] = math.nan
    with pytest.raises(Unmeasurable, match="1 of 3 weights in weight are not finite"):
        measure(model, yardstick_of(judge))
    model = Deals(split_of(300, 5).x)
    model.register_buffer("mask", torch.tensor([-math.inf, 0.0]))  # a buffer may hold these
    protocol.check_weights(model)
    model.register_buffer("mean", torch.tensor([math.nan]))
    with pytest.raises(Unmeasurable, match="weights in mean"):
        protocol.check_weights(model)


class Makes(Deals):
    """Its samples come out of `make`, as numbers that become levels."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(split_of(300, 5).x)
        self.make = make

    def sample(self, n: int, **asked: Any) -> Tensor:
        return self.make(super().sample(n).float())


def spoilt(y: Tensor) -> Tensor:
    y[::32, 0, 2, 3] = math.nan
    return y


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: from_signed(spoilt(x / 7.5 - 1), 16), "10 of 300 samples hold values"),
        (lambda x: from_unit(spoilt(x / 16), 16), "10 of 300 samples hold values"),
        (lambda x: x.to(torch.uint8) + 2, "samples hold level 16, of 16"),
        (lambda x: x @ x.new_zeros(3, 3), "sampling failed: RuntimeError: "),
    ],
)
def test_samples_that_are_no_images_fail_the_family(
    make: Callable[[Tensor], Tensor], words: str, judge: Classifier
) -> None:
    with pytest.raises(Unmeasurable, match=words):
        measure(Makes(make), yardstick_of(judge))
    # of the untrained network it is no failure, there is just no number
    found = measure(Deals(split_of(300, 5).x), yardstick_of(judge), untrained=Makes(make))
    assert "frechet_distance" in found.metrics
    assert "frechet_distance_untrained" not in found.metrics


def test_infinities_are_clamped_and_no_failure(judge: Classifier) -> None:
    model = Makes(lambda x: from_signed((x / 7.5 - 1) * math.inf, 16))
    with pytest.raises(Unmeasurable):  # 0 times infinity is none
        measure(Makes(lambda x: from_signed((x - x) * math.inf, 16)), yardstick_of(judge))
    assert measure(model, yardstick_of(judge)).metrics["distinct_samples"] > 1


def test_features_of_samples_that_are_not_finite_leave_the_other_numbers(
    judge: Classifier,
) -> None:
    def network(x: Tensor) -> Tensor:
        return judge.features(x) + torch.where(x.amax((1, 2, 3)) == 15, math.nan, 0.0)[:, None]

    images = split_of(300, 5).x
    images[:7, 0, 0, 0] = 15
    yardstick = yardstick_of(judge, extractor=Extractor("own", "0" * 64, network, CPU))
    found = measure(Deals(images), yardstick)
    for name in ("frechet_distance", "kid", "coverage", "inception_score", "nearest_train_ratio"):
        assert found.not_applicable[name] == "the features of 7 of 300 samples are not finite"
        assert name not in found.metrics
    assert found.metrics["train_duplicates"] == 0
    assert found.neighbours is None


class Renders(Deals):
    reconstruction = "encode-decode"

    def reconstruct(self, x: Tensor) -> Tensor:
        y = x.float() / 7.5 - 1
        y[0, 0, 0, 0] = math.nan
        return from_signed(y, 16)


def test_reconstructions_that_are_no_numbers_are_named(judge: Classifier) -> None:
    found = measure(Renders(split_of(300, 5).x), yardstick_of(judge))
    reason = "1 of 8 reconstructions hold values that are not numbers"
    assert found.not_applicable["psnr"] == found.not_applicable["ssim"] == reason
    assert "psnr" not in found.metrics
    assert "frechet_distance" in found.metrics


def test_the_nearest_is_the_nearest_and_equal_rows_are_at_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.evaluation.manifold.BLOCK", 1000)
    random = np.random.default_rng(0)
    rows = (50 + random.normal(size=(90, 40))).astype(np.float32)
    others = (50 + random.normal(size=(301, 40))).astype(np.float32)
    others[7] = rows[3]
    distance, place = nearest(rows, others)
    every = np.linalg.norm(rows[:, None].astype(float) - others[None], axis=2)
    np.testing.assert_allclose(distance, every.min(1), rtol=1e-9)
    assert (place == every.argmin(1)).all()
    assert distance[3] == 0.0
    assert place[3] == 7


def test_neighbours_among_many_columns_and_equal_rows_are_the_published_formulas() -> None:
    """Columns enough for the search in groups; copies, whose balls have no inside; far outliers."""
    random = np.random.default_rng(0)
    real_rows = random.normal(size=(230, 5)).astype(np.float32)
    real_rows[100:110] = real_rows[0]
    fake = (0.9 * random.normal(size=(190, 5)) + 0.2).astype(np.float32)
    fake[50:60] = real_rows[0]
    fake[70] = 1e6

    def apart(x: Images, y: Images) -> Images:
        return np.linalg.norm(x[:, None].astype(float) - y[None], axis=2)

    cross = apart(real_rows, fake)
    near, far = (np.sort(apart(real_rows, real_rows), 1)[:, k, None] for k in (3, 5))
    theirs = np.sort(apart(fake, fake), 1)[:, 3]
    expected = {
        "precision": (cross < near).any(0).mean(),
        "recall": (cross < theirs).any(1).mean(),
        "density": (cross < far).sum() / (5 * len(fake)),
        "coverage": (cross < far).any(1).mean(),
    }
    assert manifold_metrics(real_rows, fake) == pytest.approx(expected, rel=1e-9)
