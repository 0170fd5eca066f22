"""Leaderboard rows, from `metrics/*.json` and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from models import store
from tasks.training.history import HISTORY, read_history

COLUMNS = [
    "rank",
    "family",
    "status",
    "frechet_distance",
    "frechet_distance_std",
    "frechet_distance_floor",
    "kid",
    "kid_std",
    "kid_floor",
    "precision",
    "recall",
    "recall_floor",
    "density",
    "coverage",
    "coverage_floor",
    "class_share_min",
    "condition_accuracy",
    "condition_accuracy_floor",
    "frechet_distance_within_class",
    "frechet_distance_untrained",
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
SCORES = {"frechet_distance": "Fréchet distance", "bits_per_dim": "bits/dim"}


def score(metrics: dict[str, Any]) -> str:
    """The name of the metric that ranks; lower is better."""
    return next(name for name in SCORES if name in metrics)


def load_family(family: str, metrics: Path, trained: Path) -> dict[str, Any]:
    """What is known of one family: its metrics, or `status` failed with the `reason`.

    A family failed when its model or its metrics are missing, or when the metrics were
    measured on other weights than those that are there.
    """
    record = metrics / f"{family}.failed.json"
    told = json.loads(record.read_text()) if record.exists() else {}
    reason = f"{told['stage']}: {told['reason']}" if told else ""
    failed = {"family": family, "status": "failed"}
    if not (trained / family / store.CONFIG).exists():
        return {**failed, "reason": reason or "train: no trained model"}
    file = metrics / f"{family}.json"
    if not file.exists():
        return {**failed, "reason": reason or "evaluate: no metrics"}
    found = json.loads(file.read_text())
    weights = store.describe(trained / family)["weights_sha256"]
    if found["provenance"]["weights_sha256"] != weights:
        return {**failed, "reason": reason or "evaluate: the metrics are of other weights"}
    return {**found, "status": "ok", "reason": ""}


def load_families(families: tuple[str, ...], metrics: Path, trained: Path) -> list[dict[str, Any]]:
    """All families, the best score first, the failed ones last; each with its `rank`."""
    rows = [load_family(family, metrics, trained) for family in families]
    rows.sort(
        key=lambda r: (
            r["status"] != "ok",
            r[score(r)] if r["status"] == "ok" else 0.0,
            r["family"],
        )
    )
    for number, row in enumerate(rows, 1):
        row["rank"] = number if row["status"] == "ok" else None
    return rows


def to_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The leaderboard as a table with the fixed `COLUMNS`; absent numbers are empty."""
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    table["rank"] = table["rank"].astype("Int64")
    return table


def load_history(trained: Path, family: str) -> list[dict[str, Any]]:
    """The training records of a family; empty where it has none."""
    return read_history(trained / family / HISTORY)
