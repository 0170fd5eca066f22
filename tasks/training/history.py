"""The history of a training: `history.jsonl`, a record a line.

The numbers of a validation become known after their step and follow as a record of their own,
`{"step": ..., "validation/...": ...}`. Readers get one record for each step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tasks.training.checkpoint import writing

HISTORY = "history.jsonl"
VALIDATION = "validation/"  # what the names of a validation's numbers begin with

Record = dict[str, Any]


class Journal:
    """Appends each record, on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop what a training that goes on from `step` will tell again: all that is later, and
        every validation."""
        if self.path.exists():
            kept = [r for r in _records(self.path) if r["step"] <= step and not _validation(r)]
            write_history(self.path, kept)

    def __call__(self, record: Record) -> None:
        with (
            writing(f"the record of step {record['step']:,}", self.path.parent),
            self.path.open("a") as file,
        ):
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_history(path: Path) -> list[Record]:
    """One record for each step, in order; none where there is no file. A last line that was cut
    off by a kill is left out."""
    merged: dict[int, Record] = {}
    for record in _records(path):
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


def write_history(path: Path, records: list[Record]) -> None:
    """Replace the file, in one move."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
    temporary.replace(path)


def _validation(record: Record) -> bool:
    return any(name.startswith(VALIDATION) for name in record)


def _records(path: Path) -> list[Record]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
