"""Prefect's database of a project: its folder, and a copy of one that is made once.

Prefect builds a new one by all of its migrations, which takes 12 s of a processor; a copy of what
they led to takes none. `make install` makes it, beside the packages and for their version, by
those same migrations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

FILE = "prefect.db"
ELSEWHERE = "PREFECT_API_DATABASE_CONNECTION_URL"
MADE = Path(sys.prefix, "share", "genarena", f"prefect-{version('prefect')}.db")


def prepare_home(home: Path) -> None:
    """The folder, for Prefect makes none; and in it the database, where there is none yet."""
    home.mkdir(parents=True, exist_ok=True)
    if ELSEWHERE in os.environ or (home / FILE).exists() or not MADE.exists():
        return
    with tempfile.TemporaryDirectory(dir=home) as folder:
        copy = Path(shutil.copyfile(MADE, Path(folder, FILE)))
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(copy, home / FILE)


def make() -> None:
    """Make the one that is copied, where this environment has none."""
    if MADE.exists():
        return
    MADE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MADE.parent) as home:
        os.environ["PREFECT_HOME"] = home
        os.environ.pop(ELSEWHERE, None)
        asyncio.run(_migrate())
        copy = Path(home, MADE.name)
        with sqlite3.connect(Path(home, FILE)) as made, sqlite3.connect(copy) as target:
            made.backup(target)  # with what is still in its log
        copy.replace(MADE)


async def _migrate() -> None:
    from prefect.server.database.dependencies import provide_database_interface

    database = provide_database_interface()
    await database.create_db()
    await (await database.engine()).dispose()
