"""Stage `train`: train one family on Ray Train and export its best checkpoint.

python -m tasks.train vae
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import models
from models import FAMILIES, store
from tasks import stage
from tasks.cluster import connected
from tasks.data import shards
from tasks.errors import BadInput, nearest
from tasks.params import Params, load_params
from tasks.tracking import TrainingRun
from tasks.training.checkpoint import load_best
from tasks.training.launch import launch
from tasks.training.worker import HISTORY, OUTCOME, PICTURES, read_history


def run(family: str, params: Params, prepared: Path, classifier: Path, out: Path) -> dict[str, Any]:
    """Train `family` and write model, history and cost to `out`; returns `train.json`.

    Resumes by itself where an earlier call with the same code, data and parameters was cut off.
    """
    manifest = shards.read_manifest(prepared)
    spec = {
        "family": family,
        "config": params.models[family].model_dump(mode="json"),
        "data": manifest["spec"],
        "train": params.train.model_dump(mode="json"),
        "prepared": str(prepared.absolute()),
        "classifier": str(classifier.absolute()),
    }
    key = _key(spec, manifest["content_sha256"])
    work = Path(params.cluster.storage).absolute() / "work" / f"{family}-{key}"
    work.mkdir(parents=True, exist_ok=True)
    spec["directory"] = str(work)
    tracked = TrainingRun(params, family, manifest, key, work)
    watch = _Watch(work, params, tracked)
    with connected(params.cluster):
        launch(spec, params.cluster, params.train.max_failures, watch)
    outcome = json.loads((work / OUTCOME).read_text())
    facts = _export(work, out, spec, outcome, key, manifest["content_sha256"])
    tracked.finish(out)
    shutil.rmtree(work)
    return facts


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
    images = progress["step"] * spec["train"]["batch_size"]
    facts = {
        "steps": progress["step"],
        "resumed_from": outcome["resumed_from"],
        "best_step": progress["best_step"],
        "train_seconds": progress["seconds"],
        "train_images_per_second": images / progress["seconds"],
        "peak_memory_mb": outcome["peak_memory_mb"],
        "parameters": outcome["parameters"],
        "hardware": outcome["hardware"],
        "workers": outcome["workers"],
        "key": key,
        "data_sha256": data_sha256,
    }
    (out / "train.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _key(spec: dict[str, Any], data_sha256: str) -> str:
    """Identity of a training: its parameters, its data and the code that runs it."""
    here = Path(__file__).parent
    family_file = Path(models.__file__).parent / f"{spec['family']}.py"
    code = [family_file, *(family_file.with_name(n) for n in ("base.py", "nn.py"))]
    digest = hashlib.sha256(data_sha256.encode())
    for file in [*code, *sorted((here / "training").glob("*.py"))]:
        digest.update(file.read_bytes())
    known = {name: spec[name] for name in ("family", "config", "data", "train")}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()[:12]


class _Watch:
    """Reads what the first worker writes: a progress line now and then, and MLflow's share."""

    def __init__(self, work: Path, params: Params, tracked: TrainingRun) -> None:
        self.path, self.budget, self.tracked = work / HISTORY, params.train.budget, tracked
        self.shown, self.step = 0.0, -1

    def __call__(self) -> None:
        records = read_history(self.path)
        if not records or records[-1]["step"] == self.step:
            return
        self.tracked.deliver(records)
        if time.monotonic() - self.shown < 2 and not self._share(records[-1]) >= 1:
            return
        self.shown, self.step = time.monotonic(), records[-1]["step"]
        print(self._line(records), flush=True)

    def _share(self, record: dict[str, Any]) -> float:
        if self.budget.steps is not None:
            return record["step"] / self.budget.steps
        assert self.budget.minutes is not None
        return record["seconds"] / (60 * self.budget.minutes)

    def _line(self, records: list[dict[str, Any]]) -> str:
        last = records[-1]
        share = min(self._share(last), 1.0)
        left = last["seconds"] * (1 - share) / max(share, 1e-9)
        losses = "  ".join(
            f"{name.removesuffix('/loss')} loss {value:.3f}"
            for name, value in last.items()
            if name.endswith("/loss")
        )
        checked: dict[str, Any] = next(
            (r for r in reversed(records) if "validation/score" in r), {}
        )
        found = "  ".join(
            f"{name.split('/')[1]} {checked[name]:.3f}"
            for name in ("validation/bits_per_dim", "validation/frechet_distance")
            if name in checked
        )
        total = f"/{self.budget.steps:,}" if self.budget.steps else ""
        speed = f"{last['images_per_second']:,.0f} images/s"
        eta = f"ETA {int(left // 60)}:{int(left % 60):02d}"
        return f"step {last['step']:,}{total} ({share:.0%})  {losses}  {found}  {speed}  {eta}"


def main() -> None:
    arguments = stage.parser("train", __doc__)
    arguments.add_argument("family")
    arguments.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    arguments.add_argument("--classifier", type=Path, default=Path("artifacts/classifier"))
    arguments.add_argument("--out", type=Path, help="default: artifacts/train/FAMILY")
    args = arguments.parse_args()
    with stage.running("train", args.family):
        params = load_params()
        if args.family not in FAMILIES:
            raise BadInput(f"unknown family '{args.family}'{nearest(args.family, FAMILIES)}")
        out = args.out or Path("artifacts/train", args.family)
        facts = run(args.family, params, args.prepared, args.classifier, out)
        print(f"best at step {facts['best_step']:,}; {facts['train_seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
