"""Leaderboard rows, from `metrics/*.json` and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from models import store
from tasks.reporting.spread import SUFFIX, combine
from tasks.runs import Run
from tasks.training.history import HISTORY, read_history

COLUMNS = [
    "rank",
    "family",
    "status",
    "seeds",
    "frechet_distance",
    "frechet_distance_std",
    "frechet_distance_floor",
    "frechet_distance_train",
    "frechet_distance_train_floor",
    "kid",
    "kid_std",
    "kid_std_error",
    "kid_floor",
    "precision",
    "precision_floor",
    "recall",
    "recall_floor",
    "density",
    "density_floor",
    "coverage",
    "coverage_floor",
    "inception_score",
    "inception_score_std",
    "inception_score_floor",
    "class_share_min",
    "class_share_min_floor",
    "class_frechet_distance_max",
    "class_frechet_distance_max_of",
    "nearest_train_ratio",
    "train_duplicates",
    "train_duplicate_share",
    "train_duplicate_share_floor",
    "distinct_samples",
    "condition_accuracy",
    "condition_accuracy_floor",
    "frechet_distance_within_class",
    "frechet_distance_untrained",
    "cas",
    "cas_real",
    "small_set_accuracy",
    "small_set_gain",
    "bits_per_dim",
    "nats",
    "likelihood_kind",
    "likelihood_draws",
    "likelihood_note",
    "perplexity",
    "entropy_nats",
    "nats_above_entropy",
    "ais_nats",
    "ais_bits_per_dim",
    "ais_gap_nats",
    "kde_log_density",
    "anomaly_auroc",
    "anomaly_auroc_typicality",
    "psnr",
    "psnr_floor",
    "ssim",
    "ssim_floor",
    "perceptual_distance",
    "perceptual_distance_floor",
    "cycle_psnr",
    "reconstruction_kind",
    "budget",
    "train_steps",
    "train_images",
    "train_flops",
    "train_seconds",
    "train_images_per_second",
    "sample_images_per_second",
    "parameters",
    "peak_memory_mb",
    "features",
    "hardware",
    "reason",
]


# What ranks the families, and the champion in the registry: the first of these that was measured.
SCORES = {"frechet_distance": "Fréchet distance", "kid": "KID", "bits_per_dim": "bits/dim"}


def score(metrics: dict[str, Any]) -> str:
    """The name of the metric by which a model meets its predecessors; `""`: it has none."""
    return next((name for name in SCORES if name in metrics), "")


def ranking(rows: list[dict[str, Any]]) -> str:
    """The metric that ranks these rows: the first of `SCORES` that one of them has, or `""`."""
    return next((name for name in SCORES if any(name in row for row in rows)), "")


def load_run(which: Run, root: Path) -> dict[str, Any]:
    """What is known of one run: its metrics, or `status` failed with the `reason`.

    A run failed when its model or its metrics are missing, or when the metrics were
    measured on other weights than those that are there.
    """
    record = root / which.failure
    told = json.loads(record.read_text()) if record.exists() else {}
    reason = f"{told['stage']}: {told['reason']}" if told else ""
    failed = {"family": which.family, "seed": which.seed, "status": "failed"}
    if not (root / which.trained / store.CONFIG).exists():
        return {**failed, "reason": reason or "train: no trained model"}
    file = root / which.metrics
    if not file.exists():
        return {**failed, "reason": reason or "evaluate: no metrics"}
    found = json.loads(file.read_text())
    weights = store.describe(root / which.trained)["weights_sha256"]
    if found["provenance"]["weights_sha256"] != weights:
        return {**failed, "reason": reason or "evaluate: the metrics are of other weights"}
    return {**found, "status": "ok", "reason": ""}


def load_families(
    families: Iterable[str], seeds: Iterable[int], root: Path
) -> list[dict[str, Any]]:
    """A row for each family, the best first, then those without the number that ranks, the failed
    ones last; each with its `rank`, None where it has none."""
    seeds = tuple(seeds)
    rows = [combine([load_run(Run(f, seed), root) for seed in seeds]) for f in families]
    name = ranking(rows)
    rows.sort(key=lambda r: (r["status"] != "ok", name not in r, r.get(name, 0.0), r["family"]))
    for number, row in enumerate(rows, 1):
        row["rank"] = number if name in row else None
    return rows


def to_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The leaderboard as a table with the fixed `COLUMNS`, after them the deviations of the seeds
    where there are several; absent numbers are empty."""
    deviations = [c + SUFFIX for c in COLUMNS if any(c + SUFFIX in row for row in rows)]
    told = [{**row, "seeds": " ".join(map(str, row["seeds"]))} for row in rows]
    table = pd.DataFrame(told).reindex(columns=[*COLUMNS, *deviations])
    table["rank"] = table["rank"].astype("Int64")
    return table


def load_histories(row: dict[str, Any], root: Path) -> list[list[dict[str, Any]]]:
    """The training records of a row's runs, in the order of their seeds."""
    return [read_history(root / Run(row["family"], s).trained / HISTORY) for s in row["seeds"]]
