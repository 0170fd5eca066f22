"""Ours and theirs side by side: alternating measurements, medians with their spread, one table.

What every benchmark of `make bench` shares. A measurement is a function that returns a number
(seconds, images/s, bytes); the contenders take turns within one run, each round measures all of
them, and a ratio is always that of two numbers of the same round. So what else the machine does
meanwhile strikes both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
Measure = Callable[[], float]


@dataclass
class Row:
    """Two contenders' numbers, round by round, and what their ratio ought to be.

    Attributes:
        goal: of the median ratio; at least that much, or at most where `at_most`.
        more_is_better: of the numbers. The ratio is then ours / theirs, else theirs / ours, so that
            more than 1 means that ours is ahead; where `at_most`, it is ours / theirs always.
    """

    name: str
    unit: str
    ours: list[float]
    theirs: list[float]
    goal: float
    peer: str = ""
    at_most: bool = False
    more_is_better: bool = True
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.ours, self.theirs, strict=True)
        straight = self.more_is_better or self.at_most
        return [a / b if straight else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def found(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {**asdict(self), "ratios": self.ratios, "ratio": self.ratio, "met": self.met}


def limited(name: str, unit: str, ours: list[float], limit: float) -> Row:
    """A row whose other contender is a number that is not to be exceeded."""
    return Row(name, unit, ours, [limit] * len(ours), 1, "the limit", at_most=True)


def alternate(contenders: dict[str, Measure], rounds: int, label: str = "") -> dict[str, Any]:
    """Every contender once in each round, each round beginning with the next one; their numbers."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(contenders[name]())
        line = ", ".join(f"{name} {told(found[name][-1])}" for name in names)
        print(f"{label} round {number + 1}/{rounds}: {line}", flush=True)
    return found


def child(module: str, *words: str, python: str = sys.executable) -> dict[str, Any]:
    """Run `python -m module words` in a fresh process; the JSON of its last line."""
    command = [python, "-m", module, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Contender:
    """`python -m module words` as a process that stays: it says what it is, and then answers.

    So contenders do not share what is a process's own, such as how it keeps freed memory.
    """

    MARK = "answer: "  # before what is said; other lines are whatever a library prints

    def __init__(self, module: str, *words: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module, *words]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.told: dict[str, Any] = self._answer()

    def ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(self.MARK):
                return json.loads(line.removeprefix(self.MARK))
        raise SystemExit(f"{self.process.args}: exit code {self.process.wait()}")

    @classmethod
    def serve(cls, told: dict[str, Any], answer: Callable[[str], Any]) -> None:
        """The other side: say what one is, and answer each line until there are no more."""
        print(cls.MARK + json.dumps(told), flush=True)
        for line in sys.stdin:
            print(cls.MARK + json.dumps(answer(line.strip())), flush=True)


def hardware(threads: int | None = None) -> str:
    """The machine and what runs on it, in one line."""
    import torch

    cpu, file = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if file.exists():
        lines = (line.partition(":") for line in file.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in lines if key.strip() == "model name"), cpu)
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    kinds = [name for name, there in (("AVX512-BF16", bf16), ("AMX", amx)) if there]
    machine = f"{cpu}, {os.cpu_count()} cores, {', '.join(kinds) or 'no bf16 in the processor'}"
    return f"{machine}; torch {torch.__version__}, {threads or torch.get_num_threads()} threads"


def commit() -> str:
    """The code that runs, with a "+" where it has changes that are in no commit; "" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def told(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    return f"{told(statistics.median(values))} ({told(min(values))} to {told(max(values))})"


def report(title: str, rows: list[Row], options: argparse.Namespace, **more: Any) -> None:
    """Print the table, and write what it is made of where `--json` says.

    Called again with more rows after each of them, it loses nothing when a benchmark breaks off.
    """
    line = f"{hardware(getattr(options, 'threads', None))}; {date.today()}"
    table = Table(title=title, caption=f"Medians (least to most) of alternating rounds. {line}")
    for heading in ("", "ours", "theirs", "unit", "ratio", "goal", ""):
        table.add_column(heading)
    for row in rows:
        name = f"{row.name}\n  {row.note}" if row.note else row.name
        limit = "<=" if row.at_most else ">="
        table.add_row(
            name,
            spread(row.ours),
            f"{spread(row.theirs)} {row.peer}",
            row.unit,
            spread(row.ratios),
            f"{limit} {row.goal:g}",
            "met" if row.met else "missed",
        )
    Console(width=200).print(table)
    if options.json:
        found = {
            "title": title,
            "hardware": line,
            "commit": commit(),
            "rows": [row.found() for row in rows],
            "settings": {k: str(v) for k, v in vars(options).items()},
            **more,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="each measures all contenders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's original files")
    return parser
