"""Which of the families becomes the generator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import register
from tasks.params import EvaluationConfig


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({"vae": 1, "dcgan": 2}, "vae"),
        ({"pix2pix": 1, "dcgan": 2}, "dcgan"),  # what translates generates nothing by itself
        ({"pix2pix": 1, "dcgan": None}, None),  # without the number that ranks: nobody knows
    ],
)
def test_the_best_ranked_that_needs_no_source_is_the_generator(
    ranks: dict[str, int | None], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, str] = {}

    def version(client: Any, name: str, row: dict[str, Any], *_: Any) -> dict[str, str]:
        made[name] = row["family"]
        return {}

    monkeypatch.setattr(register, "_version", version)
    monkeypatch.setattr(register.tracking, "connect", lambda params: None)
    monkeypatch.setattr(register.tracking, "run_of", lambda *_: "run")
    rows = [{"family": family, "seed": 0, "rank": rank} for family, rank in ranks.items()]
    params: Any = SimpleNamespace(
        dataset=SimpleNamespace(title="digits"), evaluation=EvaluationConfig()
    )
    register._register(params, rows, Path())
    assert {f"digits-{family}" for family in ranks} == made.keys() - {"digits-generator"}
    assert made.get("digits-generator") == expected
