"""Pairs, domains, captions and attributes: what `prepare` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import prepare
from tasks.data import derive, shards
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput
from tasks.params import check_params
from tests.test_data import contents, folder, image_folder

N = 90


def noise(n: int = N, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def pairs(path: Path, **changes: Any) -> DatasetConfig:
    return DatasetConfig(name="paired_folder", path=str(path), **changes)


@pytest.fixture
def side_by_side(tmp_path: Path) -> Path:
    """A|B where B is the negative of A."""
    for i, image in enumerate(noise()):
        save(tmp_path / "pairs" / f"{i:02d}.png", np.hstack([image, 255 - image]))
    return tmp_path / "pairs"


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    """The same pairs as two folders, the suffixes unlike."""
    for i, image in enumerate(noise()):
        save(tmp_path / "two/target" / f"{i:02d}.png", image)
        save(tmp_path / "two/source" / f"{i:02d}.bmp", 255 - image)
    return tmp_path / "two"


def test_pairs_stay_pairs_in_both_layouts(
    side_by_side: Path, two_folders: Path, tmp_path: Path
) -> None:
    manifest = prepare.run(pairs(side_by_side), tmp_path / "a")
    prepare.run(pairs(two_folders), tmp_path / "b")
    assert sum(manifest["counts"].values()) == N
    assert manifest["spec"]["source"] == {
        "kind": "pair",
        "shape": [1, 8, 8],
        "aligned": True,
        "truth": True,
    }
    for split in shards.SPLITS:
        one, two = (shards.read_split(tmp_path / d, split) for d in ("a", "b"))
        assert one.source is not None
        assert (one.source == 255 - one.x).all()
        assert (one.x == two.x).all()
    other = prepare.run(pairs(side_by_side, source_side="left", image_size=4), tmp_path / "c")
    assert other["spec"]["shape"] == [1, 4, 4]
    assert other["content_sha256"] != manifest["content_sha256"]


def test_files_without_a_partner_and_odd_widths_are_named(
    side_by_side: Path, two_folders: Path, tmp_path: Path
) -> None:
    (two_folders / "source/03.bmp").unlink()
    with pytest.raises(BadInput, match=r"target/03\.png \(has no partner"):
        prepare.run(pairs(two_folders), tmp_path / "out")
    kept = prepare.run(pairs(two_folders, skip_bad=True), tmp_path / "out")
    assert sum(kept["counts"].values()) == N - 1
    (two_folders / "source/05.bmp").write_bytes(b"no image")
    kept = prepare.run(pairs(two_folders, skip_bad=True), tmp_path / "out")
    assert sum(kept["counts"].values()) == N - 2
    (two_folders / "README.md").write_text("about")
    save(two_folders / "source/06.png", noise(1)[0])  # 06.bmp is there already
    with pytest.raises(BadInput) as caught:
        prepare.run(pairs(two_folders), tmp_path / "out")
    assert "README.md (outside source/ and target/)" in str(caught.value)
    assert "source/06.png (one of several files of that name)" in str(caught.value)
    for i in range(N):
        save(side_by_side / f"{i:02d}.png", noise(1, 9)[0])
    with pytest.raises(BadInput, match="9 wide, which is odd"):
        prepare.run(pairs(side_by_side), tmp_path / "odd")
    (side_by_side / "left").mkdir()
    save(side_by_side / "left" / "x.png", noise(1)[0])
    with pytest.raises(BadInput, match=r"expected source/ and target/"):
        prepare.run(pairs(side_by_side), tmp_path / "odd")


def test_unpaired_training_never_holds_both_images_of_a_pair(
    side_by_side: Path, tmp_path: Path
) -> None:
    prepare.run(pairs(side_by_side, paired=False), tmp_path / "out")
    train = shards.read_split(tmp_path / "out", "train")
    assert train.source is not None
    assert len(train.x) > 5
    assert len(train.source) > 5
    negatives = {(255 - source).tobytes() for source in train.source}
    assert not negatives & {x.tobytes() for x in train.x}
    test = shards.read_split(tmp_path / "out", "test")
    assert test.source is not None
    assert (test.source == 255 - test.x).all()  # to measure by


def test_a_domain_too_small_to_be_measured_is_refused(two_folders: Path, tmp_path: Path) -> None:
    for file in sorted((two_folders / "source").iterdir())[8:]:
        file.unlink()
    with pytest.raises(BadInput, match=r"\d sources fall into the \w+ split; at least 6"):
        prepare.run(pairs(two_folders, paired=False), tmp_path / "out")


def test_two_unpaired_folders_need_no_names_and_no_equal_numbers(
    two_folders: Path, tmp_path: Path
) -> None:
    for i, image in enumerate(noise(40, seed=7)):
        save(two_folders / "source" / f"more-{i}.png", image)
    save(two_folders / "source" / "03.png", noise(1, seed=8)[0])  # beside 03.bmp: another image
    manifest = prepare.run(pairs(two_folders, paired=False), tmp_path / "out")
    assert manifest["spec"]["source"]["truth"] is False
    splits = [shards.read_split(tmp_path / "out", s) for s in shards.SPLITS]
    assert sum(len(s.x) for s in splits) == N
    assert sum(len(s.source) for s in splits if s.source is not None) == N + 41


def test_edges_are_thin_lines_around_a_square() -> None:
    x = np.zeros((1, 1, 12, 12), np.uint8)
    x[..., 3:9, 3:9] = 200
    found = derive.edges(x, 256)
    assert set(np.unique(found)) == {0, 255}
    assert found[0, 0, 6].tolist().count(255) == 2  # one pixel on the left, one on the right
    assert found[0, 0, :, 6].tolist().count(255) == 2
    assert not derive.edges(np.full((1, 3, 8, 8), 7, np.uint8), 256).any()
    transposed = derive.edges(x.swapaxes(2, 3), 256)
    assert (transposed == found.swapaxes(2, 3)).all()


def test_masks_hide_a_quarter_and_say_where() -> None:
    x = noise(50)[:, None]
    found = derive.masked(x, 256, "random")
    hole = found[:, 1:] > 0
    assert (hole.sum((1, 2, 3)) == 16).all()
    assert (found[:, :1][hole] == 0).all()
    assert (found[:, :1][~hole] == x[~hole]).all()
    assert len({h.tobytes() for h in hole}) > 10
    assert (derive.masked(x, 256, "random") == found).all()
    centre = derive.masked(x, 256, "centre")[:, 1, 2:6, 2:6]
    assert (centre == 255).all()


def test_low_resolution_is_smaller_and_keeps_the_levels() -> None:
    x = (noise(4)[:, None] > 127).astype(np.uint8) * 16
    small = derive.low_resolution(x, 2)
    assert small.shape == (4, 1, 4, 4)
    assert small.max() <= 16
    with pytest.raises(BadInput, match="image_size 8 would do"):
        derive.low_resolution(noise(1, 9)[:, None], 2)


@pytest.mark.parametrize("kind", ["edges", "low_resolution", "masked"])
def test_derived_pairs_of_the_digits(kind: Any, tmp_path: Path) -> None:
    manifest = prepare.run(DatasetConfig(derive=kind), tmp_path / "a")
    prepare.run(DatasetConfig(derive=kind), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    split = shards.read_split(tmp_path / "a", "test")
    assert split.source is not None
    assert list(split.source.shape[1:]) == manifest["spec"]["source"]["shape"]
    assert len(split.source) == len(split.x)
    assert int(split.source.max()) <= 16
    plain = prepare.run(DatasetConfig(), tmp_path / "c")
    assert plain["counts"] == manifest["counts"]


def test_captions_from_class_names_and_from_a_table(tmp_path: Path) -> None:
    config = DatasetConfig(captions=("a handwritten {name}", "the digit {name}"))
    manifest = prepare.run(config, tmp_path / "digits")
    split = shards.read_split(tmp_path / "digits", "train")
    assert split.text is not None
    assert split.label is not None
    assert split.text.shape[1] == manifest["spec"]["text_length"] == len("a handwritten three")
    read = [bytes(row).rstrip(b"\0").decode() for row in split.text]
    assert len(set(read)) == 20
    assert all(t.endswith(derive.WORDS[i]) for t, i in zip(read, split.label, strict=True))

    source = folder(tmp_path / "source")
    files = [str(p.relative_to(source)) for p in sorted(source.rglob("*.png"))]
    rows = [f"{name},words for {name}" for name in files]
    (source / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    prepare.run(image_folder(source), tmp_path / "folder")
    told = shards.read_split(tmp_path / "folder", "train").text
    assert told is not None
    assert bytes(told[0]).startswith(b"words for ")
    (source / "captions.csv").write_text("\n".join(["file,caption", *rows[1:], "ghost.png,boo"]))
    with pytest.raises(BadInput) as caught:
        prepare.run(image_folder(source), tmp_path / "folder")
    assert f"{files[0]} (not in captions.csv)" in str(caught.value)
    assert "ghost.png (named in a table, but no such file)" in str(caught.value)


def test_attributes_are_labels_of_several_bits(tmp_path: Path) -> None:
    source = tmp_path / "source"
    rows = ["file,bright,striped"]
    for i, image in enumerate(noise()):
        save(source / f"{i:02d}.png", image)
        rows.append(f"{i:02d}.png,{i % 2},{-1 if i % 3 else 1}")
    (source / "attributes.csv").write_text("\n".join(rows))
    manifest = prepare.run(image_folder(source), tmp_path / "out")
    assert manifest["spec"]["attributes"] == ["bright", "striped"]
    assert manifest["spec"]["classes"] == []
    truth = {image.tobytes(): [i % 2, int(i % 3 == 0)] for i, image in enumerate(noise())}
    for split in (shards.read_split(tmp_path / "out", s) for s in shards.SPLITS):
        assert split.label is not None
        assert split.label.tolist() == [truth[x.tobytes()] for x in split.x]
    (source / "attributes.csv").write_text("\n".join([*rows[:-1], "59.png,1,maybe"]))
    with pytest.raises(BadInput, match="'maybe' is neither 0 nor 1"):
        prepare.run(image_folder(source), tmp_path / "out")
    (source / "attributes.csv").write_text("\n".join([*rows, rows[-1]]))
    with pytest.raises(BadInput, match="stands twice"):
        prepare.run(image_folder(source), tmp_path / "out")


WRONG = [
    ({"derive": "edge"}, "dataset.derive: ", "did you mean 'edges'?"),
    ({"name": "paired_folder", "derive": "edges"}, "dataset: ", "derive makes pairs of single"),
    ({"paired": False}, "dataset: ", "paired: false needs two domains"),
    ({"captions": ["a seven"]}, "dataset: ", "every template needs {name}"),
]


@pytest.mark.parametrize(("dataset", "where", "words"), WRONG, ids=str)
def test_impossible_settings_are_one_line(dataset: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_params({"families": ["vae"], "models": {"vae": {}}, "dataset": dataset})
    assert where in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
