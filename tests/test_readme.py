"""The README's tree names every module there is."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDERS = ("flows", "genarena", "models", "tasks")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_has_every_module(root: Path, folder: str) -> None:
    readme = (root / "README.md").read_text()
    words = set(readme[readme.index("## Where things are") :].split())
    families = {path.parent for path in root.glob("models/*/__init__.py")}
    modules = [
        path.name
        for path in (root / folder).rglob("*.py")
        if not path.name.startswith("__") and path.parent not in families
    ]
    assert len(modules) > 5
    assert not set(modules) - words
