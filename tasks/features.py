"""Stage `features`: what is computed of the real images once, for all families, on Ray.

python -m tasks.features --out artifacts/features
python -m tasks.features --download-inception    # once, where inception-v3's weights are missing
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.data import PLURALS, DataSpec
from models.store import file_sha256
from tasks import stage
from tasks.data import shards
from tasks.environment import use_threads
from tasks.jobs import Output, on_worker
from tasks.params import EvaluationConfig, Params, load_params


def run(params: Params, prepared: Path, classifier: Path, out: Path) -> dict[str, Any]:
    """Features of every split of `prepared` to `out`; returns what stands in `features.json`."""
    from tasks.evaluation import real

    manifest = shards.read_manifest(prepared)
    modality = DataSpec(**manifest["spec"]).modality
    if modality != "image":  # not worth starting Ray for
        reason = f"there are no features of {PLURALS[modality]}"
        return real.save_none(out, reason, manifest["content_sha256"])
    code = Path(params.evaluation.features_code)
    folders = (prepared, classifier, Output(out), code)
    return on_worker(params.cluster, compute_folder, params.evaluation, *folders)


def compute_folder(
    config: EvaluationConfig,
    prepared: str,
    classifier: str,
    out: str,
    code: str,
    threads: int,
    gpu: bool,
) -> dict[str, Any]:
    """Runs on a Ray worker: load, compute, write."""
    import torch

    from tasks.evaluation import classifier as judges
    from tasks.evaluation import extractors, real

    use_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    manifest = shards.read_manifest(Path(prepared))
    judge = judges.load(Path(classifier))
    extractor = extractors.build(
        config.features, config.inception_weights, code, Path(classifier), judge.spec, device
    )
    splits = {name: shards.each_image_block(Path(prepared), name) for name in shards.SPLITS}
    found = real.compute(extractor, judge, splits, config.samples)
    judge_sha256 = file_sha256(Path(classifier) / judges.WEIGHTS)
    return real.save(Path(out), found, extractor, manifest["content_sha256"], judge_sha256)


def main() -> None:
    arguments = stage.parser("features", __doc__)
    arguments.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    arguments.add_argument("--classifier", type=Path, default=Path("artifacts/classifier"))
    arguments.add_argument("--out", type=Path, default=Path("artifacts/features"))
    arguments.add_argument(
        "--download-inception",
        action="store_true",
        help="only fetch inception-v3's weights into torch-fidelity's cache; no stage ever does",
    )
    args = arguments.parse_args()
    with stage.running("features"):
        if args.download_inception:
            from tasks.evaluation import extractors

            print(extractors.download_inception())
            return
        facts = run(load_params(), args.prepared, args.classifier, args.out)
        if facts["name"] == "none":
            print(f"not needed: {facts['reason']}")
        else:
            print(f"{facts['name']}: {facts['dimensions']:,} features, {facts['sha256'][:12]}")


if __name__ == "__main__":
    main()
