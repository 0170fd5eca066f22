"""The gate of the registry, and the way back: in MLflow's own database, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from tasks import register, versions
from tasks.errors import BadInput
from tasks.registry import COMPARABLE, judge

CHAMPION = {
    "data_sha256": "d",
    "features_sha256": "f",
    "protocol": "4",
    "samples": "100",
    "score": "frechet_distance",
    "frechet_distance": "2.0",
}


@pytest.mark.parametrize(
    ("distance", "alias", "words"),
    [
        (1.9, "champion", "frechet_distance 1.9 beats the former champion's 2"),
        (2.0, "challenger", "frechet_distance 2 does not beat the champion's 2"),
        (2.1, "challenger", "frechet_distance 2.1 does not beat the champion's 2"),
    ],
)
def test_only_a_better_one_becomes_champion(distance: float, alias: str, words: str) -> None:
    verdict = judge({**CHAMPION, "frechet_distance": distance}, CHAMPION)
    assert (verdict.alias, verdict.reason) == (alias, words)


@pytest.mark.parametrize("tag", COMPARABLE)
def test_a_better_one_that_was_measured_otherwise_does_not(tag: str) -> None:
    better = {**CHAMPION, "frechet_distance": 0.1, "kid": 0.1, tag: "kid"}
    verdict = judge(better, CHAMPION)
    assert verdict.alias == "challenger"
    assert verdict.reason == f"not comparable: the champion was measured on {COMPARABLE[tag]}"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    folder = tmp_path_factory.mktemp("registry")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    found = mlflow.MlflowClient()
    found.create_experiment("digits", artifact_location=f"file://{folder}/mlruns")
    return found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model of each test's own."""
    return f"digits-{request.node.name}"


def enter(
    client: mlflow.MlflowClient, name: str, distance: float, data: str = "d"
) -> dict[str, str]:
    """What the register stage does with a trained model of that distance."""
    row: dict[str, Any] = {
        "family": "vae",
        "seed": 0,
        "features": "classifier",
        "features_sha256": "f",
        "protocol": 4,
        "samples": 100,
        "frechet_distance": distance,
        "provenance": {"weights_sha256": f"w{distance}", "data_sha256": data},
    }

    def model() -> str:
        return str(client.create_logged_model("1", name="vae").model_id)

    return register._version(client, name, row, None, {"git_commit": "c"}, model)  # type: ignore[arg-type]


def holder(client: mlflow.MlflowClient, name: str, alias: str = "champion") -> str:
    return str(client.get_registered_model(name).aliases[alias])


def test_the_stage_keeps_the_champion_from_worse_and_from_other_data(
    client: mlflow.MlflowClient, name: str
) -> None:
    assert enter(client, name, 2.0)["alias"] == "champion"
    for distance, data, words in ((3.0, "d", "does not beat"), (1.0, "other", "other data")):
        made = enter(client, name, distance, data)
        assert made["alias"] == "challenger"
        assert words in made["reason"]
        version = client.get_model_version(name, made["version"])
        assert version.tags["reason"] == made["reason"]
        assert version.tags["git_commit"] == "c"
        assert version.description == f"vae: challenger, {made['reason']}."
        assert holder(client, name) == "1"
    better = enter(client, name, 1.5)
    assert holder(client, name) == better["version"] == "4"
    assert "beats the former champion's 2" in better["reason"]
    assert enter(client, name, 1.5)["reason"] == "known"


def test_a_version_that_was_made_but_not_judged_is_judged_the_next_time(
    client: mlflow.MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(versions, "award", interrupted)
        with pytest.raises(KeyboardInterrupt):
            enter(client, name, 2.0)
    assert "champion" not in client.get_registered_model(name).aliases
    made = enter(client, name, 2.0)
    assert (made["version"], made["alias"]) == ("1", "champion")
    assert holder(client, name) == "1"
    assert enter(client, name, 2.0)["reason"] == "known"


def test_rollback_goes_back_champion_by_champion_and_stays_there(
    client: mlflow.MlflowClient, name: str
) -> None:
    for distance in (10.0, 11.0, 8.0, 6.0):  # the second is worse: never champion
        enter(client, name, distance)
    assert versions.champions(client, name) == ["1", "3", "4"]
    assert versions.roll_back(client, name, "blurred") == ("3", "4")
    assert (holder(client, name), holder(client, name, "challenger")) == ("3", "4")
    assert client.get_registered_model(name).tags[versions.CHAMPIONS] == "1 3"
    restored, demoted = (client.get_model_version(name, v) for v in ("3", "4"))
    assert restored.tags["reason"] == "rolled back from version 4: blurred"
    assert demoted.tags["reason"] == "rolled back to version 3: blurred"
    first, last = demoted.description.splitlines()
    assert "beats the former champion's 8" in first
    assert last == "vae: challenger, rolled back to version 3: blurred."

    assert enter(client, name, 6.0) == {"version": "4", "alias": "challenger", "reason": "known"}
    assert holder(client, name) == "3"
    assert versions.roll_back(client, name) == ("1", "3")
    with pytest.raises(BadInput, match="nothing to go back to: version 1 is the only champion"):
        versions.roll_back(client, name)
    assert holder(client, name) == "1"

    made = enter(client, name, 9.0)  # worse than what was rolled back, better than the champion
    assert made["alias"] == "champion"
    assert versions.roll_back(client, name) == ("1", made["version"])


def test_a_champion_made_by_hand_and_a_deleted_one_are_reckoned_with(
    client: mlflow.MlflowClient, name: str
) -> None:
    for distance in (10.0, 11.0, 9.0):
        enter(client, name, distance)
    client.set_registered_model_alias(name, "champion", "1")
    assert versions.champions(client, name) == ["1"]
    client.set_registered_model_alias(name, "champion", "2")
    assert versions.champions(client, name) == ["1", "3", "2"]
    client.delete_model_version(name, "3")
    assert versions.roll_back(client, name) == ("1", "2")


def test_unknown_names_are_told_what_is_near(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    from tasks.params import load_params
    from tests.projects import ROOT

    enter(client, "digits-generator", 1.0)
    with pytest.raises(BadInput, match="no such model; did you mean 'digits-generator'"):
        versions.registered(client, load_params(ROOT / "params.yaml"), "digits-generater")
