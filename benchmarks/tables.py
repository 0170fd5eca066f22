"""What `make bench` has measured, as tables between two marks in a Markdown page.

    .venv/bin/python -m benchmarks.tables .genarena/bench docs/performance.md

Every JSON file of the folder becomes a table: its `rows` (`benchmarks.pairs`) and its `tables`
(headings and rows of text), or, where it has neither, the numbers that it holds. What stands
between the marks is replaced, the rest of the page stays; the same files give the same page.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pairs import spread, told

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
ORDER = (  # others come after them
    *("start", "orchestration", "data_path", "overhead", "memory", "training", "ddim"),
    *("sampling", "evaluation", "scaling", "gpus"),
)
HEADINGS = ("", "ours", "theirs", "unit", "ratio", "goal", "")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What the files hold, by their names, in the order of the page.

    Raises:
        SystemExit: there are none, or one is no JSON object.
    """
    places = {name: place for place, name in enumerate(ORDER)}
    files = sorted(folder.glob("*.json"), key=lambda f: (places.get(f.stem, len(places)), f.stem))
    if not files:
        raise SystemExit(f"no JSON files in {folder}; `make bench` writes them")
    found = {}
    for file in files:
        try:
            found[file.stem] = json.loads(file.read_text())
        except ValueError as error:
            raise SystemExit(f"{file}: {error}") from error
        if not isinstance(found[file.stem], dict):
            raise SystemExit(f"{file}: a list, not an object with rows")
    return found


def text(found: dict[str, dict[str, Any]]) -> str:
    """All tables. How they were measured is said once where most agree, else under the title."""
    lines = [measured(content) for content in found.values()]
    ((usual, _),) = Counter(lines).most_common(1)
    parts = [
        "Medians (least to most) of alternating rounds; a ratio is that of two numbers of one "
        f"round. {usual}".rstrip()
    ]
    for (name, content), line in zip(found.items(), lines, strict=True):
        parts.append(f"**{content.get('title') or name.replace('_', ' ')}**")
        if line != usual:
            parts[-1] += f"  \n{line or 'Machine and date were not recorded.'}"
        rows, others = content.get("rows"), content.get("tables", [])
        parts += [table(HEADINGS, map(cells, rows))] if rows else []
        parts += [table(tuple(other["headings"]), other["rows"]) for other in others]
        parts += [] if rows or others else [numbers_table(content)]
    return "\n\n".join(parts)


def measured(content: dict[str, Any]) -> str:
    """The machine, the date and the commit, as far as the file says."""
    parts = [str(content[key]) for key in ("hardware", "date") if content.get(key)]
    if content.get("commit"):
        parts.append(f"commit {content['commit']}")
    return "; ".join(parts) + "." if parts else ""


def cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['name']}; {row['note']}" if row.get("note") else row["name"]
    theirs = " ".join(part for part in (several(row.get("theirs")), row.get("peer")) if part)
    goal, met = row.get("goal"), row.get("met")
    limit = "" if goal is None else f"{'≤' if row.get('at_most') else '≥'} {goal:g}"
    verdict = "" if met is None else "met" if met else "**missed**"
    ratio = several(row.get("ratios") or row.get("ratio"))
    return [name, several(row.get("ours")), theirs, row.get("unit", ""), ratio, limit, verdict]


def several(values: Any) -> str:
    """The median and the spread of some numbers, or the one there is."""
    if values is None or values == []:
        return ""
    return spread(values) if len(listed(values)) > 1 else told(listed(values)[0])


def numbers_table(content: dict[str, Any]) -> str:
    """Of a file without rows."""
    return table(("", "value"), ([name, several(value)] for name, value in numbers(content)))


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each number, or list of numbers, with the way to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "settings":
                yield from numbers(inner, f"{name}, {key}" if name else str(key))
    elif value != [] and all(type(v) in (int, float) for v in listed(value)):
        yield name, value


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def table(headings: tuple[str, ...], rows: Any) -> str:
    whole = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in whole)


def put(page: Path, content: str) -> None:
    """Between the marks; SystemExit where the page has not both, once and in their order."""
    before, begin, rest = page.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise SystemExit(f"{page}: expected one {BEGIN} and after it one {END}")
    page.write_text(f"{before}{BEGIN}\n\n{content}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the benchmarks' JSON files")
    parser.add_argument("page", type=Path, help="Markdown, with the two marks")
    options = parser.parse_args()
    found = read(options.folder)
    put(options.page, text(found))
    rows = [row for content in found.values() for row in content.get("rows") or []]
    met = sum(bool(row.get("met")) for row in rows)
    goals = sum(row.get("met") is not None for row in rows)
    print(f"{options.page}: {len(found)} tables; {met} of {goals} goals met")


if __name__ == "__main__":
    main()
