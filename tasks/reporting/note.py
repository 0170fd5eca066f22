"""The leaderboard as Markdown: what MLflow shows on the page of a comparison, and of a data set."""

from __future__ import annotations

import math
from typing import Any

from tasks.reporting.spread import spread
from tasks.reporting.verdict import verdict

Row = dict[str, Any]
COLUMNS = {  # metric -> title and format
    "frechet_distance": ("Fréchet distance", "{:.2f}"),
    "kid": ("KID", "{:.3f}"),
    "coverage": ("coverage", "{:.0%}"),
    "condition_accuracy": ("as asked", "{:.0%}"),
    "bits_per_dim": ("bits/dim", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "psnr": ("PSNR, dB", "{:.1f}"),
    "train_seconds": ("training, s", "{:.0f}"),
    "sample_images_per_second": ("samples/s", "{:,.0f}"),
}


def note(rows: list[Row], title: str, budget: str) -> str:
    """The verdict's sentences and the ranking as a table; columns that no family has are left out.

    Args: as of `verdict`.
    """
    shown = [name for name in COLUMNS if any(_number(row, name) for row in rows)]
    titles = ["#", "family", *(COLUMNS[name][0] for name in shown)]
    lines = [f"- {sentence}" for sentence in verdict(rows, title, budget)]
    lines += ["", f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row in rows:
        cells = [str(row["rank"] or "-"), row["family"], *(_cell(row, name) for name in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {row['family']}: {row['reason']}" for row in rows if row.get("reason")]
    if reasons:
        lines += ["", *reasons]
    return "\n".join(lines)


def _number(row: Row, name: str) -> bool:
    value = row.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _cell(row: Row, name: str) -> str:
    if not _number(row, name):
        return "-"
    form = COLUMNS[name][1]
    text = form.format(row[name])
    if name == "bits_per_dim":
        return f"{text} {row['likelihood_kind']}"
    deviation = spread(row, name)
    return f"{text} ± {form.format(deviation)}" if deviation else text
