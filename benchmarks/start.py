"""How long a command takes before it does anything: `genarena --help` in fresh processes.

    .venv/bin/python -m benchmarks.start --json start.json

In the file beside it: a bare start of Python, importing torch, importing the families.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.pairs import ROOT, alternate, arguments, limited, report

LIMIT = 0.5  # seconds
COMMANDS = {
    "genarena --help": ["-m", "genarena", "--help"],
    "genarena run --help": ["-m", "genarena", "run", "--help"],
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import models": ["-c", "import models"],
}


def seconds(words: list[str]) -> float:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    command = [sys.executable, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    return time.perf_counter() - begun


def main() -> None:
    options = arguments(__doc__, rounds=9).parse_args()
    for words in COMMANDS.values():
        seconds(words)  # compiled, and in the page cache
    turns = {name: (lambda w=words: seconds(w)) for name, words in COMMANDS.items()}
    found = alternate(turns, options.rounds, "start")
    names = ("genarena --help", "genarena run --help")
    rows = [limited(name, "s", found[name], LIMIT) for name in names]
    report("How long a command takes to start", rows, options, all=found)


if __name__ == "__main__":
    main()
