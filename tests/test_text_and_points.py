"""Sources that are no images of one's own: binarised MNIST, text, densities of the plane."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tasks import classifier, prepare
from tasks.data import shards, toy2d
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput
from tasks.params import ClassifierConfig

SPLITS = ("train", "valid", "test")


def amat(folder: Path, rows: int = 12, *, value: int = 1) -> dict[str, np.ndarray]:
    """Larochelle's files, small; the second one gzipped."""
    folder.mkdir()
    written = {}
    for number, split in enumerate(SPLITS):
        x = np.random.default_rng(number).integers(0, 2, (rows, 784)) * value
        content = "".join(" ".join(map(str, row)) + "\n" for row in x).encode()
        name = f"binarized_mnist_{split}.amat"
        if number == 1:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
        written[split] = x
    return written


def test_binarised_mnist_keeps_its_published_splits(tmp_path: Path) -> None:
    written = amat(tmp_path / "raw")
    config = DatasetConfig(name="binarized_mnist", path=str(tmp_path / "raw"))
    manifest = prepare.run(config, tmp_path / "out")
    assert manifest["counts"] == {"train": 12, "validation": 12, "test": 12}
    assert manifest["spec"]["levels"] == 2
    for split, name in zip(SPLITS, shards.SPLITS, strict=True):
        found = shards.read_split(tmp_path / "out", name)
        assert found.x.shape == (12, 1, 28, 28)
        mine = sorted(map(bytes, found.x.reshape(12, -1)))
        assert mine == sorted(map(bytes, written[split].astype(np.uint8)))


def test_what_is_not_binarised_mnist_is_refused(tmp_path: Path) -> None:
    config = DatasetConfig(name="binarized_mnist", path=str(tmp_path / "raw"))
    with pytest.raises(BadInput, match=r"lacks binarized_mnist_train\.amat"):
        prepare.run(config, tmp_path / "out")
    amat(tmp_path / "raw", value=2)
    with pytest.raises(BadInput, match=r"binarized_mnist_train\.amat: not lines of 784"):
        prepare.run(config, tmp_path / "out")
    (tmp_path / "raw/binarized_mnist_train.amat").write_text("1 0 1\n")
    with pytest.raises(BadInput, match="not lines of 784"):
        prepare.run(config, tmp_path / "out")


def test_text_is_windows_of_the_bytes_and_the_default_needs_no_file(tmp_path: Path) -> None:
    content = "".join(f"line {i}: naïve\n" for i in range(400)).encode()
    (tmp_path / "a.txt").write_bytes(content[:3000])
    (tmp_path / "b.txt").write_bytes(content[3000:])
    (tmp_path / "c.csv").write_text("not text")
    config = DatasetConfig(name="text", path=str(tmp_path), window=32)
    manifest = prepare.run(config, tmp_path / "out")
    assert manifest["spec"]["modality"] == "text"
    assert sum(manifest["counts"].values()) == len(content) // 32
    splits = [shards.read_split(tmp_path / "out", s).x for s in shards.SPLITS]
    windows = {bytes(row) for x in splits for row in x}
    assert windows == {content[i : i + 32] for i in range(0, len(content) - 31, 32)}

    # contiguous splits: what is tested comes after what was trained on
    starts = [{content.index(bytes(row)) for row in x} for x in splits]
    assert max(starts[0]) < min(starts[1]) <= max(starts[1]) < min(starts[2])
    counts = manifest["counts"]
    assert counts["test"] == pytest.approx(0.2 * sum(counts.values()), abs=1)

    one = DatasetConfig(name="text", path=str(tmp_path / "a.txt"), window=32)
    assert sum(prepare.run(one, tmp_path / "one")["counts"].values()) == 3000 // 32
    assert one.title == "a"
    embedded = prepare.run(DatasetConfig(name="text"), tmp_path / "embedded")
    assert "pydoc_data.topics" in embedded["provenance"]["source"]
    assert embedded["counts"]["train"] > 1000


def test_what_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file or folder at"):
        prepare.run(DatasetConfig(name="text", path=str(tmp_path / "none")), tmp_path / "out")
    (tmp_path / "raw").mkdir()
    with pytest.raises(BadInput, match=r"no \*.txt files in"):
        prepare.run(DatasetConfig(name="text", path=str(tmp_path / "raw")), tmp_path / "out")
    (tmp_path / "raw/a.txt").write_bytes(b"ab\xff" * 500)
    with pytest.raises(BadInput, match=r"a\.txt: not UTF-8 text \(byte 2 is 0xff\)"):
        prepare.run(DatasetConfig(name="text", path=str(tmp_path / "raw")), tmp_path / "out")
    (tmp_path / "raw/a.txt").write_text("short")
    with pytest.raises(BadInput, match="has 5 bytes, less than one window of 128"):
        prepare.run(DatasetConfig(name="text", path=str(tmp_path / "raw")), tmp_path / "out")
    with pytest.raises(ValueError, match="text has none"):
        DatasetConfig(name="text", derive="edges")


@pytest.mark.parametrize("toy", ["moons", "rings", "mixture"])
def test_points_are_of_the_density_whose_entropy_is_told(toy: str, tmp_path: Path) -> None:
    config = DatasetConfig(name="toy2d", toy=toy)  # type: ignore[arg-type]
    manifest = prepare.run(config, tmp_path / "out")
    assert manifest["counts"] == {"train": 80_000, "validation": 10_000, "test": 10_000}
    probabilities = toy2d.cell_probabilities(toy)
    assert probabilities.sum() == pytest.approx(1)
    x = shards.read_split(tmp_path / "out", "train").x
    nats = -np.log(probabilities[x[:, 0], x[:, 1]])
    entropy = manifest["truth"]["entropy_nats"]
    assert abs(nats.mean() - entropy) < 4 * nats.std() / math.sqrt(len(x))
    again = prepare.run(config, tmp_path / "again")
    assert again["content_sha256"] == manifest["content_sha256"]


def test_the_mixtures_entropy_is_the_closed_form() -> None:
    """Eight Gaussians that hardly overlap: log 8 + log(2 pi e s^2), over cells of side 1/32."""
    deviation = toy2d.DEVIATION["mixture"]
    continuous = math.log(8) + math.log(2 * math.pi * math.e * deviation**2)
    cells = toy2d.cell_probabilities("mixture")
    entropy = -(cells[cells > 0] * np.log(cells[cells > 0])).sum()
    assert entropy == pytest.approx(continuous - 2 * math.log(1 / 32), abs=0.01)


def test_without_images_there_is_no_classifier(tmp_path: Path) -> None:
    prepare.run(DatasetConfig(name="toy2d", points=300), tmp_path / "data")
    facts = classifier.run(ClassifierConfig(), tmp_path / "data", tmp_path / "classifier")
    assert facts["task"] == "none"
    assert json.loads((tmp_path / "classifier/classifier.json").read_text())["task"] == "none"
    assert (tmp_path / "classifier/classifier.safetensors").exists()
