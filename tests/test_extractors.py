"""Feature extractors by name: each is what it says, or one clear line says why it cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.data import DataSpec
from tasks import classifier as classifier_stage
from tasks import features as stage
from tasks import prepare
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput
from tasks.evaluation import extractors, floors, real, registered
from tasks.evaluation import features as interface
from tasks.params import ClassifierConfig, EvaluationConfig, Params

CPU = torch.device("cpu")
DATA = DataSpec(shape=(1, 8, 8), levels=17)


def levels(n: int = 5) -> torch.Tensor:
    return torch.randint(0, 17, (n, 1, 8, 8), dtype=torch.uint8)


def build(features: str, code: str = "") -> interface.Extractor:
    return extractors.build(features, None, code, Path("nowhere"), DATA, CPU)


def test_pixels_are_the_levels_and_have_a_limit() -> None:
    x = levels()
    found = build("pixels")
    assert found.name == "pixels"
    np.testing.assert_allclose(found(x), x.flatten(1).numpy() / 16, rtol=1e-6)
    large = DataSpec(shape=(3, 64, 64), levels=256)
    with pytest.raises(BadInput, match="12,288 values of one image are too many"):
        extractors.pixels(large, CPU)


def test_features_do_not_depend_on_the_batch() -> None:
    x = levels(250)
    found = build("pixels")
    assert (found(x) == found(x, batch_size=7)).all()


# -- of the user's own -------------------------------------------------------------------------

OWN = """
import torch

def halves(levels):
    return lambda x: (x.float() / (levels - 1)).flatten(1)[:, ::2]

class Net(torch.nn.Module):
    def __init__(self, levels):
        super().__init__()
        self.drop, self.body = torch.nn.Dropout(), torch.nn.Linear(64, 3)
    def forward(self, x):
        return self.body(self.drop(x.float().flatten(1)))

def as_array(levels):
    return lambda x: x.flatten(1).numpy().astype("float32")

def flat(levels):
    return lambda x: x.float().mean((1, 2, 3))

def integers(levels):
    return lambda x: x.flatten(1)

def too_few(levels):
    return lambda x: x.flatten(1).float()[1:]

def breaks(levels):
    raise RuntimeError("no weights here")

def breaks_later(levels):
    return lambda x: x.nothing

def nothing(levels):
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, in a package; its name is new each time, as modules are cached."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    file = tmp_path / name / "nets.py"
    file.parent.mkdir()
    file.write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return file


def reference(own: Path, function: str) -> str:
    return f"{own.parent.name}.nets:{function}"


def test_a_registered_extractor_is_used_under_its_name_and_its_sources_hash(own: Path) -> None:
    x = levels()
    found = build(reference(own, "halves"), str(own))
    assert found.name == reference(own, "halves")
    np.testing.assert_allclose(found(x), x.flatten(1)[:, ::2].numpy() / 16, rtol=1e-6)
    before = found.sha256
    own.write_text(OWN + "# edited")
    assert build(reference(own, "halves"), str(own)).sha256 != before
    assert build(reference(own, "as_array"), str(own))(x).shape == (5, 64)
    network = build(reference(own, "Net"), str(own))
    assert (network(x) == network(x)).all()  # in evaluation mode: no dropout


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("flat", "gave float32 [2] for uint8 [2, 1, 8, 8]; it must give one row of floats"),
        ("integers", "gave uint8 [2, 64]"),
        ("too_few", "gave float32 [1, 64]"),
        ("breaks", "calling it failed: RuntimeError: no weights here"),
        ("breaks_later", "failed on uint8 [2, 1, 8, 8]: AttributeError"),
        ("nothing", "returned None, not something to call"),
        ("halvs", "has no function 'halvs'; did you mean 'halves'?"),
    ],
)
def test_what_does_not_keep_the_contract_is_refused(own: Path, function: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        build(reference(own, function), str(own))
    assert words in str(caught.value)
    assert reference(own, function) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_or_is_another_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not the file of the module other"):
        build("other:halves", str(own))
    with pytest.raises(BadInput, match="does not exist"):
        build("missing:halves", str(tmp_path / "missing.py"))
    (tmp_path / "broken_module.py").write_text("import nothing_of_that_name")
    with pytest.raises(BadInput, match="cannot be imported: ModuleNotFoundError"):
        build("broken_module:f", str(tmp_path / "broken_module.py"))
    (tmp_path / "json.py").write_text("def f(levels): ...")  # Python has one already
    with pytest.raises(BadInput, match="give it another name"):
        build("json:f", str(tmp_path / "json.py"))


def test_the_example_in_the_contract_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    lines = str(registered.__doc__).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("# myfeatures.py"))
    code = [line[4:] for line in lines[start:] if line.startswith("    ")]
    (tmp_path / "myfeatures.py").write_text("import torch\n" + "\n".join(code))
    found = build("myfeatures:blocks", str(tmp_path / "myfeatures.py"))
    assert found(levels()).shape == (5, 16)


# -- the stage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    prepare.run(DatasetConfig(), root / "data")
    fast = ClassifierConfig(epochs=1, max_steps=5, width=4, features=8)
    classifier_stage.run(fast, root / "data", root / "classifier")
    return root


