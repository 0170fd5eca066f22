"""The real thing on data that are no images: text, through every stage to the registry."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1500)]

SMALL = (
    "dataset.window=32",
    "models.transformer.width=16",
    "models.transformer.layers=1",
    "models.hmm.states=4",
    "models.hmm.iterations=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which text has just been run through; the families are chosen for it."""
    path = projects.make_project(tmp_path_factory.mktemp("text") / "project", {})
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done = projects.genarena(path, "run", "--dataset", "text", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Leaderboard: text" in done.stdout + done.stderr
    return path


def test_text_is_ranked_by_bits_and_shown(finished: Path) -> None:
    table = pd.read_csv(finished / "reports/leaderboard.csv")
    assert set(table["family"]) == {"transformer", "hmm"}
    assert set(table["status"]) == {"ok"}
    assert table["bits_per_dim"].is_monotonic_increasing
    assert table["perplexity"].notna().all()
    assert table["frechet_distance"].isna().all()
    found = json.loads((finished / "metrics/transformer-0.json").read_text())
    assert found["likelihood_kind"] == "exact"
    html = (finished / "reports/leaderboard.html").read_text()
    assert "Ranked by bits/dim" in html
    assert "windows of 32 bytes" in html
    assert (finished / "artifacts/evaluate/transformer-0/samples.txt").exists()


def test_a_registered_model_of_text_continues_a_prompt(finished: Path, tmp_path: Path) -> None:
    words = ("sample", "transformer", "--text", "The ", "-n", "2", "--set", "max_tokens=9")
    done = projects.genarena(finished, *words, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [file.read_text() for file in sorted((tmp_path / "out").glob("*.txt"))]
    assert len(texts) == 2
    assert all(text for text in texts)
    wrong = projects.genarena(finished, *words[:-1], "max_token=9")
    assert wrong.returncode == 2
    assert "did you mean 'max_tokens'?" in wrong.stderr
