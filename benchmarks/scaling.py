"""Weak scaling: 1, 2 and 4 Ray Train workers of one thread, a fixed batch for each.

    .venv/bin/python -m benchmarks.scaling --json scaling.json
    .venv/bin/python -m benchmarks.scaling --cases vae --workers 1 2 --rounds 1
    .venv/bin/python -m benchmarks.scaling --measured scaling.json --json again.json

Workers are launched as the pipeline launches them, on the digits, the counts in turns. Where there
are fewer cores than workers they share them, so efficiency is that of the cores: images/s over
min(workers, cores) times those of one worker. In the file beside it: the parts of a step, each
measured on its own (`scaling_parts`), the cost model fitted to them, and how far its steps are from
the measured ones (`scaling_check`). `benchmarks.gpus` extrapolates.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pairs import Row, alternate, arguments, report
from benchmarks.scaling_check import check, gradients
from benchmarks.scaling_parts import CASES, EVERY, parts, training
from tasks import classifier, prepare
from tasks.cluster import connected
from tasks.data.config import DatasetConfig
from tasks.data.shards import read_manifest
from tasks.environment import prepare_environment
from tasks.params import ClassifierConfig, ClusterConfig
from tasks.training.worker import CHECKPOINTS

GOAL = 0.8  # of the cores' efficiency
CORES = os.cpu_count() or 1


def lay_out(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The digits and a classifier for the validation at the end of a run; what all runs share."""
    prepare.run(DatasetConfig(), root / "prepared")
    quick = ClassifierConfig(epochs=1, max_steps=20)
    classifier.run(quick, root / "prepared", root / "classifier")
    return {
        "data": read_manifest(root / "prepared")["spec"],
        "prepared": str(root / "prepared"),
        "classifier": str(root / "classifier"),
        "batch": options.batch,
        "seconds": options.seconds,
    }


def launched(case: str, workers: int, spec: dict[str, Any], address: str, log: list[Any]) -> float:
    """Images per second of a training by so many Ray workers; notes its other times in `log`."""
    from tasks.training.launch import launch

    family, config = CASES[case]
    settings = training(spec["batch"] * workers, spec["steps"][case]).model_copy(
        update={"validation": "synchronous", "validation_images": 16, "validation_samples": 16}
    )
    with tempfile.TemporaryDirectory() as folder:
        given = {**spec, "family": family, "config": config, "directory": folder}
        given["train"] = settings.model_dump(mode="json")
        entered: list[float] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                if (Path(folder) / CHECKPOINTS).exists():  # the loop makes it first of all
                    entered.append(time.perf_counter())
                    return

        watcher = threading.Thread(target=watch)
        begun = time.perf_counter()
        watcher.start()
        try:
            cluster = ClusterConfig(address=address, workers=workers, gpus_per_worker=0)
            outcome = launch(given, cluster, 0, lambda: None)
        finally:
            over.set()
            watcher.join()
        whole = time.perf_counter() - begun
        if "error" in outcome:
            raise SystemExit(outcome["error"]["message"])
        lines = (Path(folder) / "history.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "images_per_second" in r]
    first, last = records[0], records[-1]
    seconds = last["seconds"] - first["seconds"]
    log.append({"case": case, "workers": workers, "start_s": entered[0] - begun, "whole_s": whole})
    log[-1] |= {"steps_s": last["seconds"], "step_ms": 1000 * seconds / (len(records) - 1) / EVERY}
    return (last["images"] - first["images"]) / seconds


def ray_runs(spec: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    """Every run's times, in the order of the rounds."""
    from ray.cluster_utils import Cluster  # as many places as workers, whatever there is of cores

    log: list[Any] = []
    head = {"num_cpus": max(options.workers), "include_dashboard": True}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        with connected(ClusterConfig(address=nodes.address)):
            for case in options.cases:
                turns = {
                    str(n): partial(launched, case, n, spec, nodes.address, log)
                    for n in options.workers
                }
                alternate(turns, options.rounds, case)
    finally:
        nodes.shutdown()
    return log


def part_rounds(spec: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """`parts` of every number of workers, in turns."""
    found = []
    for number in range(options.rounds):
        turn = number % len(options.workers)
        for workers in options.workers[turn:] + options.workers[:turn]:
            found.append({"workers": workers, **parts(workers, spec)})
            print(f"parts round {number + 1}/{options.rounds}, {workers}: {found[-1]}", flush=True)
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The parts of a step, all of it by Ray's workers, and what else the machine did."""
    busy = psutil.cpu_percent(interval=2)
    if busy > 10:
        print(f"WARNING: others use {busy:.0f}% of the cores; this measures them too", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = lay_out(Path(folder), options)
        spec["steps"] = dict.fromkeys(options.cases, EVERY)
        first = parts(1, spec)  # says how many steps fill the seconds
        for case in options.cases:
            steps = options.seconds * 1000 / first[case]["beside"]["step"]
            spec["steps"][case] = max(2 * EVERY, round(steps / EVERY) * EVERY)
        return {"busy": busy, "parts": part_rounds(spec, options), "runs": ray_runs(spec, options)}


def rows(runs: list[dict[str, Any]], options: argparse.Namespace) -> list[Row]:
    """Images per second of each case and number of workers, in the order of the rounds."""
    rates: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        rate = options.batch * run["workers"] / run["step_ms"] * 1000
        rates.setdefault((run["case"], run["workers"]), []).append(rate)
    return [
        Row(
            f"{case}, {n} workers",
            "images/s",
            found,
            [min(n, CORES) * rate for rate in rates[case, 1]],
            GOAL,
            f"{min(n, CORES)} times one worker's",
            note=f"{CORES} cores; {gradients(case) / 1e6:.1f} MB of gradients",
        )
        for (case, n), found in sorted(rates.items())
        if n > 1
    ]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cases", nargs="+", default=["vae", "vae_wide"], choices=list(CASES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=64, help="of each worker")
    parser.add_argument("--seconds", type=float, default=4, help="of a training by one worker")
    parser.set_defaults(threads=1)
    parser.add_argument("--measured", type=Path, help="a file of this, made here: fit it anew")
    options = parser.parse_args()
    if 1 not in options.workers or max(options.workers) < 2:
        raise SystemExit("--workers: one worker and more than one are needed")
    prepare_environment()
    if options.measured:
        file = json.loads(options.measured.read_text())
        options.batch = int(file["settings"]["batch"])
        told = {k: file[k] for k in ("busy", "parts", "runs", "hardware", "commit")}
    else:
        told = measured(options)
    title = f"Weak scaling of Ray Train workers: {options.batch} digits each, one thread each"
    more = {**told, **check(told["parts"], told["runs"])}
    report(title, rows(told["runs"], options), options, **more)


if __name__ == "__main__":
    main()