def compute(root: Path, out: str, config: EvaluationConfig | None = None) -> dict[str, object]:
    places = (str(root / "data"), str(root / "classifier"), str(root / out))
    return stage.compute_folder(config or EvaluationConfig(), *places, "", threads=1, gpu=False)


def test_real_features_are_stored_once_and_read_back(folders: Path) -> None:
    facts = compute(folders, "stored")
    assert facts == json.loads((folders / "stored/features.json").read_text())
    assert facts["dimensions"] == 8
    manifest = json.loads((folders / "data/manifest.json").read_text())
    assert facts["rows"] == manifest["counts"]
    extract = interface.classifier_features(folders / "classifier", CPU)
    assert facts["sha256"] == facts["classifier_sha256"] == extract.sha256
    found = real.load(
        folders / "stored", extract, manifest["content_sha256"], str(facts["classifier_sha256"])
    )
    from tasks.data import shards
    from tasks.evaluation import classifier as judges

    x = shards.read_split(folders / "data", "test").x
    assert (found.features["test"] == extract(x)).all()
    judge = judges.load(folders / "classifier")
    np.testing.assert_allclose(found.logits["test"], judges.logits(judge, x), atol=1e-5)
    assert found.floors == floors.compute(found.features, EvaluationConfig().samples)
    assert {p.suffix for p in (folders / "stored").iterdir()} == {".npy", ".json"}


def test_features_of_other_data_or_networks_are_refused(folders: Path) -> None:
    facts = compute(folders, "pixels", EvaluationConfig(features="pixels"))
    assert (facts["name"], facts["dimensions"]) == ("pixels", 64)
    data, judge = str(facts["data_sha256"]), str(facts["classifier_sha256"])
    pixels = extractors.pixels(DATA, CPU)
    real.load(folders / "pixels", pixels, data, judge)
    for wrong, words in (
        ((pixels, "0" * 64, judge), "other data"),
        ((pixels, data, "0" * 64), "another network"),
        (
            (interface.classifier_features(folders / "classifier", CPU), data, judge),
            "pixels, sha256",
        ),
    ):
        with pytest.raises(BadInput, match=words):
            real.load(folders / "pixels", *wrong)
    with pytest.raises(BadInput, match="run the features stage again"):
        real.load(folders / "nowhere", pixels, data, judge)


def test_features_that_are_no_numbers_are_refused(folders: Path) -> None:
    from tasks.evaluation import classifier as judges

    spoil = interface.Extractor("logs", "", lambda x: x.flatten(1).float().log(), CPU)
    judge, black = judges.load(folders / "classifier"), np.zeros((3, 1, 8, 8), np.uint8)
    with pytest.raises(BadInput, match="features of 3 of 3 train images are not finite"):
        real.compute(spoil, judge, {"train": black}, 3)


def test_without_images_there_are_no_features_and_no_ray(tmp_path: Path) -> None:
    prepare.run(DatasetConfig(name="toy2d", points=300), tmp_path / "data")
    facts = stage.run(
        Params(families=("gmm",), models={"gmm": {}}),
        tmp_path / "data",
        tmp_path / "nowhere",
        tmp_path / "features",
    )
    assert facts["name"] == "none"
    assert facts["reason"] == "there are no features of points"
    assert [p.name for p in (tmp_path / "features").iterdir()] == ["features.json"]


# -- inception-v3 --------------------------------------------------------------------------------


def test_inception_is_never_downloaded_and_never_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download without being asked")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(BadInput, match="--download-inception") as caught:
        build("inception-v3")
    assert "evaluation.inception_weights" in str(caught.value)
    with pytest.raises(BadInput, match="is not there"):
        extractors.inception_file(str(tmp_path / "mine.pth"))
    extractors.inception_cache().parent.mkdir()
    extractors.inception_cache().touch()
    assert extractors.inception_file(None) == extractors.inception_cache()
    assert extractors.download_inception() == extractors.inception_cache()  # it is there


def test_the_download_is_checked_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    served = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    served.write_bytes(b"not those weights")
    monkeypatch.setattr(extractors, "URL_INCEPTION_V3", served.as_uri())
    with pytest.raises(BadInput, match="invalid hash value"):
        extractors.download_inception()
    assert not extractors.inception_cache().exists()


def test_inception_equals_torch_fidelity(tmp_path: Path) -> None:
    """On one random weights file, since the real one is not to be had everywhere."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import create_feature_extractor

    broken = tmp_path / "broken.pth"
    torch.save({"nothing": torch.zeros(1)}, broken)
    with pytest.raises(BadInput, match="does not fit"):
        extractors.inception_features(broken, 256, CPU)

    weights = tmp_path / "random.pth"
    _random_inception(FeatureExtractorInceptionV3, weights)
    ours = extractors.inception_features(weights, 17, CPU)
    x = levels(3)
    reference = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(weights)
    )
    rgb = (x.float() * 255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = reference(rgb)[0].numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(ours(x), expected, rtol=1e-4, atol=1e-6)
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
