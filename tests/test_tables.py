"""benchmarks/tables.py: a page has the numbers of the files. All numbers here are made up."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import orchestration, pairs, tables
from benchmarks.pairs import Row

PAGE = f"# Performance\n\n## The table\n\n{tables.BEGIN}\nold\n{tables.END}\n\n## After\n"
MACHINE = {"hardware": "a machine; 2026-01-01", "commit": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files: of rows, of rows measured elsewhere, of bare numbers."""
    quick = Row("images|s", "images/s", [20.0, 40.0, 30.0], [10.0, 10.0, 10.0], 2, "other")
    heavy = Row("memory", "MiB", [300.0], [100.0], 1.5, "bare", at_most=True, note="60 steps")
    write(tmp_path, "training", {"title": "Training", "rows": [quick.found()], **MACHINE})
    elsewhere = {"hardware": "another", "title": "Memory", "rows": [heavy.found()]}
    where = {"headings": ["seconds", "here"], "rows": [["first|last", "1.0"]]}
    write(tmp_path, "memory", {**elsewhere, "tables": [where]})
    bare = {"whole_s": 12.5, "again_s": [3.0, 1.0, 2.0], "loops_s": {"vae": 4.0}, "steps": 2000}
    write(tmp_path, "orchestration", {**bare, **MACHINE, "families": "vae", "settings": {"n": 1}})
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["tables", str(folder), str(folder / "page.md")])
    tables.main()
    return (folder / "page.md").read_text()


def test_every_file_is_a_table_in_the_order_of_the_benchmarks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a_new_one", {"rows": [], "seconds": 7, **MACHINE})
    page = made(folder, monkeypatch)
    titles = [line for line in page.splitlines() if line.startswith("**")]
    expected = ["**orchestration**", "**Memory**  ", "**Training**", "**a new one**"]
    assert titles == expected
    row = r"| images\|s | 30 (20 to 40) | 10 (10 to 10) other | images/s | 3 (2 to 4) | ≥ 2 | met |"
    assert row in page
    assert "| memory; 60 steps | 300 | 100 bare | MiB | 3 | ≤ 1.5 | **missed** |" in page
    assert (
        f"**missed** |\n\n| seconds | here |\n| --- | --- |\n| first{chr(92)}|last | 1.0 |" in page
    )
    assert "| again_s | 2 (1 to 3) |" in page
    assert "| loops_s, vae | 4 |" in page
    assert "| seconds | 7 |" in page
    assert "settings" not in page
    assert page.count("a machine; 2026-01-01; commit abc.") == 1
    assert "**Memory**  \nanother." in page
    assert "1 of 2 goals met" in capsys.readouterr().out


def test_made_twice_it_is_the_same_page_and_the_rest_of_it_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = made(folder, monkeypatch)
    assert made(folder, monkeypatch) == page
    before, _, rest = page.partition(tables.BEGIN)
    assert before == PAGE.partition(tables.BEGIN)[0]
    assert rest.partition(tables.END)[2] == PAGE.partition(tables.END)[2]
    assert "old" not in page


@pytest.mark.parametrize(
    "page",
    ["no marks", f"{tables.END} {tables.BEGIN}", tables.BEGIN, f"{PAGE}{PAGE}"],
    ids=["none", "order", "one", "twice"],
)
def test_a_page_without_its_marks_is_left_alone(
    folder: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "page.md").write_text(page)
    with pytest.raises(SystemExit, match="expected one <!-- bench: begin -->"):
        made(folder, monkeypatch)
    assert (folder / "page.md").read_text() == page


def test_what_is_no_measurement_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "memory.json").write_text('{"rows": [')
    with pytest.raises(SystemExit, match=r"memory\.json: "):
        made(folder, monkeypatch)
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"no JSON files in .*empty"):
        tables.read(folder / "empty")


def test_the_page_of_this_project_has_its_marks(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((root / "docs/performance.md").read_text())
    tables.put(page, "x")


def test_where_the_seconds_of_a_run_were() -> None:
    stages = {"prepare": 2.0, "train@vae-0": 9.0}
    real = {"whole_s": 20.0, "loops_s": {"vae-0": 7.0}, "stages_s": stages, "before_s": 5.0}
    real |= {"between_s": 1.0, "after_s": 3.0}
    found = orchestration.split_table(real, {**real, "whole_s": 12.0}, 2000)
    assert found["headings"] == ["seconds", "2,000 steps", "next to nothing to do"]
    assert [line[:2] for line in found["rows"]] == [
        ["all", "20.0"],
        ["before the stages", "5.0"],
        ["prepare", "2.0"],
        ["train@vae-0", "9.0 (7.0 the loop)"],
        ["between the stages", "1.0"],
        ["after the stages", "3.0"],
    ]
    assert found["rows"][0][2] == "12.0"


def test_a_report_is_a_file_that_can_be_read(tmp_path: Path) -> None:
    options = argparse.Namespace(json=tmp_path / "bench/ddim.json", threads=1)
    pairs.report("DDIM", [Row("a", "s", [1.0], [2.0], 1, more_is_better=False)], options)
    content = tables.read(tmp_path / "bench")["ddim"]
    assert content["commit"] == pairs.commit()
    assert tables.cells(content["rows"][0]) == ["a", "1", "2", "s", "2", "≥ 1", "met"]


MEASURE = """
echo $1 >> log
test $1 != two || test -e mended || exit 3
echo '{"seconds": 1}' > $3
"""


def test_make_bench_stops_at_what_fails_and_goes_on_with_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.sh").write_text(MEASURE)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/performance.md"
    page.write_text(PAGE)

    def bench(*options: str) -> tuple[int, str, list[str]]:
        """Its status, what it says, and what was measured."""
        words = [
            "make",
            "-f",
            str(root / "Makefile"),
            "-C",
            str(tmp_path),
            "-o",
            "install",
            "bench",
        ]
        words += ["BENCHES=one two three", f"BIN={Path(sys.executable).parent}", "BENCH=venv"]
        words += [f"measure_{name}=sh measure.sh {name}" for name in ("one", "two", "three")]
        (tmp_path / "log").write_text("")
        variables = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [*words, *options, "-o", "venv/.installed"],
            capture_output=True,
            text=True,
            env=variables,
        )
        return done.returncode, done.stderr, (tmp_path / "log").read_text().split()

    status, said, measured = bench()
    assert (status, measured) == (2, ["one", "two"])
    assert "The benchmark 'two' failed; .genarena/bench keeps what was measured." in said
    assert (tmp_path / ".genarena/bench/one.json").exists()
    assert page.read_text() == PAGE
    assert bench("-k")[2] == ["two", "three"]
    (tmp_path / "mended").touch()
    assert bench()[::2] == (0, ["two"])
    assert all(f"**{name}**" in page.read_text() for name in ("one", "two", "three"))
    assert bench()[::2] == (0, ["one", "two", "three"])
