"""Weak scaling: 1, 2 and 4 Ray Train workers of one thread, a fixed batch for each.

    .venv/bin/python -m benchmarks.scaling --json scaling.json
    .venv/bin/python -m benchmarks.scaling --cases vae --workers 1 2 --rounds 1

Workers are launched as the pipeline launches them, on the digits, the counts in turns. Where there
are fewer cores than workers they share them, so efficiency is that of the cores: images/s over
min(workers, cores) times those of one worker. In the file beside it: the parts of a step, each
measured on its own (`scaling_parts`), the cost model fitted to them (`cost_model`), and how far
its steps are from the measured ones. `benchmarks.gpus` extrapolates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cost_model import Job, Loopback, crowding, exchanged, fit
from benchmarks.pairs import Row, alternate, arguments, report
from benchmarks.scaling_parts import CASES, EVERY, parts, training
from models import store
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


def ray_runs(spec: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Images per second by case and workers, round by round; and every run's times."""
    from ray.cluster_utils import Cluster  # as many places as workers, whatever there is of cores

    log: list[Any] = []
    head = {"num_cpus": max(options.workers), "include_dashboard": True}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        with connected(ClusterConfig(address=nodes.address)):
            rates = {}
            for case in options.cases:
                turns = {
                    str(n): partial(launched, case, n, spec, nodes.address, log)
                    for n in options.workers
                }
                rates[case] = alternate(turns, options.rounds, case)
    finally:
        nodes.shutdown()
    return rates, log


def part_rounds(spec: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """`parts` of every number of workers, in turns."""
    found = []
    for number in range(options.rounds):
        turn = number % len(options.workers)
        for workers in options.workers[turn:] + options.workers[:turn]:
            found.append({"workers": workers, **parts(workers, spec)})
            print(f"parts round {number + 1}/{options.rounds}, {workers}: {found[-1]}", flush=True)
    return found


def median(found: list[dict[str, Any]], workers: int, *keys: Any) -> float:
    """Of the rounds of so many workers, of what lies under these keys."""
    values = []
    for entry in found:
        if entry["workers"] == workers:
            value: Any = entry
            for key in keys:
                value = value[key]
            values.append(value)
    return statistics.median(values)


def jobs(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Job]:
    found = {}
    for case in options.cases:
        family, config = CASES[case]
        model = store.build(family, config, spec["data"])
        size = sum(p.numel() * 4 for p in model.parameters())
        found[case] = Job((size,), log_every=EVERY, state=4 * size)
    return found


def check(
    measured: list[dict[str, Any]], log: list[Any], link: Loopback, job: Job, case: str
) -> list[dict[str, float]]:
    """Predicted and measured steps of each number of workers, milliseconds.

    `from_one` knows the step of one worker and the cores; `from_beside` the step beside the others.
    """
    alone = median(measured, 1, case, "beside", "step")
    found = []
    for n in sorted({entry["workers"] for entry in measured}):
        told = [entry["step_ms"] for entry in log if (entry["case"], entry["workers"]) == (case, n)]
        seen, beside = statistics.median(told), median(measured, n, case, "beside", "step")
        sent = 1000 * exchanged(job, n, link)
        row = {"workers": n, "ray": seen, "beside": beside, "exchange_predicted": sent}
        row["exchange_seen"] = median(measured, n, case, "together", "exchange")
        row["together"] = median(measured, n, case, "together", "step")
        row["from_one"] = alone * crowding(n, CORES) + sent
        row["from_beside"] = beside + sent
        row |= {f"error_{k}": row[k] / seen - 1 for k in ("from_one", "from_beside")}
        found.append(row)
        print(f"{case}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cases", nargs="+", default=["vae", "vae_wide"], choices=list(CASES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=64, help="of each worker")
    parser.add_argument("--seconds", type=float, default=4, help="of a training by one worker")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    if 1 not in options.workers or max(options.workers) < 2:
        raise SystemExit("--workers: one worker and more than one are needed")
    prepare_environment()
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
        measured = part_rounds(spec, options)
        work, (rates, log) = jobs(options, spec), ray_runs(spec, options)
    points = [
        (size, entry["workers"], seconds)
        for entry in measured
        for size, seconds in entry["all_reduce"].items()
        if entry["workers"] > 1
    ]
    link = fit(points, CORES)
    errors = [link.seconds(size, n) / seconds - 1 for size, n, seconds in points]
    print(f"{link}; relative errors {min(errors):.0%} to {max(errors):.0%}", flush=True)
    steps = {case: check(measured, log, link, work[case], case) for case in options.cases}
    starts = {
        n: statistics.median([entry["start_s"] for entry in log if entry["workers"] == n])
        for n in options.workers
    }
    print("start, s: " + ", ".join(f"{n} workers {s:.1f}" for n, s in starts.items()))
    rows = [
        Row(
            f"{case}, {n} workers",
            "images/s",
            rates[case][str(n)],
            [min(n, CORES) * rate for rate in rates[case]["1"]],
            GOAL,
            f"{min(n, CORES)} times one worker's",
            note=f"{CORES} cores; {work[case].gradients[0] / 1e6:.1f} MB of gradients",
        )
        for case in options.cases
        for n in options.workers
        if n > 1
    ]
    found = {"parts": measured, "runs": log, "steps": steps, "starts": starts, "busy": busy}
    found["fit"] = {"latency": link.latency, "bandwidth": link.bandwidth, "errors": errors}
    title = f"Weak scaling of Ray Train workers: {options.batch} digits each, one thread each"
    report(title, rows, options, **found)


if __name__ == "__main__":
    main()
