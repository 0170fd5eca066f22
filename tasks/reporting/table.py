"""The leaderboard's table on the page: which columns there are, and what stands in each cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tasks.reporting import leaderboard
from tasks.reporting.spread import spread

Row = dict[str, Any]
COPIED = 0.1  # share of samples that are copies, beyond that of test images: memorised
NEAR = 1 / 3  # distance to the training images, of that of test images: memorised


class Cell(NamedTuple):
    text: str
    note: str = ""  # smaller, beside it
    value: float | None = None  # what the table sorts by


class Column(NamedTuple):
    """A column; it is left out where no family has anything to show in it."""

    title: str
    cell: Callable[[Row], Cell | None]
    floor: Callable[[Row], str] = lambda row: ""


class Table(NamedTuple):
    """Titles, the cells of each row that is ok (None: a dash), and the floor's cells."""

    titles: list[str]
    cells: list[list[Cell | None]]
    floors: list[str]


def table(ok: list[Row]) -> Table:
    """The table of the rows that are ok, the best first."""
    shown = [column for column in COLUMNS if any(column.cell(row) for row in ok)]
    return Table(
        [column.title for column in shown],
        [[column.cell(row) for column in shown] for row in ok],
        [next(filter(None, map(column.floor, ok)), "") for column in shown],
    )


def duration(seconds: float) -> str:
    """`45 s`, `12 min 30 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def thousands(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:,.2g}"


def _number(key: str, form: str, note: Callable[[Row], str] = lambda row: "") -> Any:
    """The number and its spread, or the note where there is one."""

    def cell(row: Row) -> Cell | None:
        if key not in row:
            return None
        beside = " ".join(filter(None, [_spread(row, key, form), note(row)]))
        return Cell(format(row[key], form), beside, row[key])

    return cell


def _quantity(key: str, written: Callable[[float], str]) -> Callable[[Row], Cell | None]:
    return lambda row: Cell(written(row[key]), "", row[key]) if key in row else None


def _spread(row: Row, key: str, form: str) -> str:
    value = spread(row, key)
    return "" if value is None else f"± {value:{form}}"


def _floor(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[key], form) if key in row else ""


def _psnr(row: Row) -> Cell | None:
    kind = row.get("reconstruction_kind", "")
    if "infinite" in row["not_applicable"].get("psnr", ""):
        return Cell("∞", kind, 1e9)
    if "psnr" not in row:
        return None
    return Cell(f"{row['psnr']:.1f}", f"{_spread(row, 'psnr', '.1f')} {kind}".strip(), row["psnr"])


def _binary_nats(row: Row) -> Cell | None:
    """Papers give nats for binarised sets and bits for all others; a table is wide enough."""
    if row.get("levels") != 2:
        return None
    return Cell(f"{row['nats']:.2f}", _spread(row, "nats", ".2f"), row["nats"])


def _copies(count: float) -> str:
    return f"{count:,.0f} {'copy' if count == 1 else 'copies'}"


def _gap(row: Row) -> str:
    per_dim = row["ais_nats"] / row["ais_bits_per_dim"]
    return f"ais ± {row['ais_gap_nats'] / per_dim:.3f}"


COLUMNS = [
    Column(
        "Fréchet distance ↓",
        _number("frechet_distance", ".2f"),
        _floor("frechet_distance_floor", ".2f"),
    ),
    Column(
        "KID ↓",
        _number("kid", ".3f"),
        _floor("kid_floor", ".3f"),
    ),
    Column("coverage ↑", _number("coverage", ".0%"), _floor("coverage_floor", ".0%")),
    Column("recall ↑", _number("recall", ".0%"), _floor("recall_floor", ".0%")),
    Column(
        "bits/dim ↓", _number("bits_per_dim", ".3f", lambda r: str(r.get("likelihood_kind", "")))
    ),
    Column("nats ↓", _binary_nats),
    Column("training", _quantity("train_seconds", duration)),
    Column("samples/s", _quantity("sample_images_per_second", thousands)),
    Column(
        "to training ↓",
        _number("frechet_distance_train", ".2f"),
        _floor("frechet_distance_train_floor", ".2f"),
    ),
    Column(
        "inception score ↑",
        _number("inception_score", ".2f"),
        _floor("inception_score_floor", ".2f"),
    ),
    Column(
        "rarest class",
        _number("class_share_min", ".1%"),
        _floor("class_share_min_floor", ".1%"),
    ),
    Column(
        "worst class ↓",
        _number("class_frechet_distance_max", ".2f", lambda r: r["class_frechet_distance_max_of"]),
    ),
    Column(
        "nearest training image",
        _number("nearest_train_ratio", ".2f", lambda r: _copies(r["train_duplicates"])),
    ),
    Column(
        "as asked ↑",
        _number("condition_accuracy", ".1%"),
        _floor("condition_accuracy_floor", ".1%"),
    ),
    Column("perplexity ↓", _number("perplexity", ".2f", lambda r: "of a byte")),
    Column("above entropy, nats ↓", _number("nats_above_entropy", ".3f")),
    Column(
        "bits/dim with noise ↓",
        _number("ais_bits_per_dim", ".3f", _gap),
    ),
    Column(
        "anomalies ↑",
        _number(
            "anomaly_auroc", ".0%", lambda r: f"{r['anomaly_auroc_typicality']:.0%} by typicality"
        ),
    ),
    Column("PSNR, dB ↑", _psnr, _floor("psnr_floor", ".1f")),
    Column("PSNR in the hole ↑", _number("psnr_hole", ".1f"), _floor("psnr_hole_floor", ".1f")),
    Column("SSIM ↑", _number("ssim", ".3f"), _floor("ssim_floor", ".3f")),
    Column(
        "perceptual ↓",
        _number("perceptual_distance", ".2f"),
        _floor("perceptual_distance_floor", ".2f"),
    ),
    Column("taught by samples ↑", _number("cas", ".1%"), _floor("cas_real", ".1%")),
    Column("gain with few real ↑", _number("small_set_gain", "+.1%")),
    Column("cycle PSNR ↑", _number("cycle_psnr", ".1f")),
    Column("images seen", _quantity("train_images", thousands)),
    Column("training FLOPs", _quantity("train_flops", "{:.1e}".format)),
    Column("parameters", _quantity("parameters", thousands)),
]


def warnings(row: Row) -> list[str]:
    """What the numbers of a family warn of, in words."""
    found = [f"Not of every seed: {row['reason']}."] if row.get("reason") else []
    if "rank" in row and row["rank"] is None:
        reasons = row["not_applicable"]
        lacking = next((name for name in leaderboard.SCORES if name in reasons), None)
        if lacking:
            found.append(f"Not ranked: no {lacking}: {reasons[lacking]}.")
    if "coverage" in row and row["coverage"] < row["coverage_floor"] / 2:
        found.append(
            f"Mode collapse: its samples cover {row['coverage']:.0%} of the test images, where as "
            f"many training images cover {row['coverage_floor']:.0%}."
        )
    if row.get("distinct_samples") == 1:
        found.append("Every sample is the same image.")
    copied = row.get("train_duplicate_share", 0.0)
    usual = row.get("train_duplicate_share_floor", 0.0)
    if copied - usual > COPIED:
        found.append(
            f"Memorised: {copied:.0%} of its samples equal a training image in every pixel; of the "
            f"test images {usual:.0%} do."
        )
    elif row.get("nearest_train_ratio", 1.0) < NEAR and row.get("distinct_samples") != 1:
        found.append(
            f"Memorised: its samples lie {row['nearest_train_ratio']:.2f} times as far from the "
            "training images as test images do."
        )
    return found
