"""Families that model text or points: the contract, and the whole protocol, on such data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from models import FAMILIES, store
from models.base import GenerativeModel
from models.data import PLURALS, Batch, DataSpec
from tasks.data.shards import Split
from tasks.evaluation import pictures
from tasks.evaluation.quality import Yardstick
from tasks.packaging import log_model
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tasks.training.validation import Validator
from tests.conftest import SMALL_CONFIGS
from tests.measuring import measured

SPECS = {
    "text": DataSpec(shape=(12,), levels=256, modality="text"),
    "points": DataSpec(shape=(2,), levels=256, modality="points"),
}
CASES = [
    (name, modality)
    for name, cls in FAMILIES.items()
    for modality in sorted(cls.modalities - {"image"})
]


def rows_of(modality: str, n: int) -> np.ndarray[Any, Any]:
    """Bytes of a sentence, or points near two places."""
    if modality == "text":
        sentence = b"to be or not to be that is the question; " * n
        return np.frombuffer(sentence, np.uint8)[: 12 * n].reshape(n, 12).copy()
    random = np.random.default_rng(0)
    centre = random.choice([80, 160], (n, 1))
    return (centre + random.integers(-9, 10, (n, 2))).astype(np.uint8)


def small(name: str, modality: str) -> GenerativeModel:
    torch.manual_seed(0)
    cls = FAMILIES[name]
    return cls(cls.Config(**SMALL_CONFIGS[name]), SPECS[modality])


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_it_learns_such_data(case: tuple[str, str], tmp_path: Path) -> None:
    """The loop lowers -log P; the validator measures and draws."""
    name, modality = case
    model, x = small(*case), torch.from_numpy(rows_of(modality, 64))
    with torch.no_grad():
        before = float(model.eval().log_prob(x).mean())
    split = Split(x.numpy(), None, None, None)
    settings = TrainConfig(
        budget=Budget(steps=60),
        batch_size=32,
        precision="fp32",
        ema_decay=0.5,
        validate_every=30,
        validation_samples=8,
    )
    validate = Validator(split, x.numpy(), None, settings, tmp_path / "pictures")
    records: list[dict[str, Any]] = []
    train(
        model,
        TrainData(x),
        settings,
        tmp_path / "checkpoints",
        validate=validate,
        on_record=records.append,
    )
    with torch.no_grad():
        after = float(model.eval().log_prob(x).mean())
    assert math.isfinite(before)
    assert after > before + 0.1, name
    assert records[-1]["validation/score"] == records[-1]["validation/bits_per_dim"]
    assert list((tmp_path / "pictures").glob("*.png"))
    assert bool(list((tmp_path / "pictures").glob("*.txt"))) == (modality == "text")


def test_samples_are_such_data(case: tuple[str, str]) -> None:
    model = small(*case).eval()
    with torch.no_grad():
        samples, cold = model.sample(5), model.sample(3, temperature=0.0)
    assert samples.shape == (5, *model.data.shape)
    assert samples.dtype == torch.uint8
    assert (cold == cold[0]).all()


def test_the_protocol_measures_it(case: tuple[str, str], tmp_path: Path) -> None:
    modality = case[1]
    model, x = small(*case).eval(), rows_of(modality, 64)
    if not model.phases():
        with torch.no_grad():
            model.fit(Batch(torch.from_numpy(x)))
    yardstick = Yardstick(
        train=Split(x, None, None, None),
        validation=x[:20],
        test=Split(x[20:], None, None, None),
        extractor=None,
        real=None,
        judge=None,
        entropy=3.0 if modality == "points" else None,
    )
    found = measured(model, yardstick, 20)
    assert found.metrics["nats"] > 0
    assert "no features" in found.not_applicable["frechet_distance"]
    assert "letters" in found.not_applicable["anomaly_auroc"]
    assert ("perplexity" in found.metrics) == (modality == "text")
    assert ("nats_above_entropy" in found.metrics) == (modality == "points")
    pictures.draw(tmp_path, found, model, yardstick.test)
    written = {p.name for p in tmp_path.iterdir()}
    assert "samples.png" in written
    assert ("samples.txt" in written) == (modality == "text")
    assert ("density.png" in written) == (modality == "points")


def test_the_registered_model_answers(case: tuple[str, str], tmp_path: Path) -> None:
    name, modality = case
    model = small(*case).eval()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("m", artifact_location=f"file://{tmp_path}/mlruns")
    run = client.create_run(experiment).info.run_id
    store.save(tmp_path / "model", model, name, model.state_dict())
    loaded = mlflow.pyfunc.load_model(f"models:/{log_model(run, name, tmp_path / 'model')}")
    requests = pd.DataFrame([{"n": 2}, {"n": 1}])
    if "text" in model.conditions:
        requests["text"] = ["to be", None]
    answers = loaded.predict(requests, params={"seed": 3})
    assert len(answers) == 3
    if modality == "text":
        assert all(isinstance(answer, str) for answer in answers)
        if "max_tokens" in model.options:
            short = loaded.predict(requests, params={"seed": 3, "max_tokens": 4})
            assert all(len(answer.encode(errors="replace")) <= 4 * 3 for answer in short)
    else:
        assert answers.shape == (3, 2)
        assert answers.dtype == np.uint8


def test_a_family_refuses_other_modalities_in_words() -> None:
    for name, cls in FAMILIES.items():
        for modality in SPECS.keys() - cls.modalities:
            kinds = " and ".join(PLURALS[kind] for kind in sorted(cls.modalities))
            told = f"it models {kinds}, not {modality}"
            assert cls.unsuited(SPECS[modality]) == told, name


def continued(model: GenerativeModel, prompt: bytes, **options: Any) -> Tensor:
    text = torch.tensor([list(prompt)] * 3, dtype=torch.uint8)
    torch.manual_seed(1)
    with torch.no_grad():
        return model.sample(3, text=text, **options)


@pytest.mark.parametrize("name", [name for name, modality in CASES if modality == "text"])
def test_text_goes_on_from_a_prompt(name: str) -> None:
    model = small(name, "text")
    batch = Batch(torch.from_numpy(rows_of("text", 64)))
    if model.phases():
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            loss = model.losses(batch, model.phases()[0].name)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    else:
        for _ in range(10):
            model.fit(batch)
    model.eval()
    assert "text" in model.conditions
    one = continued(model, b"to be or", max_tokens=20)
    assert one.shape == (3, 20)
    assert torch.equal(one, continued(model, b"to be or", max_tokens=20))
    stopped = continued(model, b"to be or", max_tokens=40, stop=" ")
    for row in stopped.tolist():
        if ord(" ") in row:
            assert not any(row[row.index(ord(" ")) + 1 :])  # zeros after what stops it
