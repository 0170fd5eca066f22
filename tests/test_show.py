"""The leaderboard in a terminal, wide or narrow, and in Prefect's UI."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from flows import artifacts
from genarena import show
from tasks.params import Params
from tasks.reporting import leaderboard
from tests.test_reporting import metrics_of


@pytest.mark.parametrize(
    ("width", "there", "left_out"),
    [
        (140, ("KID", "coverage", "bits/dim", "PSNR", "training"), ()),
        (75, ("Fréchet dist.", "coverage", "bits/dim"), ("KID", "PSNR", "training")),
    ],
)
def test_a_narrow_window_has_fewer_columns_and_whole_names(
    width: int,
    there: tuple[str, ...],
    left_out: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    more = {"bits_per_dim": 1.9, "likelihood_kind": "exact", "psnr": 20.0, "anomaly_auroc": 0.9}
    rows = [
        {**metrics_of(name, 3.0, "w", **more), "rank": i + 1, "seeds": [0]}
        for i, name in enumerate(("flow_matching", "naive_bayes"))
    ]
    lost = {"family": "gan", "status": "failed", "reason": "train: NaN", "rank": None, "seeds": [0]}
    leaderboard.to_table([*rows, lost]).to_csv("reports/leaderboard.csv", index=False)
    console = Console(width=width, highlight=False, record=True)
    monkeypatch.setattr(show, "console", console)
    show.show_leaderboard(Params(families=("gan",), models={"gan": {}}))
    text = console.export_text()
    assert "flow_matching" in text
    assert "3.00 ± 0.10" in text
    assert "gan failed: train: NaN" in text
    assert "\u2026" not in text
    assert all(title in text for title in there)
    assert not any(title in text for title in left_out)


def test_prefects_ui_has_the_verdict_a_short_table_and_all_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    rows = [{**metrics_of("gmm", 3.0, "w", psnr=20.123456), "rank": 1, "seeds": [0], "reason": ""}]
    leaderboard.to_table(rows).to_csv("reports/leaderboard.csv", index=False)
    words, table = Mock(), Mock()
    monkeypatch.setattr(artifacts, "create_markdown_artifact", words)
    monkeypatch.setattr(artifacts, "create_table_artifact", table)
    monkeypatch.setattr(leaderboard, "load_families", lambda *_: rows)
    artifacts.show_leaderboard(Params(families=("gmm",), models={"gmm": {}}))
    told = words.call_args.args[0]
    assert told.startswith("## digits\n\n- Only gmm was measured")
    assert "| 1 | gmm | 3.00" in told
    assert table.call_args.args[0][0]["psnr"] == 20.1235
    assert table.call_args.args[0][0]["reason"] is None
    assert all(call.call_args.kwargs["description"] for call in (words, table))
