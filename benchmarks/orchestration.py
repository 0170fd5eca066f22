"""What orchestration costs: the whole of a run against the seconds that its loops trained.

    .venv/bin/python -m benchmarks.orchestration --json orchestration.json

A new project of the real code in a temporary folder, the default settings, digits; then the same
command again, which has nothing to do. The difference of the first is not all orchestration: the
data, the classifier, validation and evaluation are in it, and families train side by side where
there are processors for it. So it is split by Prefect's own record: before the first stage, each
stage, between them, after the last. And the same families run once with the settings of the tests,
a run in which the stages have next to nothing to do: what is left is orchestration.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.pairs import ROOT, arguments, limited, report
from benchmarks.tables import table
from tests.projects import environment, make_project

AGAIN = 10  # seconds, goals all three
FLOW, FAMILY = 25, 6
RECORD = ".genarena/prefect/prefect.db"


def timed(project: Path, *words: str) -> tuple[float, float]:
    """When the command began, by the clock, and how many seconds it took."""
    variables = environment(project)
    variables.pop("OMP_NUM_THREADS", None)
    clock, begun = time.time(), time.perf_counter()
    command = [sys.executable, "-m", "genarena", "run", *words]
    done = subprocess.run(
        command, cwd=project, env=variables, text=True, check=False, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return clock, time.perf_counter() - begun


def stages(project: Path) -> list[tuple[str, float, float]]:
    """Name, start and end of each, by the clock, in the order of their starts."""
    with sqlite3.connect(project / RECORD) as record:
        found = record.execute("select name, start_time, end_time from task_run order by 2")
        return [(name, _clock(start), _clock(end)) for name, start, end in found]


def _clock(told: str) -> float:
    return datetime.fromisoformat(told).replace(tzinfo=UTC).timestamp()


def split(project: Path, clock: float, whole: float) -> dict[str, Any]:
    """Seconds: of the loops, of each stage, and of the run before, between and after stages."""
    facts = project.glob("artifacts/train/*/train.json")
    loops = {file.parent.name: json.loads(file.read_text())["train_seconds"] for file in facts}
    ran = stages(project)
    covered, until = 0.0, clock
    for _, start, end in ran:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    found: dict[str, Any] = {"whole_s": whole, "loops_s": loops}
    found["rest_s"] = whole - sum(loops.values())
    found["before_s"], found["after_s"] = ran[0][1] - clock, clock + whole - until
    found["between_s"] = whole - covered - found["before_s"] - found["after_s"]
    found["stages_s"] = {name: end - start for name, start, end in ran}
    return found


def split_table(real: dict[str, Any], tiny: dict[str, Any], steps: int) -> dict[str, Any]:
    """Where the seconds of both runs were; families are side by side."""
    lines = [["all", f"{real['whole_s']:.1f}", f"{tiny['whole_s']:.1f}"]]
    for what in ("before", *real["stages_s"], "between", "after"):
        pair = []
        for found in (real, tiny):
            seconds = found["stages_s"].get(what, found.get(f"{what}_s", 0.0))
            loop = found["loops_s"].get(what.removeprefix("train@"))
            inside = f" ({loop:.1f} the loop)" if loop is not None and "train@" in what else ""
            pair.append(f"{seconds:.1f}{inside}")
        lines.append([what if what in real["stages_s"] else f"{what} the stages", *pair])
    return {"headings": ["seconds", f"{steps:,} steps", "next to nothing to do"], "rows": lines}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--families", default="vae dcgan")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    goal = FLOW + FAMILY * len(options.families.split())
    words = ("--families", options.families)
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "tiny", {})
        tiny = split(project, *timed(project, *words))
        print(f"next to nothing to do in the stages: {tiny['rest_s']:.1f} s without the loops")
        project = make_project(Path(folder) / "project", {})
        (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        words = (*words, "--steps", str(options.steps))
        real = split(project, *timed(project, *words))
        print(f"{options.steps:,} steps: {real['rest_s']:.1f} s without the loops")
        again = [timed(project, *words)[1] for _ in range(options.rounds)]
    name = f"{options.families}, {options.steps:,} steps: the run without its loops"
    rows = [
        limited(name, "s", [real["rest_s"]], goal),
        limited("the same, with next to nothing to do in the stages", "s", [tiny["rest_s"]], goal),
        limited("the same command again, nothing changed", "s", again, AGAIN),
    ]
    title = "What orchestration costs, evaluation included"
    where = split_table(real, tiny, options.steps)
    print(table(tuple(where["headings"]), where["rows"]))
    found = {"families": options.families, "steps": options.steps, "real": real, "tiny": tiny}
    report(title, rows, options, tables=[where], **found)


if __name__ == "__main__":
    main()
