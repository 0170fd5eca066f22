"""Stage `register`: models to the MLflow registry, champions through the gate.

    python -m tasks.register

`<dataset>-<family>` gets a version for every newly trained family, `<dataset>-generator` one
for the best of them all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import FAMILIES
from tasks import lineage, packaging, stage, tracking, versions
from tasks.errors import Outage
from tasks.params import Params, load_params
from tasks.registry import judge
from tasks.reporting import leaderboard
from tasks.runs import Run


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
        model = functools.cache(functools.partial(_model, client, params, row, run_id, folder))
        about = {
            **lineage.version_tags(lineage.read(folder)),
            "evaluation": params.evaluation.model_dump_json(),
        }
        for name in names:
            done[name] = _version(client, name, row, run_id, about, model)
    return done


def _model(client: Any, params: Params, row: dict[str, Any], run_id: str, folder: Path) -> str:
    """Log the model to its run, at its checkpoint's step, with what was measured; its id."""
    step = row["provenance"]["best_step"]
    model_id = packaging.log_model(run_id, row["family"], folder, step)
    lineage.send_measured(client, run_id, row, model_id, params.dataset.title)
    return model_id


def _version(
    client: Any,
    name: str,
    row: dict[str, Any],
    run_id: str,
    about: dict[str, str],
    model: Callable[[], str],
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
        client.create_registered_model(name, description=versions.about(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    same = (it for it in versions.of(client, name) if tags.items() <= it.tags.items())
    known = next(same, None)
    if known is not None:
        aliases = client.get_model_version(name, known.version).aliases
        if aliases or "reason" in known.tags:  # neither: cut off before it was judged
            alias = ", ".join(aliases)
            return {"version": str(known.version), "alias": alias, "reason": "known"}
    aliases = client.get_registered_model(name).aliases
    champion = None
    if versions.CHAMPION in aliases:
        champion = client.get_model_version(name, aliases[versions.CHAMPION]).tags
    verdict = judge(tags, champion)
    if known is None:
        model_id = model()
        known = client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, tags=tags | about, model_id=model_id
        )
    version = str(known.version)
    versions.award(client, name, version, verdict.alias, verdict.reason)
    return {"version": version, "alias": verdict.alias, "reason": verdict.reason}


def main() -> None:
    arguments = stage.parser("register", __doc__)
    arguments.add_argument("--out", type=Path, default=Path("artifacts/registry.json"))
    args = arguments.parse_args()
    with stage.running("register"):
        for name, found in run(load_params(), args.out).items():
            print(f"{name} version {found['version']}: {found['alias']} ({found['reason']})")


if __name__ == "__main__":
    main()
