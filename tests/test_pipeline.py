"""The real thing, small: Prefect, DVC, Ray Train and MLflow on the embedded data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from ruamel.yaml import YAML

from models import FAMILIES
from tasks.params import override_params
from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1500)]

RAN = ("vae", "dcgan", "cgan")  # test_distributed.py has the others


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `genarena run` has just run through."""
    path = projects.make_project(tmp_path_factory.mktemp("pipeline") / "project", {})
    done = projects.genarena(path, "run", "--families", " ".join(RAN))
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "run.log").write_text(done.stdout + done.stderr)
    return path


def client(path: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{path}/mlflow.db")


def test_the_run_shows_progress_and_ends_with_the_leaderboard(finished: Path) -> None:
    log = (finished / "run.log").read_text()
    for family in RAN:
        assert re.search(rf"train@{family}-0\s+step 20/20 \(100%\).* loss .*ETA 0:00", log), family
    assert "Leaderboard: digits" in log
    assert "leaderboard.html" in log
    assert "make ui" in log


def test_all_families_are_measured_and_ranked(finished: Path) -> None:
    table = pd.read_csv(finished / "reports/leaderboard.csv").set_index("family")
    assert set(table.index) == set(RAN)
    assert set(table["status"]) == {"ok"}
    assert sorted(table["rank"]) == list(range(1, len(RAN) + 1))
    assert table["frechet_distance"].is_monotonic_increasing
    for family in RAN:
        cls = FAMILIES[family]
        found = json.loads((finished / "metrics" / f"{family}-0.json").read_text())
        assert ("bits_per_dim" in found) == (cls.likelihood != "none")
        assert found["features"] == "classifier"
        assert found["frechet_distance_floor"] > 0
        if cls.likelihood == "none":
            assert found["not_applicable"]["bits_per_dim"] == "the family has no likelihood"
        assert (finished / "artifacts/evaluate" / f"{family}-0" / "samples.png").exists()
    html = (finished / "reports/leaderboard.html").read_text()
    assert html.count("data:image/png;base64,") >= len(RAN)


def test_mlflow_has_the_comparison_and_its_families(finished: Path) -> None:
    tracking = client(finished)
    experiment = tracking.get_experiment_by_name("digits")
    assert experiment is not None
    runs = tracking.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {r.data.tags["family"]: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(parents) == 1
    assert set(children) == set(RAN)
    assert parents[0].info.status == "FINISHED"
    for family, run in children.items():
        assert run.info.run_name == f"{family}-digits-s0"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert (
            parents[0].data.metrics[f"{family}/frechet_distance"]
            == run.data.metrics["frechet_distance"]
        )
        phase_losses = [m for m in run.data.metrics if m.endswith("/loss")]
        assert len(tracking.get_metric_history(run.info.run_id, phase_losses[0])) == 4
        assert [a.path for a in tracking.list_artifacts(run.info.run_id) if a.path == "images"]


def test_every_family_is_registered_and_the_best_is_the_generator(finished: Path) -> None:
    tracking = client(finished)
    best = pd.read_csv(finished / "reports/leaderboard.csv").iloc[0]["family"]
    for family in RAN:
        version = tracking.get_model_version_by_alias(f"digits-{family}", "champion")
        assert version.tags["reason"] == "the first version"
    generator = tracking.get_model_version_by_alias("digits-generator", "champion")
    assert generator.tags["family"] == best


LOAD = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
result = {}
for name in sys.argv[2:]:
    model = mlflow.pyfunc.load_model(f"models:/digits-{name}@champion")
    asked = {"label": ["7", "7"]} if len(model.metadata.signature.inputs) > 1 else {}
    draw = lambda **p: model.predict(pd.DataFrame({"n": [3, 2], **asked}), params=p)
    one, same, other, cold = draw(seed=1), draw(seed=1), draw(seed=2), draw(seed=1, temperature=0.0)
    assert (one == same).all() and (one != other).any() and (cold == cold[0]).all()
    assert model.metadata.signature.inputs and model.metadata.saved_input_example_info
    result[name] = [list(one.shape), str(one.dtype), int(one.max())]
for module in ("tasks", "flows"):
    try:
        __import__(module)
        raise SystemExit(f"{module} can be imported: the test proves nothing")
    except ImportError:
        pass
print(json.dumps(result))
"""


def test_registered_models_load_where_the_project_is_not(finished: Path, tmp_path: Path) -> None:
    """No `tasks`, no `flows`, nothing pickled: the editable install is shut out with -S -s."""
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    site = next(p for p in sys.path if p.endswith("site-packages"))
    done = subprocess.run(
        [sys.executable, "-S", str(script), f"sqlite:///{finished}/mlflow.db", *RAN],
        cwd=tmp_path,
        env={
            "PYTHONPATH": site,
            "PATH": "/usr/bin:/bin",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shapes = json.loads(done.stdout.splitlines()[-1])
    assert set(shapes) == set(RAN)
    assert all(shape == [5, 8, 8, 1] and kind == "uint8" for shape, kind, _ in shapes.values())
    files = [p.suffix for p in (finished / "mlruns").rglob("*") if p.is_file()]
    assert not {".pkl", ".pickle", ".pt", ".pth"} & set(files)
    assert files.count(".safetensors") == len(RAN)  # the generator is one of them


def test_the_command_draws_samples(finished: Path, tmp_path: Path) -> None:
    done = projects.genarena(finished, "sample", "vae", "-n", "5", "--out", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "s").glob("*.png"))) == 5
    asked = projects.genarena(finished, "sample", "cgan", "--label", "7", "-n", "3", "--out", "no")
    assert asked.returncode == 0, asked.stderr
    vain = projects.genarena(finished, "sample", "vae", "--label", "7")
    assert vain.returncode == 2
    assert "takes no label; it takes n" in vain.stderr
    unknown = projects.genarena(finished, "sample", "cgan", "--label", "x")
    assert unknown.returncode == 2
    assert "no class 'x'" in unknown.stderr
    wrong = projects.genarena(finished, "sample", "digits-va")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().endswith("did you mean 'digits-vae'?")


def test_unchanged_means_nothing_runs(finished: Path) -> None:
    lock = (finished / "dvc.lock").read_bytes()
    done = projects.genarena(finished, "run")
    assert done.returncode == 0
    assert "Everything is up to date" in done.stdout
    assert "Leaderboard: digits" in done.stdout
    assert "Data and pipelines are up to date" in projects.dvc(finished, "repro").stdout
    assert (finished / "dvc.lock").read_bytes() == lock


def changed_stages(path: Path) -> set[str]:
    return set(json.loads(projects.dvc(path, "status", "--json").stdout))


def test_editing_a_family_touches_that_family_alone(finished: Path) -> None:
    for family in RAN:
        file = finished / "models" / family / "__init__.py"
        before = file.read_text()
        file.write_text(before + "\n# edited\n")
        try:
            assert changed_stages(finished) == {f"train@{family}-0", f"evaluate@{family}-0"}
        finally:
            file.write_text(before)
    assert changed_stages(finished) == set()


def stages_of(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load((path / "dvc.lock").read_text())["stages"]


def test_a_hyperparameter_retrains_its_family_and_what_follows(finished: Path) -> None:
    """And a worse model is registered as challenger; going back costs no training at all."""
    before = (finished / "artifacts/train/dcgan-0/model.safetensors").read_bytes()
    lock = stages_of(finished)
    champion = client(finished).get_model_version_by_alias("digits-vae", "champion").version
    override_params({"models.vae.optimizer.lr": 1e-7}, finished / "params.yaml")
    done = projects.dvc(finished, "repro")
    ran = re.findall(r"Running stage '([^']+)'", done.stdout)
    assert ran == ["train@vae-0", "evaluate@vae-0", "report", "register"]
    assert (finished / "artifacts/train/dcgan-0/model.safetensors").read_bytes() == before
    tracking = client(finished)
    challenger = tracking.get_model_version_by_alias("digits-vae", "challenger")
    assert "does not beat" in challenger.tags["reason"]
    assert tracking.get_model_version_by_alias("digits-vae", "champion").version == champion
    override_params({"models.vae.optimizer.lr": 1e-3}, finished / "params.yaml")
    back = projects.dvc(finished, "repro")
    assert set(re.findall(r"Running stage '([^']+)'", back.stdout)) <= {"report", "register"}
    assert stages_of(finished)["train@vae-0"] == lock["train@vae-0"]


def test_what_changed_is_told_from_mlflow_and_from_the_folder(finished: Path) -> None:
    done = projects.genarena(finished, "diff", "compare-digits", ".")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "frechet_distance " in line]
    assert len(rows) == len(RAN)
    assert all("equal" in row for row in rows)
    assert "not comparable" not in done.stdout
    wrong = projects.genarena(finished, "diff", "compare-digit")
    assert wrong.returncode == 2
    assert "did you mean 'compare-digits'?" in wrong.stderr


def test_another_seed_trains_that_seed_alone_and_gives_a_spread(finished: Path) -> None:
    before = stages_of(finished)
    done = projects.genarena(finished, "run", "--families", "vae dcgan", "--seeds", "0 1")
    assert done.returncode == 0, done.stdout + done.stderr
    after = stages_of(finished)
    for family in ("vae", "dcgan"):
        assert after[f"train@{family}-0"] == before[f"train@{family}-0"]
        names = [finished / "metrics" / f"{family}-{seed}.json" for seed in (0, 1)]
        a, b = (json.loads(name.read_text())["frechet_distance"] for name in names)
        assert a != b
        table = pd.read_csv(finished / "reports/leaderboard.csv").set_index("family")
        assert table.loc[family, "seeds"] == "0 1"
        assert table.loc[family, "frechet_distance"] == pytest.approx((a + b) / 2)
        assert table.loc[family, "frechet_distance_seed_std"] == pytest.approx(abs(a - b) / 2**0.5)
    tracking = client(finished)
    names = {r.info.run_name for r in tracking.search_runs(["1"])}
    assert {"vae-digits-s0", "vae-digits-s1"} <= names
    facts = [
        json.loads((finished / f"artifacts/train/vae-{seed}/train.json").read_text())
        for seed in (0, 1)
    ]
    better = min((0, 1), key=lambda seed: facts[seed]["best_score"])
    registered = json.loads((finished / "artifacts/registry.json").read_text())["digits-vae"]
    version = tracking.get_model_version("digits-vae", registered["version"])
    assert version.tags["seed"] == str(better)
    both = " ".join(RAN)
    assert projects.genarena(finished, "run", "--families", both, "--seeds", "0").returncode == 0


def test_one_family_fails_and_the_others_finish(finished: Path) -> None:
    """NaN in one family: `failed` with its reason, the flow Failed, nothing of the rest lost."""
    done = projects.genarena(finished, "run", "--set", "models.vae.optimizer.lr=1e30")
    assert done.returncode == 1, done.stdout + done.stderr
    table = pd.read_csv(finished / "reports/leaderboard.csv").set_index("family")
    assert table.loc["vae", "status"] == "failed"
    assert re.search(r"train: .*NonFiniteLoss.*step \d+, phase 'main'", table.loc["vae", "reason"])
    assert (table.drop("vae")["status"] == "ok").all()
    assert "Finished in state Failed" in done.stdout + done.stderr
    html = (finished / "reports/leaderboard.html").read_text()
    assert "failed: train:" in html
    runs = client(finished).search_runs(["1"], "tags.`failed.vae` LIKE '%NonFinite%'")
    assert [run.info.status for run in runs] == ["FAILED"]
