"""Every family's registered model samples with its conditions, in MLflow's own way."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from models import FAMILIES, store
from models.data import DataSpec, SourceSpec
from tasks import packaging, serving
from tasks.errors import BadInput
from tasks.packaging import log_model
from tasks.params import Params
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
    loaded = mlflow.pyfunc.load_model(f"models:/{log_model(runs, family, tmp_path)}")
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


@pytest.fixture(scope="module")
def registered(runs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, str]:
    """Parameters of a project of its own, and a registered version's URI."""
    folder = tmp_path_factory.mktemp("registered")
    model = tiny_model("naive_bayes").eval()
    store.save(folder / "model", model, "naive_bayes", model.state_dict())
    model_id = log_model(runs, "naive_bayes", folder / "model")
    client = mlflow.MlflowClient()
    client.create_registered_model("digits-naive_bayes")
    client.create_model_version(
        "digits-naive_bayes", f"models:/{model_id}", run_id=runs, model_id=model_id
    )
    client.set_registered_model_alias("digits-naive_bayes", "champion", "1")
    params = Params.model_validate(
        {
            "families": ["naive_bayes"],
            "models": {},
            "cluster": {"storage": str(folder / "state")},
            "tracking": {"uri": mlflow.get_tracking_uri()},
        }
    )
    return params, "models:/digits-naive_bayes@champion"


def stored() -> Path:
    """Where the artifact store has the files of a registered version."""
    source = mlflow.MlflowClient().get_model_version("digits-naive_bayes", "1").source
    location = mlflow.get_logged_model(source.removeprefix("models:/")).artifact_location
    return Path(location.removeprefix("file://"))


def test_the_code_of_all_families_travels_with_a_model(
    registered: tuple[Params, str], root: Path
) -> None:
    """With their folders, and as it is in the project: nothing compiled."""

    def code(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    sources = {k: v for k, v in code(root / "models").items() if k.endswith(".py")}
    assert "pixelrnn/lstm.py" in sources
    assert code(stored() / "code/models") == sources


def test_what_was_registered_is_fetched_once_and_samples(registered: tuple[Params, str]) -> None:
    params, uri = registered
    mlflow.pyfunc.load_model(uri)  # MLflow itself leaves its traces in the store: no harm
    fetched = packaging.fetch(params, uri)
    assert fetched.path == Path(params.cluster.storage, "models", fetched.digest)
    assert (fetched.name, fetched.version) == ("digits-naive_bayes", "1")
    assert packaging.fetch(params, "naive_bayes") == fetched
    assert packaging.fetch(params, f"runs:/{fetched.run_id}/naive_bayes").digest == fetched.digest
    assert packaging.load(params, uri).predict(pd.DataFrame({"n": [2]})).shape == (2, 8, 8, 1)
    left = [path.name for path in fetched.path.parent.iterdir()]
    assert left == [fetched.digest]


class Planted:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def plant(folder: Path, what: str) -> None:
    if what == "a pickle":
        (folder / "python_model.pkl").write_bytes(pickle.dumps(Planted()))
        description = (folder / "MLmodel").read_text()
        changed = re.sub("python_model: .*", "python_model: python_model.pkl", description, count=1)
        (folder / "MLmodel").write_text(re.sub("  +model_code_path: .*\n", "", changed))
    elif what == "code":
        with (folder / "serving.py").open("a") as file:
            file.write("\nPath('ran').touch()\n")
    elif what == "compiled code":
        (folder / "code/models/__init__.pyc").write_bytes(b"x")
    else:
        weights = next(folder.rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize("what", ["a pickle", "code", "compiled code", "weights"])
def test_what_was_put_into_the_artifact_store_does_not_run(
    what: str, registered: tuple[Params, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, uri = registered
    monkeypatch.chdir(tmp_path)
    params = params.model_copy(
        update={"cluster": params.cluster.model_copy(update={"storage": str(tmp_path / "state")})}
    )
    folder = stored()
    shutil.copytree(folder, tmp_path / "before")
    plant(folder, what)
    try:
        with pytest.raises(BadInput, match="not the ones that were registered"):
            packaging.load(params, uri)
    finally:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
    assert not Path("ran").exists()
    assert not any((tmp_path / "state/models").iterdir())
    packaging.load(params, uri)


def test_who_cannot_be_asked_and_what_is_not_there_are_told_in_one_line(
    registered: tuple[Params, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _ = registered
    for asked, words in (
        ("naive_baye", "models:/naive_baye@champion: no such model; did you mean 'digits-naive_b"),
        ("vae", "models:/digits-vae@champion: no such model; train it on digits first: make run"),
        ("models:/digits-naive_bayes@champio", "no alias 'champio'; did you mean 'champion'"),
        ("models:/digits-naive_bayes/7", "has no version 7; choose from: 1"),
        ("models:/m-1", "no such model; models:/NAME@champion"),
        ("runs:/00/vae", "no run of this id"),
    ):
        with pytest.raises(BadInput) as caught:
            packaging.fetch(params, asked)
        assert words in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """A server that answers as MLflow's does without the password."""

    def do_GET(self) -> None:
        self.send_error(401, "You are not authenticated")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_a_registry_away_and_a_wrong_password_are_told_apart(
    registered: tuple[Params, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, uri = registered
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        with pytest.raises(BadInput) as refused:
            packaging.fetch(params, uri)
        assert str(refused.value) == (
            f"the registry at http://me:***@{address} refuses the user or the password; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
        server.shutdown()
        server.server_close()
        with pytest.raises(BadInput) as away:
            packaging.fetch(params, uri)
        assert f"the registry at http://me:***@{address} does not answer" in str(away.value)
        assert "\n" not in str(away.value)
    finally:
        mlflow.set_tracking_uri(before)


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
