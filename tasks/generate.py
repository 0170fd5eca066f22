"""Samples of a registered model in bulk, drawn side by side on Ray, kept with DVC.

    python -m tasks.generate --settings '{"n": 10000, "labels": ["3", "7"]}'

`data/generated/<name>` gets `samples/*.parquet`, pictures of images, and `generated.json`. Slice k
is drawn with a seed made of `seed` and k: neither the number of workers nor their order matters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import dvc, jobs, packaging, stage, versions
from tasks.cluster import connected, families_at_once, worker_resources
from tasks.drawing import GenerateSettings, Request, checked, draw_slice, drawn, requests
from tasks.errors import BadInput
from tasks.invalid import first_line
from tasks.params import Params, load_params
from tasks.storing import Samples, Store

GENERATED = Path("data/generated")


def run(params: Params, settings: GenerateSettings, root: Path = GENERATED) -> dict[str, Any]:
    """Draw, write and keep the samples; returns what `generated.json` says.

    Raises BadInput for a model, a condition or an option that there is not.
    """
    if jobs.http_address(params.cluster):
        raise BadInput("cluster.address: generate cannot use Ray's Jobs API; give host:port")
    asked = list(requests(settings))
    uri = settings.model or f"{params.dataset.title}-generator"
    found = packaging.fetch(params, uri)
    uri = versions.spelled(params, uri)
    loaded = packaging.load(params, uri)
    given = {"seed": settings.seed, "temperature": settings.temperature, **settings.options}
    options = checked(loaded, uri, [request for request, _ in asked], given)
    for request, _ in asked:  # a condition that is not there is found before Ray starts
        drawn(loaded, uri, [{**request, "n": 0}], options)
    name = settings.name or f"{found.name or 'model'}-v{found.version or 0}-s{settings.seed}"
    fresh = root / f".{name}.new-{os.getpid()}"
    try:
        store = Store(fresh, settings.n * len(asked))
        for samples, told in _slices(params, found.path, uri, asked, options, settings):
            store.add(samples, told)
            print(f"{store.written:,}/{settings.n * len(asked):,} samples", flush=True)
        store.close()
        facts = {
            "model": uri,
            **{k: str(v) for k, v in asdict(found).items() if k != "path" and v is not None},
            "settings": settings.model_dump(mode="json"),
            "samples": store.written,
            "parts": store.parts,
        }
        (fresh / "generated.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(root / name, ignore_errors=True)
        fresh.rename(root / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return {**facts, "folder": str(root / name), "dvc": str(dvc.add(root / name))}


def slice_seed(seed: int, number: int) -> int:
    """The seed of slice `number`: far from its neighbours', and the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7])


def _slices(
    params: Params,
    folder: Path,
    uri: str,
    asked: list[tuple[Request, dict[str, str]]],
    options: dict[str, Any],
    settings: GenerateSettings,
) -> Iterator[tuple[Samples, dict[str, str]]]:
    """The slices in their order, drawn on as many workers as there is room for; no more than
    twice as many lie in memory."""
    with connected(params.cluster):
        import ray

        room = families_at_once(params.cluster) * params.cluster.fewest
        need = worker_resources(params.cluster)
        task = ray.remote(num_cpus=need["CPU"], num_gpus=need["GPU"])(draw_slice)
        plan = [
            ({**request, "n": min(settings.batch, settings.n - start)}, told)
            for request, told in asked
            for start in range(0, settings.n, settings.batch)
        ]
        running: list[tuple[Any, dict[str, str]]] = []
        for number, (request, told) in enumerate(plan):
            seeded = {**options, "seed": slice_seed(settings.seed, number)}
            words = (str(folder), uri, request, seeded, params.cluster.cpus_per_worker)
            running.append((task.remote(*words), told))
            if len(running) >= 2 * room:
                yield _result(*running.pop(0))
        while running:
            yield _result(*running.pop(0))


def _result(future: Any, told: dict[str, str]) -> tuple[Samples, dict[str, str]]:
    import ray

    try:
        return ray.get(future), told
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, BadInput) else error)


def main() -> None:
    arguments = stage.parser("generate", __doc__)
    arguments.add_argument("--settings", default="{}", help="GenerateSettings as JSON")
    args = arguments.parse_args()
    with stage.running("generate"):
        try:
            settings = GenerateSettings.model_validate_json(args.settings)
        except ValidationError as error:
            raise BadInput(f"--settings: {first_line(error, GenerateSettings)}") from error
        done = run(load_params(), settings)
        print(f"{done['samples']:,} samples in {done['folder']}; git add {done['dvc']}")


if __name__ == "__main__":
    main()
