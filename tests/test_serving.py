"""Every family's registered model samples with its conditions, in MLflow's own way."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from models import FAMILIES, store
from models.base import DataSpec, SourceSpec
from tasks import serving
from tasks.register import _log_model
from tests.conftest import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store of its own; its run's id."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("serving", artifact_location=f"file://{folder}/mlruns")
    return client.create_run(experiment).info.run_id


def png(levels: torch.Tensor, data: DataSpec) -> bytes:
    """A source's levels `[C, H, W]` as the image file that the model takes."""
    pixels = (levels.float() * 255 / (data.levels - 1)).round().to(torch.uint8).numpy()
    if data.source is not None and data.source.kind == "masked":
        pixels = np.concatenate([pixels[:-1], 255 - pixels[-1:]])
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    file = io.BytesIO()
    image = pixels.transpose(1, 2, 0)
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image, modes[len(pixels)]).save(
        file, format="png"
    )
    return file.getvalue()


def request(model: Any, row: int, n: int) -> dict[str, Any]:
    batch = tiny_batch(4, model.data)
    asked: dict[str, Any] = {"n": n}
    if "label" in model.conditions:
        asked["label"] = model.data.classes[row]
    if "text" in model.conditions:
        assert batch.text is not None
        asked["text"] = bytes(batch.text[row].tolist()).rstrip(b"\0").decode()
    if "source" in model.conditions:
        assert batch.source is not None
        asked["source"] = png(batch.source[row], model.data)
    return asked


def test_the_registered_model_samples_with_its_conditions(
    family: str, runs: str, tmp_path: Path
) -> None:
    model = tiny_model(family).eval()
    store.save(tmp_path, model, family, model.state_dict())
    uri = _log_model(runs, {"family": family}, tmp_path)
    loaded = mlflow.pyfunc.load_model(uri)
    assert {c.name for c in loaded.metadata.signature.inputs} == {"n", *model.conditions}
    requests = pd.DataFrame([request(model, 0, 2), request(model, 1, 3)])
    images = loaded.predict(requests, params={"seed": 3})
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert (loaded.predict(requests, params={"seed": 3}) == images).all()

    # the same as asking the model itself, row by row
    torch.manual_seed(3)
    batch, parts = tiny_batch(4, model.data)._asdict(), []
    for row, n in ((0, 2), (1, 3)):
        asked = {c: batch[c][row].expand(n, *batch[c].shape[1:]) for c in model.conditions}
        with torch.no_grad():
            parts.append(model.sample(n, **asked))
    expected = (torch.cat(parts).float() * 255 / (model.data.levels - 1)).round()
    assert (images == expected.permute(0, 2, 3, 1).numpy()).all()
    for name in model.conditions - {"label"}:
        with pytest.raises(Exception, match=name):
            loaded.predict(requests.drop(columns=name))
    if not model.conditions:
        with pytest.raises(ValueError, match="unknown column"):
            serving_of(tmp_path).predict(None, requests.assign(label="a"))


def serving_of(folder: Path) -> serving.Sampler:
    sampler = serving.Sampler()
    sampler.model = store.load(folder)
    return sampler


DATA = DataSpec(shape=(1, 8, 8), levels=16, classes=("cat", "dog"), text_length=5)
MASKED = DATA.model_copy(update={"source": SourceSpec(kind="masked", shape=(2, 8, 8))})
OPAQUE = io.BytesIO()
Image.new("LA", (8, 8), (9, 255)).save(OPAQUE, format="png")
WRONG = [
    (serving.read_source, OPAQUE.getvalue(), MASKED, "nothing is missing"),
    (serving.read_label, "cow", DATA, "no class 'cow'; there are"),
    (serving.read_text, "too long", DATA, "8 bytes; 1 to 5"),
    (serving.read_source, b"no image", MASKED, "not an image file"),
    (serving.read_source, png(torch.zeros(1, 4, 4), DATA), MASKED, "is 4x4, the model takes 8x8"),
]


@pytest.mark.parametrize(("read", "value", "data", "words"), WRONG, ids=lambda v: str(v)[:20])
def test_what_cannot_be_read_is_refused(read: Any, value: Any, data: DataSpec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(value, data)


def test_attributes_and_holes_are_read() -> None:
    data = DataSpec(shape=(1, 8, 8), levels=16, attributes=("big", "red", "old"))
    assert serving.read_label("old, big", data).tolist() == [1, 0, 1]
    levels = torch.randint(0, 16, (2, 8, 8), dtype=torch.uint8)
    levels[1] = 15 * (levels[1] > 7)
    levels[0][levels[1] > 0] = 0
    assert torch.equal(serving.read_source(png(levels, MASKED), MASKED), levels)


def test_a_source_is_read_as_it_was_prepared(tmp_path: Path) -> None:
    """Transparency on white, turned upright, by both."""
    from tasks.data.images import read_images

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    import fsspec

    prepared = read_images(fsspec.filesystem("file"), str(tmp_path), ["a.png"], None)[0]["a.png"]
    source = SourceSpec(kind="pair", shape=(3, 8, 8))
    data = DataSpec(shape=(3, 8, 8), levels=256, source=source)
    served = serving.read_source((tmp_path / "a.png").read_bytes(), data)
    assert (served.permute(1, 2, 0).numpy() == prepared).all()


def test_a_label_left_out_of_one_row_is_drawn() -> None:
    sampler = serving.Sampler()
    sampler.model = tiny_model("cgan").eval()
    assert len(sampler.predict(None, pd.DataFrame({"n": [2, 3], "label": ["a", None]}))) == 5


def test_every_family_has_its_conditions_readers() -> None:
    assert {c for f in FAMILIES.values() for c in f.conditions} <= set(serving.READERS)
