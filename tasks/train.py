"""Stage `train`: train one family on Ray Train and export its best checkpoint.

python -m tasks.train vae --seed 0
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import models
from models import store
from tasks import lineage, stage
from tasks.data import shards
from tasks.params import Params, load_params
from tasks.runs import Run
from tasks.tracking import TrainingRun
from tasks.training.candidates import load_best
from tasks.training.checks import check
from tasks.training.dispatch import on_cluster
from tasks.training.history import HISTORY, read_history, write_history
from tasks.training.turns import NonFiniteLoss
from tasks.training.validation import PICTURES
from tasks.training.watch import Watch
from tasks.training.worker import CHECKPOINTS, FAILURES

SHARED = ("base", "config", "data", "noise", "nn", "adversarial", "attention", "decoder", "unet")
JUDGES = (
    "classifier",
    "conditions",
    "features",
    "fidelity",
    "manifold",
    "reconstruction",
    "translation",
)


def run(which: Run, params: Params, prepared: Path, classifier: Path, out: Path) -> dict[str, Any]:
    """Train a family and write model, history and cost to `out`; returns `train.json`.

    Resumes by itself where an earlier call with the same code, data and parameters was cut off.
    """
    manifest = shards.read_manifest(prepared)
    family = which.family
    check(family, params, manifest)
    spec = {
        "family": family,
        "config": params.models[family].model_dump(mode="json"),
        "data": manifest["spec"],
        "train": {**params.train.model_dump(mode="json"), "seed": which.seed},
        "prepared": str(prepared.absolute()),
        "classifier": str(classifier.absolute()),
    }
    weights = store.file_sha256(classifier / "classifier.safetensors")
    key = _key(spec, manifest["content_sha256"] + weights)
    work = Path(params.cluster.storage).absolute() / "work" / f"{which.name}-{key}"
    work.mkdir(parents=True, exist_ok=True)
    spec["directory"] = str(work)
    identity = work / "identity"  # of this very training, in MLflow too; survives a resume
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    token = identity.read_text()
    came_from = lineage.record(work, params, manifest)
    tracked = TrainingRun(params, which, manifest, token, work)
    watch = Watch(work, params.train.budget, tracked)
    trainings = len(params.families) * len(params.seeds)
    try:
        outcome = on_cluster(params, spec, trainings, watch)
    except BaseException as error:  # Interrupted among them: it is no Exception
        tracked.stop("KILLED" if isinstance(error, SystemExit) else "FAILED")
        raise
    if "error" in outcome:
        tracked.stop("FAILED")
        failure = FAILURES[outcome["error"]["kind"]]
        if failure is NonFiniteLoss:  # it would resume to the same end
            shutil.rmtree(work)
        raise failure(outcome["error"]["message"])
    facts = _export(work, out, spec, outcome)
    facts |= {"budget": str(params.train.budget), "key": token}
    facts |= {"data_sha256": manifest["content_sha256"], "git": lineage.told(came_from)}
    (out / "train.json").write_text(json.dumps(facts, indent=2) + "\n")
    tracked.finish(out)
    shutil.rmtree(work, ignore_errors=True)
    return facts


def _export(work: Path, out: Path, spec: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    """The best checkpoint and the history, to `out`; returns the costs."""
    shutil.rmtree(out, ignore_errors=True)
    model = store.build(spec["family"], spec["config"], spec["data"])
    store.save(out, model, spec["family"], load_best(work / CHECKPOINTS))
    write_history(out / HISTORY, read_history(work / HISTORY))
    for folder in (PICTURES, lineage.PROJECT):
        shutil.copytree(work / folder, out / folder)
    progress = outcome["progress"]
    counted = {} if progress["flops"] is None else {"train_flops": float(progress["flops"])}
    return {
        "train_steps": progress["step"],
        "train_images": progress["images"],
        **counted,
        "train_seconds": progress["seconds"],
        "train_images_per_second": progress["images"] / progress["seconds"],
        "best_step": outcome["best_step"],
        "best_score": outcome["best_score"],
        "resumed_from": outcome["resumed_from"],
        "peak_memory_mb": outcome["peak_memory_mb"],
        "parameters": outcome["parameters"],
        "hardware": outcome["hardware"],
        "workers": outcome["workers"],
        "precision": outcome["precision"],
        "data": outcome["data"],
    }


def _key(spec: dict[str, Any], data_sha256: str) -> str:
    """Identity of a training: its parameters, its data and the code that runs it."""
    here, families = Path(__file__).parent, Path(models.__file__).parent
    own = sorted((families / spec["family"]).glob("*.py"))
    code = [*own, *(families / f"{name}.py" for name in SHARED)]
    digest = hashlib.sha256(data_sha256.encode())
    judges = [here / "evaluation" / f"{n}.py" for n in JUDGES]
    for file in [*code, *judges, *sorted((here / "training").glob("*.py"))]:
        digest.update(file.read_bytes())
    known = {name: spec[name] for name in ("family", "config", "data")}
    # where the data lies changes nothing: what memory could not hold goes on as a stream
    known["train"] = {name: value for name, value in spec["train"].items() if name != "data"}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def main() -> None:
    arguments = stage.run_parser("train", __doc__)
    arguments.add_argument("--out", type=Path, help="default: artifacts/train/FAMILY-SEED")
    args = arguments.parse_args()
    which = Run(args.family, args.seed)
    with stage.running("train", which):
        out = args.out or which.trained
        facts = run(which, load_params(), args.prepared, args.classifier, out)
        print(f"best at step {facts['best_step']:,}; {facts['train_seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
