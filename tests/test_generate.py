"""Samples in bulk, without Ray and MLflow: what is asked, and what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.drawing import GenerateSettings, requests
from tasks.errors import BadInput
from tasks.generate import slice_seed
from tasks.storing import SINGLE, Samples, Store


def images(n: int, start: int = 0) -> Samples:
    """Images `[n, 2, 3, 1]`, each of one level of its own."""
    levels = np.arange(start, start + n, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, 2, 3, 1)).copy()


def test_conditions_are_combined(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(b"image")
    settings = GenerateSettings(n=5, labels=("3", "7"), sources=(str(source),))
    asked = list(requests(settings))
    assert [request["label"] for request, _ in asked] == ["3", "7"]
    assert all(request["source"] == b"image" and request["n"] == 5 for request, _ in asked)
    assert asked[0][1] == {"asked_label": "3", "asked_source": str(source)}
    assert list(requests(GenerateSettings(n=2))) == [({"n": 2}, {})]
    with pytest.raises(BadInput, match=r"no file at .*nowhere\.png"):
        list(requests(GenerateSettings(sources=("nowhere.png",))))


@pytest.mark.parametrize("name", ["../out", ".hidden", "a/b", "-x"])
def test_a_result_is_one_folder(name: str) -> None:
    with pytest.raises(ValueError, match="no folder's name"):
        GenerateSettings(name=name)


def test_slices_have_seeds_of_their_own() -> None:
    seeds = {slice_seed(seed, number) for seed in (0, 1) for number in range(50)}
    assert len(seeds) == 100
    assert max(seeds) < 2**63  # MLflow's long
    assert slice_seed(0, 0) == slice_seed(0, 0) != slice_seed(0, 1)


def test_few_images_are_files_and_many_are_sheets(tmp_path: Path) -> None:
    few = Store(tmp_path / "few", 130)
    for start in (0, 65):
        few.add(images(65, start), {"asked_label": "3"})
    few.close()
    assert [p.name for p in sorted((tmp_path / "few/png").iterdir())][-1] == "00129.png"
    assert np.asarray(Image.open(tmp_path / "few/png/00129.png"))[0, 0] == 129
    grid = np.asarray(Image.open(tmp_path / "few/grid.png"))
    assert grid.shape == (20, 30)
    assert (grid[::2, ::3].ravel() == np.arange(100)).all()
    table = pd.read_parquet(tmp_path / "few/samples")
    assert list(table.columns) == ["x", "height", "width", "channels", "asked_label"]
    x = [np.frombuffer(row.x, np.uint8).reshape(2, 3, 1) for row in table.itertuples()]
    assert (np.stack(x) == images(130)).all()
    many = Store(tmp_path / "many", SINGLE + 1)
    many.add(images(150), {})
    many.close()
    sheets = sorted((tmp_path / "many/png").iterdir())
    assert [p.name for p in sheets] == ["sheet-00000.png", "sheet-00001.png"]
    assert np.asarray(Image.open(sheets[1])).shape == (10, 30)


def test_texts_and_points_have_columns_of_their_own(tmp_path: Path) -> None:
    texts = Store(tmp_path / "texts", 2)
    texts.add(np.array(["a", "b\n"], dtype=object), {"asked_text": "so"})
    texts.close()
    assert pd.read_parquet(tmp_path / "texts/samples").to_dict("list") == {
        "text": ["a", "b\n"],
        "asked_text": ["so", "so"],
    }
    points = Store(tmp_path / "points", 2)
    points.add(np.array([[1, 2], [3, 4]], dtype=np.uint8), {})
    points.close()
    assert pd.read_parquet(tmp_path / "points/samples").to_dict("list") == {
        "x": [1, 3],
        "y": [2, 4],
    }
    assert not (tmp_path / "points/png").exists()
