"""Preparing data: deterministic to the byte, split by content, and strict about bad input."""

from __future__ import annotations

import gzip
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo
from PIL import Image

from tasks import prepare
from tasks.data import shards
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput


def folder(path: Path, n: int = 60, size: int = 8, seed: int = 0) -> Path:
    """Two classes of grey PNG files."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)
    for i, image in enumerate(pixels):
        file = path / ("cats" if i % 3 else "dogs") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


def image_folder(path: Path, **changes: object) -> DatasetConfig:
    return DatasetConfig(name="image_folder", path=str(path), **changes)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_same_source_same_bytes_whatever_the_order_and_place(tmp_path: Path) -> None:
    one = folder(tmp_path / "one")
    files = sorted(p for p in one.rglob("*.png"))
    random.Random(0).shuffle(files)
    for number, file in enumerate(files):  # other names, so another reading order
        target = tmp_path / "elsewhere" / "two" / file.parent.name / f"x{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    prepare.run(image_folder(one), tmp_path / "a")
    prepare.run(image_folder(tmp_path / "elsewhere" / "two"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_digits_prepared_twice_has_one_dvc_hash(tmp_path: Path) -> None:
    repo = Repo.init(str(tmp_path), no_scm=True)
    hashes = []
    for name in ("here", "there/deeper"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        prepare.run(DatasetConfig(), tmp_path / name)
        (stage,) = repo.add(str(tmp_path / name))
        hashes.append(stage.outs[0].hash_info.value)
    assert hashes[0] == hashes[1]
    assert hashes[0].endswith(".dir")


def test_digits_are_whole_and_right(tmp_path: Path) -> None:
    manifest = prepare.run(DatasetConfig(), tmp_path / "d")
    assert sum(manifest["counts"].values()) == 1797
    assert manifest["spec"] == {
        "shape": [1, 8, 8],
        "levels": 17,
        "classes": list("0123456789"),
        "attributes": [],
        "source": None,
        "text_length": 0,
        "modality": "image",
    }
    images = {s: shards.read_split(tmp_path / "d", s) for s in shards.SPLITS}
    every = np.concatenate([split.x for split in images.values()])
    assert every.shape == (1797, 1, 8, 8)
    assert every.max() == 16
    assert manifest["duplicates"]["images_in_more_than_one_split"] == 0
    from sklearn.datasets import load_digits

    truth = {
        image.astype(np.uint8).tobytes(): int(t)
        for image, t in zip(*[load_digits()[k] for k in ("images", "target")], strict=True)
    }
    for x, label, *_ in images.values():
        assert label is not None
        assert [truth[image.tobytes()] for image in x] == label.tolist()


def test_adding_images_moves_no_other_between_splits(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", n=60)
    prepare.run(image_folder(source), tmp_path / "before")
    folder(tmp_path / "source" / "more", n=40, seed=9)
    for file in (tmp_path / "source" / "more").rglob("*.png"):
        shutil.move(file, source / "cats" / f"new-{file.parent.name}-{file.name}")
    shutil.rmtree(tmp_path / "source" / "more")
    prepare.run(image_folder(source), tmp_path / "after")
    for split in shards.SPLITS:
        before, after = (
            {x.tobytes() for x in shards.read_split(tmp_path / d, split)[0]}
            for d in ("before", "after")
        )
        assert before <= after


def test_duplicates_are_counted_and_stay_together(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    for file in sorted((source / "cats").glob("*.png"))[:5]:
        shutil.copy(file, source / "cats" / f"copy-{file.name}")
    manifest = prepare.run(image_folder(source), tmp_path / "out")
    assert manifest["duplicates"] == {"extra_copies": 5, "images_in_more_than_one_split": 0}


def spoil(source: Path) -> dict[str, str]:
    """The acceptance test's bad folder: what is wrong, by file."""
    whole = (source / "cats" / "001.png").read_bytes()
    (source / "cats" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (source / "dogs" / "notes.txt").write_text("not an image")
    (source / "empty").mkdir()
    Image.new("L", (9, 7)).save(source / "cats" / "wide.png")
    return {
        "cats/broken.png": "cannot be read",
        "dogs/notes.txt": "not an image",
        "empty/": "empty class",
        "cats/wide.png": "is 9x7, most are 8x8",
    }


def test_bad_input_is_named_and_the_earlier_data_stays(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "source"), tmp_path / "prepared"
    prepare.run(image_folder(source), out)
    before = contents(out)
    wrong = spoil(source)
    with pytest.raises(BadInput) as caught:
        prepare.run(image_folder(source), out)
    message = str(caught.value)
    assert "\n" not in message
    assert "4 bad" in message
    for name, reason in wrong.items():
        assert f"{name} ({reason}" in message
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir() if "prepared" in p.name] == ["prepared"]


