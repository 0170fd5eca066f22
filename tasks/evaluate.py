"""Stage `evaluate`: measure one trained family on the test split, on Ray.

python -m tasks.evaluate vae --seed 0
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from models import store
from tasks import lineage, stage, tracking
from tasks.data import shards
from tasks.environment import use_threads
from tasks.jobs import Output, on_worker
from tasks.params import EvaluationConfig, Params, load_params
from tasks.reporting import leaderboard, table
from tasks.runs import Run

COSTS = (
    "budget",
    "train_steps",
    "train_images",
    "train_flops",
    "train_seconds",
    "train_images_per_second",
    "peak_memory_mb",
    "parameters",
    "hardware",
    "git",
)


def run(
    which: Run,
    params: Params,
    prepared: Path,
    classifier: Path,
    features: Path,
    trained: Path,
    out: Path,
    metrics_file: Path,
) -> dict[str, Any]:
    """Measure the model in `trained`; pictures go to `out`, numbers to `metrics_file`."""
    code = Path(params.evaluation.features_code)
    folders = (prepared, classifier, features, trained, Output(out), code)
    result = on_worker(params.cluster, measure_folder, params.evaluation, *folders)
    facts = json.loads((trained / "train.json").read_text())
    costs = {name: facts[name] for name in COSTS if name in facts}
    reasons = result["not_applicable"]
    if "train_flops" not in facts:
        reasons["train_flops"] = "the family is fitted, not descended: its work is not counted"
    provenance = {
        "data_sha256": facts["data_sha256"],
        "weights_sha256": store.describe(trained)["weights_sha256"],
        "steps": facts["train_steps"],
        "best_step": facts["best_step"],
    }
    metrics = {"family": which.family, "seed": which.seed, "dataset": params.dataset.name}
    metrics |= {**result["metrics"], **costs}
    metrics |= {"provenance": provenance, "not_applicable": reasons}
    metrics["protocol"] = result["protocol"]
    metrics_file.parent.mkdir(exist_ok=True)
    metrics_file.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    tracking.tolerant("logging metrics", lambda: _track(params, which, metrics, trained, out))
    return metrics


def measure_folder(
    config: EvaluationConfig,
    prepared: str,
    classifier: str,
    features: str,
    trained: str,
    out: str,
    code: str,
    threads: int,
    gpu: bool,
) -> dict[str, Any]:
    """Runs on a Ray worker: load, measure, write the pictures, return the numbers."""
    import torch

    from tasks.evaluation import classifier as judges
    from tasks.evaluation import extractors, pictures, protocol, real

    started = time.time()
    use_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    model = store.load(Path(trained)).to(device)
    torch.manual_seed(config.seed)
    untrained = store.build(**store.recipe(Path(trained))).to(device).eval()
    manifest = shards.read_manifest(Path(prepared))
    extractor = judge = stored = None
    if model.data.modality == "image":
        judge = judges.load(Path(classifier))
        extractor = extractors.build(
            config.features, config.inception_weights, code, Path(classifier), model.data, device
        )
        judge_sha256 = store.file_sha256(Path(classifier) / judges.WEIGHTS)
        stored = real.load(Path(features), extractor, manifest["content_sha256"], judge_sha256)
    train, validation, test = (shards.read_split(Path(prepared), s) for s in shards.SPLITS)
    yardstick = protocol.Yardstick(
        train=train,
        validation=validation.x,
        test=test,
        extractor=extractor,
        real=stored,
        judge=judge,
        entropy=manifest["truth"].get("entropy_nats"),
    )
    found = protocol.measure(
        model,
        untrained,
        yardstick,
        samples=config.samples,
        batch_size=config.batch_size,
        likelihood_examples=config.likelihood_examples,
        likelihood_draws=config.likelihood_draws.model_dump(),
        anomaly_images=config.anomaly_images,
        ais=config.ais,
        reconstruction_images=config.reconstruction_images,
        usefulness=config.usefulness,
        seed=config.seed,
        say=lambda text: print(f"{text}  ({time.time() - started:.0f} s)", flush=True),
    )
    pictures.draw(Path(out), found, model, yardstick.test)
    return {
        "metrics": found.metrics,
        "not_applicable": found.not_applicable,
        "protocol": protocol.PROTOCOL_VERSION,
    }


def _track(params: Params, which: Run, metrics: dict[str, Any], trained: Path, out: Path) -> None:
    client = tracking.connect(params)
    run_id = tracking.run_of(client, params, which, trained)
    lineage.send_measured(client, run_id, metrics)
    client.log_artifacts(run_id, str(out), "evaluation")


def _told(metrics: dict[str, Any]) -> str:
    name = leaderboard.score(metrics)
    if not name:
        return "; ".join(f"no {key}: {why}" for key, why in metrics["not_applicable"].items())
    floor = metrics.get(f"{name}_floor")
    beside = "" if floor is None else f" (floor {floor:.2f})"
    return f"{leaderboard.SCORES[name]} {metrics[name]:.3f}{beside}"


def main() -> None:
    arguments = stage.run_parser("evaluate", __doc__)
    arguments.add_argument("--features", type=Path, default=Path("artifacts/features"))
    args = arguments.parse_args()
    which = Run(args.family, args.seed)
    with stage.running("evaluate", which):
        metrics = run(
            which,
            load_params(),
            args.prepared,
            args.classifier,
            args.features,
            which.trained,
            which.evaluated,
            which.metrics,
        )
        for warning in table.warnings(metrics):
            print(warning)
        print(_told(metrics))


if __name__ == "__main__":
    main()
