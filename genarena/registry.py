"""`genarena registry`: what is registered, and back to the champion before."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.table import Table

from genarena.project import enter_project
from genarena.show import console
from tasks import tracking, versions
from tasks.environment import prepare_environment
from tasks.errors import exit_on_bad_input
from tasks.params import load_params


def show_versions(name: str) -> None:
    """`genarena registry list [NAME]`: every version, the newest of each model first."""
    with exit_on_bad_input("genarena"):
        enter_project()
        prepare_environment()
        params = load_params()
        client = tracking.connect(params)
        with versions.reaching(params):
            if name:
                models = [versions.registered(client, params, _full(params, name))]
            else:
                models = versions.everything(client)
            rows = [row for model in models for row in _rows(client, model)]
    if not rows:
        console.print("nothing is registered yet: make run registers what it trains")
        return
    scores = sorted({row[4][0] for row in rows if row[4][0]})
    table = Table(title=f"Registered versions; score: {' or '.join(scores)}, lower is better")
    for title in ("model", "version", "alias", "run", "score", "data", "when", "reason"):
        right = title in ("version", "score")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "reason")
    for *first, (name, value), data, when, reason in rows:
        shown = f"{name} {value}" if len(scores) > 1 else value
        table.add_row(*first, shown, data, when, reason)
    console.print(table)


def roll_back(name: str, reason: str) -> None:
    """`genarena registry rollback NAME`: the champion before this one is champion again."""
    with exit_on_bad_input("genarena"):
        enter_project()
        prepare_environment()
        params = load_params()
        client = tracking.connect(params)
        with versions.reaching(params):
            model = versions.registered(client, params, _full(params, name))
            restored, demoted = versions.roll_back(client, model.name, reason)
    console.print(
        f"{model.name}: version {restored} is champion again; version {demoted} is challenger",
        markup=False,
    )


def _full(params: Any, name: str) -> str:
    """The registered name behind what was typed: a family's name, or a URI's."""
    return versions.spelled(params, name).removeprefix("models:/").partition("@")[0].split("/")[0]


def _rows(client: Any, model: Any) -> list[tuple[Any, ...]]:
    aliases: dict[str, list[str]] = {}
    for alias, version in model.aliases.items():
        aliases.setdefault(str(version), []).append(alias)
    rows: list[tuple[Any, ...]] = []
    for version in sorted(versions.of(client, model.name), key=lambda v: -int(v.version)):
        number, tags = str(version.version), version.tags
        score = tags.get("score", "")
        when = datetime.fromtimestamp(version.creation_timestamp / 1000)
        rows.append(
            (
                model.name,
                number,
                ", ".join(sorted(aliases.get(number, []))) or "-",
                f"{tags.get('family', '-')}-{tags.get('seed', '-')}",
                (score, f"{float(tags[score]):.4g}" if score in tags else "-"),
                tags.get("data_sha256", "-")[:8],
                f"{when:%Y-%m-%d}",
                tags.get("reason", "-"),
            )
        )
    return rows
