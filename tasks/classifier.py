"""Stage `classifier`: train the network whose features measure fidelity.

python -m tasks.classifier --out artifacts/classifier
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from models.data import DataSpec
from tasks import stage
from tasks.data import shards
from tasks.evaluation import classifier
from tasks.params import ClassifierConfig, load_params

THREADS = 2  # always: sums over other thread counts would give the features another hash


def run(config: ClassifierConfig, prepared: Path, out: Path) -> dict[str, object]:
    """Train on the train split of `prepared` and write to `out`; returns what it measured."""
    torch.set_num_threads(THREADS)
    spec = DataSpec(**shards.read_manifest(prepared)["spec"])
    if spec.modality != "image":
        return classifier.save_none(out, spec)
    splits = {name: _tensors(prepared, name) for name in shards.SPLITS}
    per_epoch = max(len(splits["train"][0]) // config.batch_size, 1)
    steps = min(config.epochs * per_epoch, config.max_steps)
    begun = shown = time.monotonic()

    def progress(step: int, loss: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2 or step == steps:
            shown = time.monotonic()
            left = (shown - begun) / step * (steps - step)
            print(f"step {step:,}/{steps:,}  loss {loss:.3f}  ETA {left:.0f} s", flush=True)

    model = classifier.fit(
        spec,
        *splits["train"],
        width=config.width,
        features=config.features,
        steps=steps,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        on_step=progress,
    )
    facts: dict[str, object] = {"width": config.width, "features": config.features, "steps": steps}
    for name, (x, label) in splits.items():
        facts[f"{name}_accuracy"] = round(classifier.accuracy(model, x, label), 5)
    return classifier.save(out, model, facts)


def _tensors(prepared: Path, split: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, label, *_ = shards.read_split(prepared, split)
    return torch.from_numpy(x), None if label is None else torch.from_numpy(label)


def main() -> None:
    arguments = stage.parser("classifier", __doc__)
    arguments.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    arguments.add_argument("--out", type=Path, default=Path("artifacts/classifier"))
    args = arguments.parse_args()
    with stage.running("classifier"):
        facts = run(load_params().classifier, args.prepared, args.out)
        if facts["task"] == "none":
            print("not needed: these are no images")
        else:
            print(f"test accuracy {facts['test_accuracy']:.2%}")


if __name__ == "__main__":
    main()
