"""Errors that a person can mend: one clear line, exit code 2, and nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

AWAY = 75  # exit status of a stage that may go well when it is tried again: EX_TEMPFAIL


class Outage(RuntimeError):
    """Something that others run is away; nothing is wrong with the input, try again later."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message says what, where and the nearest choice."""


class Unreachable(Outage, BadInput):
    """A server that was named does not answer: for a person bad input, for a schedule an outage."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of choices where nothing is near."""
    choices = list(choices)
    close = get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from: {', '.join(choices)}" if choices else ""


@contextmanager
def exit_on_bad_input(program: str) -> Iterator[None]:
    """Turn `BadInput` into its line on stderr and exit code 2."""
    try:
        yield
    except BadInput as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
