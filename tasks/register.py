"""Stage `register`: models to the MLflow registry, champions through the gate.

    python -m tasks.register

`<dataset>-<family>` gets a version for every newly trained family, `<dataset>-generator` one
for the best of them all.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from models import FAMILIES, store
from models.base import DataSpec
from tasks import stage, tracking
from tasks.errors import Outage
from tasks.params import Params, load_params
from tasks.registry import judge
from tasks.reporting import leaderboard
from tasks.runs import Run

TYPES = {int: "long", float: "double", str: "string"}  # of a family's own options, in MLflow
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")


def run(params: Params, out: Path, root: Path = Path()) -> dict[str, Any]:
    """Register what `metrics/` and `artifacts/train/` hold; writes and returns what was done."""
    rows = leaderboard.load_families(params.families, params.seeds, root)
    ok = [{**_chosen(row, root), "rank": row["rank"]} for row in rows if leaderboard.score(row)]
    done = tracking.tolerant("registering", lambda: _register(params, ok, root))
    out.parent.mkdir(parents=True, exist_ok=True)
    if done is None:
        raise Outage("the registry could not be reached; run the register stage again")
    out.write_text(json.dumps(done, indent=2) + "\n")
    return done


def _chosen(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """Of a family's seeds, the run that did best on the validation split: never on the test."""

    def validated(run: dict[str, Any]) -> float:
        facts = json.loads(
            (root / Run(run["family"], run["seed"]).trained / "train.json").read_text()
        )
        return float(facts["best_score"])

    runs: list[dict[str, Any]] = row["runs"]
    return min(runs, key=validated) if len(runs) > 1 else runs[0]


def _register(params: Params, rows: list[dict[str, Any]], root: Path) -> dict[str, Any]:
    client = tracking.connect(params)
    dataset = params.dataset.title
    done = {}
    # what needs a source image generates nothing by itself, and what lacks the number that ranks
    # the others is not known to be better than any of them
    ranked = [row for row in rows if row["rank"] is not None]
    free = [row for row in ranked if "source" not in FAMILIES[row["family"]].conditions]
    for row in rows:
        which = Run(row["family"], row["seed"])
        folder = root / which.trained
        run_id = tracking.run_of(client, params, which, folder)
        names = [f"{dataset}-{row['family']}"]
        if row in free[:1]:
            names.append(f"{dataset}-generator")
        for name in names:
            done[name] = _version(client, name, row, run_id, folder)
    return done


def _version(
    client: Any, name: str, row: dict[str, Any], run_id: str, folder: Path
) -> dict[str, str]:
    """Make the version unless it is there already, and give it its alias."""
    from mlflow.exceptions import MlflowException

    tags = {
        "family": row["family"],
        "seed": str(row["seed"]),
        "weights_sha256": row["provenance"]["weights_sha256"],
        "data_sha256": row["provenance"]["data_sha256"],
        "features": row.get("features", "none"),
        "features_sha256": row.get("features_sha256", "none"),
        "protocol": str(row["protocol"]),
        "samples": str(row["samples"]),
        "score": leaderboard.score(row),
        leaderboard.score(row): repr(row[leaderboard.score(row)]),
    }
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = '{name}'"):
        if all(known.tags.get(tag) == value for tag, value in tags.items()):
            aliases = client.get_model_version(name, known.version).aliases
            return {"version": str(known.version), "alias": ", ".join(aliases), "reason": "known"}
    aliases = client.get_registered_model(name).aliases
    champion = None
    if "champion" in aliases:
        champion = client.get_model_version(name, aliases["champion"]).tags
    verdict = judge(tags, champion)
    uri = _log_model(run_id, row, folder)
    tags["reason"] = verdict.reason
    version = client.create_model_version(name, uri, run_id=run_id, tags=tags).version
    client.set_registered_model_alias(name, verdict.alias, version)
    described = f"{row['family']}: {verdict.alias}, {verdict.reason}."
    client.update_model_version(name, version, description=described)
    return {"version": str(version), "alias": verdict.alias, "reason": verdict.reason}


def _log_model(run_id: str, row: dict[str, Any], folder: Path) -> str:
    """Log the pyfunc to the family's run: code, safetensors, signature, example; its URI."""
    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    description, family = store.describe(folder), FAMILIES[row["family"]]
    data = DataSpec(**description["data"])
    kinds = {"label": "string", "text": "string", "source": "binary"}
    needed = family.conditions - {"label"}
    asked = [ColSpec(kinds[c], c, required=c in needed) for c in description["conditions"]]
    example = {"n": [4], **{c: [_example(c, data)] for c in description["conditions"]}}
    output = TensorSpec(np.dtype(np.uint8), (-1, *data.shape))
    if data.modality == "image":
        channels, height, width = data.shape
        output = TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))
    strings = Schema([ColSpec("string", "text")])
    common = [ParamSpec("seed", "long", 0), ParamSpec("temperature", "double", 1.0)]
    own = [ParamSpec(k, TYPES[type(v)], v) for k, v in description["options"].items()]
    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "n"), *asked]),
        outputs=strings if data.modality == "text" else Schema([output]),
        params=ParamSchema([*common, *own]),
    )
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    packages = (*REQUIREMENTS, *family.requirements)
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in packages]
    with (
        tempfile.TemporaryDirectory() as model,
        warnings.catch_warnings(),
        mlflow.start_run(run_id=run_id),
    ):
        warnings.simplefilter("ignore")
        for name in (store.CONFIG, store.WEIGHTS):
            shutil.copy(folder / name, model)
        info = mlflow.pyfunc.log_model(
            name=row["family"],
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"model": model},
            code_paths=[str(Path(store.__file__).parent)],
            signature=signature,
            input_example=pd.DataFrame(example),
            pip_requirements=versions,
        )
    return info.model_uri


def _example(condition: str, data: DataSpec) -> str | bytes:
    """A request's value for one condition, as it stands beside the registered model."""
    if condition == "label":
        return data.classes[0] if data.classes else data.attributes[0]
    if condition == "text":
        return "a"
    from PIL import Image

    assert data.source is not None
    channels, height, width = data.source.shape
    png = io.BytesIO()
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    Image.new(mode, (width, height)).save(png, format="png")
    return png.getvalue()


def main() -> None:
    arguments = stage.parser("register", __doc__)
    arguments.add_argument("--out", type=Path, default=Path("artifacts/registry.json"))
    args = arguments.parse_args()
    with stage.running("register"):
        for name, found in run(load_params(), args.out).items():
            print(f"{name} version {found['version']}: {found['alias']} ({found['reason']})")


if __name__ == "__main__":
    main()
