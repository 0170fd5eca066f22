"""docs/operations.md as commands, for the tests that look at them and those that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
SEPARATORS = {"|", "||", "&", "&&", ";", "(", ")"}
ANY = "00000000-0000-0000-0000-000000000000"  # stands for what a shell would put in


def headings() -> list[str]:
    """The page's sections, in order (`## …`)."""
    return re.findall(r"^## (.+)$", PAGE.read_text(), re.M)


def blocks(heading: str) -> list[str]:
    """The `sh` blocks below a heading, those of its sub-headings with them; meant for one shell.

    Raises KeyError where there is no such heading.
    """
    depth, found = None, []
    for part in re.split(r"(^#+ .+$)", PAGE.read_text(), flags=re.M):
        title = re.match(r"(#+) (.+)$", part)
        if title and depth is None and title[2] == heading:
            depth = len(title[1])
        elif title and depth is not None and len(title[1]) <= depth:
            break
        elif depth is not None:
            found += re.findall(r"^```sh\n(.*?)^```$", part, re.M | re.S)
    if depth is None:
        raise KeyError(f"no heading {heading!r} in {PAGE.name}")
    return found


def commands(block: str) -> list[list[str]]:
    """The words of every simple command of a block: pipes, lists and substitutions taken apart,
    assignments and redirections left out, `ANY` where a variable stands."""
    found: list[list[str]] = []
    for line in block.splitlines():
        for inner in re.findall(r"\$\(([^()]*)\)", line):
            found += commands(inner)
        line = re.sub(r"\$\([^()]*\)", ANY, line)
        line = re.sub(r"(?<=[\s\"':=])\$\{?(\w+)\}?(?=[\s\"':]|$)", ANY, line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in [*lexer, ";"]:
            if word in SEPARATORS:
                found += [words] if words else []
                words = []
            elif skip:
                skip = False
            elif word in ("<", ">"):
                skip = True
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return found
