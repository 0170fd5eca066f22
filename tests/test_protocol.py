"""Protocol numbers of conditional families and of mode collapse, against brute force and truth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config
from models.data import Batch, DataSpec, SourceSpec
from tasks.data.shards import Split
from tasks.evaluation import conditions, real, translation
from tasks.evaluation.classifier import Classifier, fit
from tasks.evaluation.features import Extractor
from tasks.evaluation.manifold import manifold_metrics
from tasks.evaluation.measured import Measured
from tasks.evaluation.pictures import by_class, triptychs
from tasks.evaluation.quality import Yardstick
from tasks.training.config import TrainConfig
from tasks.training.validation import Validator
from tasks.training.watch import Watch
from tests.conftest import tiny_images
from tests.measuring import measured

DATA = DataSpec(shape=(1, 8, 8), levels=16, classes=("dark", "bright"))
EDGES = SourceSpec(kind="edges", shape=(1, 8, 8))


def brute_force(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """The published formulas, pair by pair."""

    def radius(x: np.ndarray, i: int, k: int) -> float:
        return sorted(np.linalg.norm(x[i] - y) for y in x)[k]  # the nearest is itself

    near = [radius(real, i, 3) for i in range(len(real))]
    far = [radius(real, i, 5) for i in range(len(real))]
    theirs = [radius(fake, j, 3) for j in range(len(fake))]
    apart = {
        (i, j): np.linalg.norm(real[i] - fake[j])
        for i, j in itertools.product(range(len(real)), range(len(fake)))
    }
    reals, fakes = range(len(real)), range(len(fake))
    return {
        "precision": np.mean([any(apart[i, j] < near[i] for i in reals) for j in fakes]),
        "recall": np.mean([any(apart[i, j] < theirs[j] for j in fakes) for i in reals]),
        "density": sum(apart[i, j] < far[i] for i in reals for j in fakes) / (5 * len(fake)),
        "coverage": np.mean([any(apart[i, j] < far[i] for j in fakes) for i in reals]),
    }


def test_manifold_metrics_are_the_published_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.evaluation.manifold.BLOCK", 7 * 40)
    random = np.random.default_rng(0)
    real = random.normal(size=(40, 3)).astype(np.float32)
    fake = (0.8 * random.normal(size=(33, 3)) + 0.5).astype(np.float32)
    expected = brute_force(real, fake)
    found = manifold_metrics(real, fake)
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(0.05 < value < 1.5 for value in found.values())
    only = manifold_metrics(real, fake, keys=frozenset({"coverage"}))
    assert only == {"coverage": found["coverage"]}


def test_a_collapsed_sampler_covers_nothing_and_a_copy_all() -> None:
    random = np.random.default_rng(1)
    real = random.normal(size=(200, 4))
    collapsed = real[:1] + 1e-6 * random.normal(size=(200, 4))
    assert manifold_metrics(real, collapsed)["coverage"] < 0.1
    assert manifold_metrics(real, collapsed)["recall"] < 0.05
    same = manifold_metrics(real, random.permutation(real))
    assert same["coverage"] == 1.0
    assert same["recall"] == 1.0
    with pytest.raises(ValueError, match="at least 6"):
        manifold_metrics(real[:5], real)


def images_of(label: Tensor) -> Tensor:
    """Dark (class 0) or bright (class 1) noise."""
    noise = torch.randint(0, 6, (len(label), 1, 8, 8))
    return (noise + 9 * label.view(-1, 1, 1, 1)).to(torch.uint8)


def split_of(n: int, *, seed: int = 0) -> Split:
    """Pairs whose source is the negative of the image."""
    torch.manual_seed(seed)
    label = torch.randint(0, 2, (n,))
    x = images_of(label).numpy()
    text = np.stack([np.full(3, ord("a") + i, np.uint8) for i in label.tolist()])
    return Split(x, label.numpy(), 15 - x, text)


class Told(GenerativeModel):
    """Does what it is asked, but for a share of the rows; records what it was asked."""

    Config = Config
    paper = "none"
    wrong = 0.0

    def __init__(self, condition: str, data: DataSpec) -> None:
        super().__init__(None, data)
        self.conditions = frozenset({condition})  # type: ignore[misc]
        self.asked: list[Tensor] = []
        self.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def sample(self, n: int, **asked: Any) -> Tensor:
        if "source" in asked:
            self.asked.append(asked["source"])
            return 15 - asked["source"]
        label = asked["label"] if "label" in asked else (asked["text"][:, 0] - ord("a")).long()
        self.asked.append(label)
        flipped = torch.arange(n) < self.wrong * n
        return images_of(torch.where(flipped, 1 - label, label))


@pytest.fixture(scope="module")
def judge() -> Classifier:
    split = split_of(300, seed=5)
    x, label = torch.from_numpy(split.x), torch.from_numpy(split.label)
    return fit(DATA, x, label, width=4, features=8, steps=80, batch_size=32, lr=1e-2, seed=0)


def extractor(judge: Classifier) -> Extractor:
    return Extractor("classifier", "0" * 64, judge.features, torch.device("cpu"), judge.head)


def yardstick_of(train: Split, test: Split, judge: Classifier) -> Yardstick:
    extract = extractor(judge)
    validation = split_of(40, seed=4).x
    splits = {"train": train.x, "validation": validation, "test": test.x}
    return Yardstick(
        train, validation, test, extract, real.compute(extract, judge, splits, 300), judge
    )


def measure(
    model: Told, judge: Classifier, n: int = 200, yardstick: Yardstick | None = None
) -> Measured:
    yardstick = yardstick or yardstick_of(split_of(150, seed=2), split_of(80, seed=3), judge)
    return measured(model, yardstick, n, batch_size=200)


@pytest.mark.parametrize("condition", ["label", "text"])
def test_what_was_asked_is_counted(condition: str, judge: Classifier) -> None:
    model = Told(condition, DATA)
    assert measure(model, judge).metrics["condition_accuracy"] == 1.0
    asked = torch.cat(model.asked[:1])
    assert asked.tolist() == np.resize(split_of(80, seed=3).label, 200).tolist()  # type: ignore[arg-type]
    model.wrong = 0.25
    found = measure(model, judge).metrics
    assert found["condition_accuracy"] == 0.75
    assert found["frechet_distance_within_class"] > 5 * found["frechet_distance"]
    assert found["coverage"] > 0.5
    assert found["coverage_floor"] > 0.9


def test_translation_is_measured_once_for_each_source(judge: Classifier) -> None:
    data = DATA.model_copy(update={"source": EDGES})
    found = measure(Told("source", data), judge)
    metrics = found.metrics
    assert metrics["samples"] == 80
    assert "infinite" in found.not_applicable["psnr"]
    assert metrics["ssim"] == pytest.approx(1.0)
    assert metrics["perceptual_distance"] == 0.0
    assert metrics["condition_accuracy"] == 1.0
    assert metrics["condition_accuracy_floor"] == 0.0  # a negative looks like the other class
    split = split_of(80, seed=3)
    assert split.source is not None
    error = (split.x.astype(float) - split.source) ** 2
    assert metrics["psnr_floor"] == pytest.approx(10 * np.log10(15**2 / error.mean()))
    assert metrics["reconstruction_floor_kind"] == "copy of the input"
    free = measure(Told("label", data), judge).metrics
    assert free["samples"] == 80  # as many as a translator has, so that the distances compare
    assert free["frechet_distance_floor"] == metrics["frechet_distance_floor"]
    unknown = data.model_copy(
        update={"source": EDGES.model_copy(update={"aligned": False, "truth": False})}
    )
    other = measure(Told("source", unknown), judge)
    assert "not known" in other.not_applicable["psnr"]
    assert "not known" in other.not_applicable["condition_accuracy"]


def test_floors_are_what_costs_nothing() -> None:
    x = tiny_images(3, DATA).numpy()
    hole = np.zeros_like(x)
    hole[..., 2:5, 2:5] = 1
    masked = np.concatenate([x * (1 - hole), hole * 15], 1).astype(np.uint8)
    spec = SourceSpec(kind="masked", shape=(2, 8, 8))
    filled = translation.naive(masked, spec, DATA)
    assert (filled[hole == 0] == x[hole == 0]).all()
    for image, mask, out in zip(x, hole, filled, strict=True):
        assert (out[mask == 1] == round(float(image[mask == 0].mean()))).all()
    spec_data = DATA.model_copy(update={"source": spec})
    eye = Extractor("pixels", "", lambda x: x.flatten(1).float(), torch.device("cpu"))
    shown, _ = translation.measure(filled, x, masked, spec_data, eye)
    error = ((x.astype(float) - filled) ** 2)[hole == 1].mean()
    assert shown["psnr_hole"] == pytest.approx(10 * np.log10(15**2 / error))
    assert shown["psnr_hole"] == shown["psnr_hole_floor"] < shown["psnr"]
    small = SourceSpec(kind="low_resolution", shape=(1, 4, 4))
    flat = np.full((2, 1, 4, 4), 9, np.uint8)
    assert (translation.naive(flat, small, DATA) == 9).all()
    colour = DataSpec(shape=(3, 8, 8), levels=256)
    assert translation.naive(x, EDGES, colour).shape == (3, 3, 8, 8)


def test_pictures_are_in_the_order_they_say() -> None:
    split = split_of(20)
    samples = torch.from_numpy(split.x)
    grid = by_class(samples, split, 2).view(2, 8, 1, 8, 8)
    assert (grid[0].float().mean((1, 2, 3)) < 6).all()
    assert grid[1].max() >= 9
    assert split.source is not None
    data = DATA.model_copy(update={"source": EDGES})
    shown = triptychs(split.source, samples[:4], samples, data)
    assert torch.equal(shown[0::3], torch.from_numpy(split.source[:4]))
    assert torch.equal(shown[1::3], samples[:4])
    assert torch.equal(shown[2::3], samples[:4])


@pytest.mark.parametrize(
    ("condition", "select", "score"),
    [
        ("label", "auto", "frechet_distance"),
        ("source", "auto", "frechet_distance"),
        ("source", "perceptual_distance", "perceptual_distance"),
    ],
)
def test_validation_asks_with_the_splits_conditions(
    condition: str, select: Any, score: str, judge: Classifier
) -> None:
    data = DATA.model_copy(update={"source": EDGES})
    config = TrainConfig(validation_samples=64, select=select)
    train = split_of(100, seed=4).x
    validate = Validator(split_of(40), train, extractor(judge), config)
    found = validate(Told(condition, data), 0)
    assert found["score"] == found[score]
    assert found["coverage"] <= 1
    assert ("perceptual_distance" in found) == (condition == "source")
    if condition == "source":
        assert found["perceptual_distance"] == 0.0  # it answers with the true image
        assert "psnr" not in found
        split, step = split_of(40), np.uint8(1)
        assert split.source is not None
        off = split._replace(source=np.where(split.source > 7, split.source - step, split.source))
        near = Validator(off, train, extractor(judge), config)(Told(condition, data), 0)
        error = (off.x.astype(float) - (15 - off.source)) ** 2  # type: ignore[operator]
        assert near["psnr"] == pytest.approx(10 * np.log10(15**2 / error.mean()))
        assert near["perceptual_distance"] > 0
    other = TrainConfig(validation_samples=64, select="bits_per_dim")
    refusing = Validator(split_of(40), train, extractor(judge), other)
    with pytest.raises(ValueError, match="is not measured"):
        refusing(Told(condition, data), 0)


def test_the_prior_of_conditions_repeats_labels_but_no_source() -> None:
    split = split_of(10)
    assert len(conditions.ask(Told("label", DATA), split, 25)["label"]) == 25
    data = DATA.model_copy(update={"source": EDGES})
    assert len(conditions.ask(Told("source", data), split, 25)["source"]) == 10


def test_a_fall_of_coverage_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch.__new__(Watch)
    watch.fallen = False
    records: list[dict[str, Any]] = []
    for step, coverage in enumerate((0.1, 0.8, 0.7, 0.3, 0.2, 0.6, 0.1)):
        records.append(
            {"step": step, "validation/coverage": coverage, "validation/coverage_floor": 0.9}
        )
        watch._warn(records)
    watch._warn([{"step": 0, "validation/coverage": 0.0, "validation/coverage_floor": 0.0}])
    told = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split(" ")[0] for line in told] == ["3", "6"]
    assert "cover 30% of the validation images; it was 80%" in told[0]