def test_skip_bad_drops_and_lists(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    clean = prepare.run(image_folder(source), tmp_path / "clean")
    wrong = spoil(source)
    manifest = prepare.run(image_folder(source, skip_bad=True), tmp_path / "out")
    assert {entry["file"] for entry in manifest["skipped"]} == set(wrong)
    assert manifest["content_sha256"] == clean["content_sha256"]


def test_colour_alpha_and_resizing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(120):
        Image.new("RGBA", (20 + i % 3, 16), (200, 10, i, 255)).save(source / f"{i}.png")
    Image.new("RGBA", (20, 16), (0, 0, 0, 0)).save(source / "clear.png")
    manifest = prepare.run(image_folder(source, image_size=12), tmp_path / "out")
    assert manifest["spec"]["shape"] == [3, 12, 12]
    assert manifest["spec"]["classes"] == []
    every = np.concatenate([shards.read_split(tmp_path / "out", s)[0] for s in shards.SPLITS])
    assert any((image == 255).all() for image in every)  # transparent became white
    assert shards.read_split(tmp_path / "out", "train")[1] is None


@pytest.mark.parametrize(("mode", "words"), [("I;16", "not 8-bit"), ("bomb", "pixels")])
def test_deep_and_huge_images_are_refused(tmp_path: Path, mode: str, words: str) -> None:
    source = folder(tmp_path / "source")
    image = Image.new("1", (9000, 9000)) if mode == "bomb" else Image.new(mode, (8, 8))
    image.save(source / "cats" / "odd.png")
    with pytest.raises(BadInput, match=words):
        prepare.run(image_folder(source), tmp_path / "out")


def test_a_uri_is_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    source = folder(tmp_path / "source")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/images", recursive=True)
    prepare.run(image_folder(source), tmp_path / "a")
    prepare.run(DatasetConfig(name="image_folder", path="memory://images"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist_files(path: Path, *, zipped: bool) -> Path:
    path.mkdir()
    random_ = np.random.default_rng(0)
    for part, n in (("train", 80), ("t10k", 20)):
        arrays = {
            f"{part}-images-idx3-ubyte": random_.integers(0, 256, (n, 28, 28)),
            f"{part}-labels-idx1-ubyte": random_.integers(0, 10, n),
        }
        for name, array in arrays.items():
            if zipped:
                (path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (path / name).write_bytes(idx(array))
    return path


def test_mnist_files_gzipped_or_not(tmp_path: Path) -> None:
    plain = DatasetConfig(name="mnist", path=str(mnist_files(tmp_path / "plain", zipped=False)))
    zipped = DatasetConfig(name="mnist", path=str(mnist_files(tmp_path / "zipped", zipped=True)))
    manifest = prepare.run(plain, tmp_path / "a")
    prepare.run(zipped, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert manifest["counts"]["test"] == 20  # the official split
    assert manifest["counts"]["train"] + manifest["counts"]["validation"] == 80


def test_damaged_and_missing_mnist_files_are_named(tmp_path: Path) -> None:
    source = mnist_files(tmp_path / "m", zipped=False)
    images = source / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    config = DatasetConfig(name="mnist", path=str(source))
    with pytest.raises(BadInput, match="train-images-idx3-ubyte: not a whole IDX file"):
        prepare.run(config, tmp_path / "out")
    images.unlink()
    with pytest.raises(BadInput, match="lacks train-images-idx3-ubyte"):
        prepare.run(config, tmp_path / "out")
    with pytest.raises(BadInput, match="no MNIST files"):
        prepare.run(DatasetConfig(name="mnist", path=str(tmp_path / "nowhere")), tmp_path / "out")


def test_the_real_mnist(root: Path, tmp_path: Path) -> None:
    source = root.parent / "shared" / "data" / "mnist"
    if not source.is_dir():
        pytest.skip("needs the original MNIST files in ../shared/data/mnist")
    manifest = prepare.run(DatasetConfig(name="mnist", path=str(source)), tmp_path / "out")
    assert manifest["counts"]["test"] == 10_000
    assert sum(manifest["counts"].values()) == 70_000
    x, label, *_ = shards.read_split(tmp_path / "out", "test")
    assert x.shape == (10_000, 1, 28, 28)
    assert label is not None
    assert np.bincount(label).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
