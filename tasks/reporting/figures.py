"""Figures as inline SVG that take the page's text colour, so that dark mode works."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tasks.reporting import leaderboard
from tasks.reporting.spread import spread

History = list[dict[str, Any]]

INK = "#010203"  # replaced by `currentColor`
FEW = 6  # families whose names find room beside their points
COLOURS = ["#3b76d4", "#d9772b", "#2f9e62", "#c2447e", "#8a63d2", "#8c7a1f", "#1f98a8", "#a55a3c"]
LINES = ["-", "--", ":"]  # of more families than there are colours
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genarena",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


def loss_curves(history: History, title: str) -> str:
    """Training losses of every phase over the steps, one family."""
    names = [n for n in (history[-1] if history else {}) if n.endswith("/loss")]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.7))
        for colour, name in zip(COLOURS, names, strict=False):
            points = [(r["step"], r[name]) for r in history if name in r]
            mark = "." if len(points) < 5 else ""  # a single point makes no line
            label = name.split("/")[0]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, marker=mark, label=label)
        axes.set(xlabel="step", ylabel="training loss")
        if len(names) > 1:
            axes.legend()
        return _svg(figure, f"Training loss of {title}")


def styles(families: list[str]) -> dict[str, tuple[str, str]]:
    """Each family's colour and line, the same in every figure whatever the ranking."""
    return {
        family: (COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, family in enumerate(sorted(families))
    }


def validation_curves(histories: dict[str, list[History]], metric: str, label: str) -> str:
    """One validation metric of all families over the steps, a line for each seed; empty where
    none has it."""
    style = styles(list(histories))
    key = f"validation/{metric}"
    curves = [
        (family, [(r["step"], r[key]) for r in history if key in r])
        for family, seeds in histories.items()
        for history in seeds
    ]
    curves = [(family, points) for family, points in curves if points]
    if not curves:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.2))
        named: set[str] = set()
        for family, points in curves:
            line: dict[str, Any] = {
                "color": style[family][0],
                "ls": style[family][1],
                "lw": 1.6,
                "marker": ".",
                "label": None if family in named else family,
            }
            named.add(family)
            axes.plot(*zip(*points, strict=True), **line)
        if metric == "frechet_distance":
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        axes.set(xlabel="step", ylabel=label)
        _legend_below(axes, len(named))
        return _svg(figure, f"{label} on the validation split, by step")


def numbered(rows: list[dict[str, Any]]) -> bool:
    """Whether `quality_against_cost` has ranks in its points, for want of room for names."""
    score = leaderboard.ranking(rows)
    return sum(score in row for row in rows) > FEW


def quality_against_cost(rows: list[dict[str, Any]]) -> str:
    """The score against training time, and against time to sample 1,000 examples, each with the
    line of the families that no other one beats in both; empty where none has a score."""
    costs = [
        ("training time, s", lambda r: r["train_seconds"]),
        ("time to sample 1,000, s", lambda r: 1000 / r["sample_images_per_second"]),
    ]
    score = leaderboard.ranking(rows)
    style = styles([row["family"] for row in rows])
    ranks = numbered(rows)
    rows = [row for row in rows if score in row]
    if not rows:
        return ""
    name = leaderboard.SCORES[score]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.4), sharey=True)
        for axes, (label, cost) in zip(panels, costs, strict=True):
            for row in rows:
                beside = "" if ranks else row["family"]
                _point(axes, cost(row), row, score, style[row["family"]][0], beside)
            front = pareto([(cost(row), row[score]) for row in rows])
            axes.step(*zip(*front, strict=True), where="post", color=INK, lw=1, alpha=0.45)
            axes.set(xlabel=label, xscale="log", yscale="log")
            axes.margins(x=0.35, y=0.15)
            _plain_ticks(axes.xaxis)
            _plain_ticks(axes.yaxis)
        panels[0].set_ylabel(f"{name} (lower is better)")
        floor = rows[0].get(f"{score}_floor")
        if floor is not None:
            for axes in panels:
                axes.axhline(floor, color=INK, lw=1, ls=":", alpha=0.7)
            panels[0].annotate(
                "train vs test", (0.01, floor), xycoords=("axes fraction", "data"), va="bottom"
            )
        figure.tight_layout()
        return _svg(figure, f"{name} against training time and against sampling time")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of `(cost, score)` that no other one beats in both, the cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points):
        if not front or score < front[-1][1]:
            front.append((cost, score))
    return front


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 … on a logarithmic axis, in plain numbers; 1, 10, 100 … where it is long."""
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, entries: int) -> None:
    """Under the axes, where it covers no line."""
    columns = min(4, entries)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, columnspacing=1.2)


def _point(
    axes: Axes, cost: float, row: dict[str, Any], score: str, colour: str, name: str
) -> None:
    """With its name beside it, or, where there are too many, its rank within."""
    axes.errorbar(cost, row[score], spread(row, score), fmt="o", ms=8, color=colour)
    if name:
        axes.annotate(name, (cost, row[score]), xytext=(9, 4), textcoords="offset points")
        return
    place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 8}
    axes.plot(cost, row[score], "o", ms=14, color=colour, zorder=3 + 1 / row["rank"])
    axes.annotate(
        str(row["rank"]), (cost, row[score]), color="white", zorder=3 + 1 / row["rank"], **place
    )


def _svg(figure: Figure, alt: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
