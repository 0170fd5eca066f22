"""Stage `evaluate`: measure one trained family on the test split, on Ray.

python -m tasks.evaluate vae
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from models import store
from tasks import stage, tracking
from tasks.cluster import connected, families_at_once, worker_resources
from tasks.data import shards
from tasks.errors import BadInput
from tasks.params import EvaluationConfig, Params, load_params
from tasks.reporting import leaderboard

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
)


def run(
    family: str,
    params: Params,
    prepared: Path,
    classifier: Path,
    trained: Path,
    out: Path,
    metrics_file: Path,
) -> dict[str, Any]:
    """Measure the model in `trained`; pictures go to `out`, numbers to `metrics_file`."""
    folders = [str(p.absolute()) for p in (prepared, classifier, trained, out)]
    with connected(params.cluster):
        import ray

        families_at_once(params.cluster)
        resources = worker_resources(params.cluster)
        task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources["GPU"])(measure_folder)
        threads = params.cluster.cpus_per_worker
        gpu = resources["GPU"] > 0
        try:
            result = ray.get(task.remote(params.evaluation, *folders, threads, gpu, time.time()))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BadInput):
                raise error.cause from None
            raise
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
    metrics = {"family": family, "dataset": params.dataset.name, **result["metrics"], **costs}
    metrics |= {"provenance": provenance, "not_applicable": reasons}
    metrics["protocol"] = result["protocol"]
    metrics_file.parent.mkdir(exist_ok=True)
    metrics_file.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    tracking.tolerant("logging metrics", lambda: _track(params, family, metrics, trained, out))
    return metrics


def measure_folder(
    config: EvaluationConfig,
    prepared: str,
    classifier: str,
    trained: str,
    out: str,
    threads: int,
    gpu: bool,
    started: float,
) -> dict[str, Any]:
    """Runs on a Ray worker: load, measure, write the pictures, return the numbers."""
    import torch

    from tasks.evaluation import classifier as judges
    from tasks.evaluation import features, pictures, protocol

    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    model = store.load(Path(trained)).to(device)
    torch.manual_seed(config.seed)
    untrained = store.build(**store.recipe(Path(trained))).to(device).eval()
    levels = model.data.levels
    extractor = judge = None
    if model.data.modality == "image":
        judge = judges.load(Path(classifier))
        if config.features == "classifier":
            extractor = features.classifier_features(Path(classifier), device)
        else:
            extractor = features.inception_features(config.inception_weights, levels, device)
    train, validation, test = (shards.read_split(Path(prepared), s) for s in shards.SPLITS)
    yardstick = protocol.Yardstick(
        train=train.x,
        validation=validation.x,
        test=test,
        extractor=extractor,
        judge=judge,
        entropy=shards.read_manifest(Path(prepared))["truth"].get("entropy_nats"),
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
        seed=config.seed,
        say=lambda text: print(f"{text}  ({time.time() - started:.0f} s)", flush=True),
    )
    pictures.draw(Path(out), found, model, yardstick.test)
    return {
        "metrics": found.metrics,
        "not_applicable": found.not_applicable,
        "protocol": protocol.PROTOCOL_VERSION,
    }


def _track(params: Params, family: str, metrics: dict[str, Any], trained: Path, out: Path) -> None:
    client = tracking.connect(params)
    run_id = tracking.run_of(client, params, family, trained)
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            client.log_metric(run_id, name, float(value))
        elif isinstance(value, str):
            client.set_tag(run_id, name, value)
    client.log_artifacts(run_id, str(out), "evaluation")


def main() -> None:
    arguments = stage.parser("evaluate", __doc__)
    arguments.add_argument("family")
    arguments.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    arguments.add_argument("--classifier", type=Path, default=Path("artifacts/classifier"))
    args = arguments.parse_args()
    with stage.running("evaluate", args.family):
        metrics = run(
            args.family,
            load_params(),
            args.prepared,
            args.classifier,
            Path("artifacts/train", args.family),
            Path("artifacts/evaluate", args.family),
            Path("metrics", f"{args.family}.json"),
        )
        name = leaderboard.score(metrics)
        floor = metrics.get(f"{name}_floor")
        told = "" if floor is None else f" (floor {floor:.2f})"
        print(f"{leaderboard.SCORES[name]} {metrics[name]:.3f}{told}")


if __name__ == "__main__":
    main()
