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
from models import FAMILIES, store
from models.base import DataSpec
from tasks import stage
from tasks.cluster import connected
from tasks.data import shards
from tasks.errors import BadInput
from tasks.params import Params, load_params
from tasks.provenance import git_state
from tasks.runs import Run
from tasks.tracking import TrainingRun
from tasks.training.checkpoint import load_best
from tasks.training.data import check_batch
from tasks.training.launch import launch
from tasks.training.loop import NonFiniteLoss
from tasks.training.watch import Watch
from tasks.training.worker import HISTORY, OUTCOME, PICTURES

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
    _check(family, params, manifest)
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
    (work / OUTCOME).unlink(missing_ok=True)
    identity = work / "identity"  # of this very training, in MLflow too; survives a resume
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    token = identity.read_text()
    tracked = TrainingRun(params, which, manifest, token, work)
    watch = Watch(work, params.train.budget, tracked)
    with connected(params.cluster):
        launch(spec, params.cluster, params.train.max_failures, watch)
    outcome = json.loads((work / OUTCOME).read_text())
    if "error" in outcome:
        shutil.rmtree(work)
        raise NonFiniteLoss(outcome["error"])
    facts = _export(work, out, spec, outcome, token, manifest["content_sha256"])
    tracked.finish(out)
    shutil.rmtree(work, ignore_errors=True)
    return facts


def _check(family: str, params: Params, manifest: dict[str, Any]) -> None:
    """Refuse, before anything starts, what could only fail in the workers."""
    try:
        check_batch(manifest["counts"]["train"], params.train.batch_size, params.cluster.workers)
    except ValueError as error:
        raise BadInput(str(error)) from error
    data, select = DataSpec(**manifest["spec"]), params.train.select
    reason = FAMILIES[family].unsuited(data)
    if reason:
        raise BadInput(f"{family} cannot learn from this data: {reason}")
    try:  # some only notice when they are built (conditional without classes)
        FAMILIES[family](params.models[family], data)
    except ValueError as error:
        raise BadInput(f"{family} cannot be built for this data: {error}") from error
    if select == "frechet_distance" and data.modality != "image":
        raise BadInput(
            f"train.select: frechet_distance is for images, not {data.modality}; use auto"
        )
    if select == "bits_per_dim" and FAMILIES[family].likelihood == "none":
        raise BadInput(f"train.select: bits_per_dim, but {family} has no likelihood; use auto")
    translates = "source" in FAMILIES[family].conditions and data.source and data.source.truth
    if select in ("psnr", "perceptual_distance") and not translates:
        raise BadInput(f"train.select: {select}, but {family} translates no known pair; use auto")


def _export(
    work: Path, out: Path, spec: dict[str, Any], outcome: dict[str, Any], key: str, data_sha256: str
) -> dict[str, Any]:
    """The best checkpoint, the history and the costs, to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    model = store.build(spec["family"], spec["config"], spec["data"])
    store.save(out, model, spec["family"], load_best(work / "checkpoints"))
    shutil.copy(work / HISTORY, out / HISTORY)
    shutil.copytree(work / PICTURES, out / PICTURES)
    progress = outcome["progress"]
    facts = {
        "steps": progress["step"],
        "resumed_from": outcome["resumed_from"],
        "best_step": progress["best_step"],
        "best_score": progress["best_score"],
        "train_seconds": progress["seconds"],
        "train_images_per_second": outcome["images"] / progress["seconds"],
        "peak_memory_mb": outcome["peak_memory_mb"],
        "parameters": outcome["parameters"],
        "hardware": outcome["hardware"],
        "workers": outcome["workers"],
        "precision": outcome["precision"],
        "key": key,
        "data_sha256": data_sha256,
        "git": git_state(),
    }
    (out / "train.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _key(spec: dict[str, Any], data_sha256: str) -> str:
    """Identity of a training: its parameters, its data and the code that runs it."""
    here = Path(__file__).parent
    family_file = Path(models.__file__).parent / f"{spec['family']}.py"
    shared = ("base.py", "nn.py", "adversarial.py", "attention.py", "unet.py")
    code = [family_file, *(family_file.with_name(n) for n in shared)]
    digest = hashlib.sha256(data_sha256.encode())
    judges = [here / "evaluation" / f"{n}.py" for n in JUDGES]
    for file in [*code, *judges, *sorted((here / "training").glob("*.py"))]:
        digest.update(file.read_bytes())
    known = {name: spec[name] for name in ("family", "config", "data", "train")}
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
