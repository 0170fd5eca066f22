"""The nightly job on a server of its own: what changed runs again, and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from tests import projects

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]
PATIENCE_S = 300
SETTINGS: dict[str, object] = {
    "dataset.name": "image_folder",
    "dataset.path": "data/raw/pictures",
    "dataset.validation": 0.2,
    "families": ["naive_bayes"],
    "evaluation.samples": 100,
}
REFRESH = """
import json, sys
from flows.refresh import refresh
state = refresh(return_state=True)
heavy = [name for name in ("torch", "ray", "mlflow") if name in sys.modules]
print("STATE", json.dumps([state.type.value, state.name, state.message, heavy]))
"""


def picture(folder: Path, number: int) -> None:
    """A small grey image with a blob, in one of two classes."""
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[:8, :8]
    centre = generator.uniform(1, 7, 2)
    blob = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / 4)
    levels = (200 * blob + 40 * generator.random((8, 8))).astype(np.uint8)
    into = folder / ("even", "odd")[number % 2]
    into.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(into / f"{number:03d}.png")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on a free port of this machine."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--no-ui"],
            env={**os.environ, "PREFECT_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + PATIENCE_S
    while socket.socket().connect_ex(("127.0.0.1", int(port))):
        assert process.poll() is None, (home / "server.log").read_text()
        assert time.monotonic() < deadline, (home / "server.log").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/api"
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = projects.make_project(tmp_path_factory.mktemp("refresh") / "project", SETTINGS)
    for number in range(80):
        picture(path / "data/raw/pictures", number)
    return path


def start(path: Path, server: str, code: str = REFRESH) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=path,
        env={**projects.environment(path), "PREFECT_API_URL": server},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[list[Any], str]:
    """Type, name and message of its state, the heavy modules it loaded; and what it said."""
    said, _ = process.communicate(timeout=PATIENCE_S)
    found = re.search(r"^STATE (.*)$", said, re.MULTILINE)
    assert found, said
    return json.loads(found[1]), said


def stages_of(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load((path / "dvc.lock").read_text())["stages"]


@pytest.fixture(scope="module")
def refreshed(project: Path, server: str) -> str:
    """What the first refresh, in which everything runs, has said."""
    (kind, *_), said = ended(start(project, server))
    assert kind == "COMPLETED", said
    return said


def test_the_first_time_everything_runs(project: Path, refreshed: str) -> None:
    assert "- `train@naive_bayes-0`: it had not run before" in refreshed
    assert "- pictures-generator version 1: champion (the first version)" in refreshed
    assert (project / "reports/leaderboard.html").exists()
    assert not re.search(r"\(\w+ pid=\d+", refreshed)


def test_nothing_changed_means_nothing_is_done(project: Path, server: str, refreshed: str) -> None:
    before = (project / "dvc.lock").read_bytes()
    (kind, name, message, heavy), said = ended(start(project, server))
    assert (kind, name, message) == ("COMPLETED", "NothingToDo", "nothing to do")
    assert heavy == []  # nothing that trains was so much as imported
    assert "no DVC remote" in said or "not tracked" in said
    assert (project / "dvc.lock").read_bytes() == before


def test_one_more_image_and_two_refreshes_at_once(
    project: Path, server: str, refreshed: str
) -> None:
    """Prepare and what follows run again, once; the version says which data it has."""
    before = stages_of(project)
    old = json.loads((project / "data/prepared/manifest.json").read_text())["content_sha256"]
    picture(project / "data/raw/pictures", 1000)
    both = [start(project, server) for _ in range(2)]
    states, said = zip(*map(ended, both), strict=True)
    assert sorted(state[0] for state in states) == ["CANCELLED", "COMPLETED"], said
    assert "another run is at work" in str([s for s in states if s[0] == "CANCELLED"])
    assert projects.dvc(project, "status", "--json").stdout.strip() == "{}"
    after = stages_of(project)
    assert {name for name in after if after[name] != before[name]} == set(before)
    told = next(text for text, state in zip(said, states, strict=True) if state[0] == "COMPLETED")
    assert "- `prepare`: data/raw/pictures changed" in told
    new = json.loads((project / "data/prepared/manifest.json").read_text())["content_sha256"]
    assert new != old
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    versions = client.search_model_versions("name = 'pictures-generator'")
    tags = {int(version.version): version.tags["data_sha256"] for version in versions}
    assert tags == {1: old, 2: new}
    assert new in told


GENERATE = """
import json
from flows.generate import generate
from tasks.drawing import GenerateSettings
for settings in {settings}:
    state = generate(GenerateSettings(**settings), return_state=True)
    print("STATE", json.dumps([state.type.value, state.name, state.message]))
"""


def test_samples_in_bulk_are_kept_and_the_same_again(
    project: Path, server: str, refreshed: str
) -> None:
    """And a model that there is not is refused by name."""
    wanted = {"n": 120, "batch": 50, "seed": 3}
    asked = [{**wanted, "name": "by-the-flow"}, {**wanted, "model": "pictures-generatr"}]
    said, _ = start(project, server, GENERATE.format(settings=asked)).communicate(PATIENCE_S)
    done, wrong = (json.loads(line) for line in re.findall(r"^STATE (.*)$", said, re.MULTILINE))
    assert done[0] == "COMPLETED", said
    assert wrong[:2] == ["FAILED", "Refused"]
    assert wrong[2].endswith("did you mean 'pictures-generator'?")
    again = json.dumps({**wanted, "name": "by-hand"})
    projects.stage(project, "generate", "--settings", again)
    folders = [project / "data/generated" / name for name in ("by-the-flow", "by-hand")]
    one, two = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.suffix in (".parquet", ".png")}
        for d in folders
    )
    assert one == two
    assert len(list(folders[0].glob("png/*.png"))) == 120
    table = pd.read_parquet(folders[0] / "samples")
    assert len(table) == 120
    assert table["x"].nunique() > 60  # slices are not one another's copies
    first = np.asarray(Image.open(folders[0] / "png/00000.png"))
    assert first.tobytes() == table["x"][0]
    note = json.loads((folders[0] / "generated.json").read_text())
    assert (note["name"], note["samples"], note["parts"]) == ("pictures-generator", 120, 3)
    for folder in folders:
        assert "md5" in folder.with_name(f"{folder.name}.dvc").read_text()
    assert projects.command(project, "git", "check-ignore", str(folders[0])).stdout
    assert projects.dvc(project, "status", "--json").stdout.strip() == "{}"
