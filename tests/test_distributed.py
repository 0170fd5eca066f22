"""Every family trains on two Ray workers, on data of the kind it needs, and is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models import FAMILIES, store
from models.base import GenerativeModel
from tasks import classifier, features, prepare
from tasks.cluster import connected
from tasks.data.config import DatasetConfig
from tasks.evaluate import measure_folder
from tasks.evaluation.decoder import AISConfig
from tasks.evaluation.likelihood import LikelihoodDraws
from tasks.evaluation.usefulness import UsefulnessConfig
from tasks.params import ClassifierConfig, ClusterConfig, EvaluationConfig
from tasks.training.candidates import load_best
from tasks.training.config import Budget, TrainConfig
from tests.conftest import SMALL_CONFIGS

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]
KINDS = (
    DatasetConfig(),
    DatasetConfig(derive="edges"),
    DatasetConfig(derive="low_resolution"),
    DatasetConfig(derive="masked"),
    DatasetConfig(derive="edges", paired=False),
    DatasetConfig(captions=("a {name}",)),
)
SMALL = TrainConfig(
    budget=Budget(steps=6),
    batch_size=16,
    log_every=2,
    validate_every=3,
    checkpoint_every=3,
    validation="synchronous",  # tests/test_background.py has the other
    validation_images=16,
    validation_samples=16,
)


def kind_of(family: str) -> int:
    """The first kind of data that suits the family."""
    return next(i for i, c in enumerate(KINDS) if FAMILIES[family].unsuited(c.outline()) is None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All families, trained one after the other by one pair of Ray workers."""
    root = tmp_path_factory.mktemp("distributed")
    specs: list[dict[str, Any]] = []
    for number in sorted({kind_of(family) for family in FAMILIES}):
        prepare.run(KINDS[number], root / f"data-{number}")
    fast = ClassifierConfig(epochs=2, max_steps=40)
    classifier.run(fast, root / f"data-{kind_of('vae')}", root / "classifier")
    for number in sorted({kind_of(family) for family in FAMILIES}):
        data, out = str(root / f"data-{number}"), str(root / f"features-{number}")
        judge = str(root / "classifier")
        features.compute_folder(EvaluationConfig(), data, judge, out, "", threads=1, gpu=False)
    for family in FAMILIES:
        prepared = root / f"data-{kind_of(family)}"
        specs.append(
            {
                "family": family,
                "config": SMALL_CONFIGS[family],
                "data": json.loads((prepared / "manifest.json").read_text())["spec"],
                "train": SMALL.model_dump(mode="json"),
                "prepared": str(prepared),
                "classifier": str(root / "classifier"),
                "directory": str(root / "work" / family),
                "threads": 1,
            }
        )
        Path(specs[-1]["directory"]).mkdir(parents=True)

    def train_all(config: dict[str, Any]) -> None:  # a closure: it travels by value
        from tasks.training.worker import work

        for spec in config["specs"]:
            outcome = work(spec)
            if ray.train.get_context().get_world_rank() == 0:
                Path(spec["directory"], "outcome.json").write_text(json.dumps(outcome))

    with connected(ClusterConfig()):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            train_all,
            train_loop_config={"specs": specs},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(name="all", storage_path=str(root / "ray")),
        ).fit()
    return root


def test_two_ray_workers_train_and_the_result_is_measured(
    family: str, trained: Path, tmp_path: Path
) -> None:
    work = trained / "work" / family
    outcome = json.loads((work / "outcome.json").read_text())
    assert "error" not in outcome, outcome
    assert outcome["workers"] == 2
    records = [json.loads(line) for line in (work / "history.jsonl").read_text().splitlines()]
    model = build(trained, family)
    logged = {name.split("/")[0] for record in records for name in record if "/loss" in name}
    # both players', and the penalties'
    assert logged == ({phase.name for phase in model.phases()} or {"fit"})
    assert outcome["progress"]["step"] == 6 or not model.phases()
    assert "validation/score" in records[-1]
    assert list((work / "samples").glob("step-*.png"))

    store.save(tmp_path / "model", model, family, load_best(work / "checkpoints"))
    result = measure_folder(
        EvaluationConfig(
            samples=100,
            likelihood_examples=4,
            likelihood_draws=LikelihoodDraws(exact=1, bound=2, ode=1, ais=1),
            anomaly_images=4,
            ais=AISConfig(images=2, chains=1, steps=2, leapfrog=2),
            reconstruction_images=4,
            usefulness=UsefulnessConfig(samples=20, steps=2, per_class=2),
        ),
        str(trained / f"data-{kind_of(family)}"),
        str(trained / "classifier"),
        str(trained / f"features-{kind_of(family)}"),
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "",
        threads=torch.get_num_threads(),
        gpu=False,
    )
    metrics, pictures = result["metrics"], {p.name for p in (tmp_path / "out").iterdir()}
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    assert "nearest_train_ratio" in metrics
    assert {"samples.png", "neighbours.png"} <= pictures
    conditions = model.conditions
    assert ("condition_accuracy" in metrics) == bool(conditions)
    assert ("conditions.png" in pictures) == bool(conditions)
    assert ("translations.png" in pictures) == ("source" in conditions)
    assert ("psnr_floor" in metrics) == ("source" in conditions)
    assert ("cycle_psnr" in metrics) == (FAMILIES[family].reconstruction == "cycle")


def build(trained: Path, family: str) -> GenerativeModel:
    manifest = json.loads((trained / f"data-{kind_of(family)}/manifest.json").read_text())
    return store.build(family, SMALL_CONFIGS[family], manifest["spec"])
