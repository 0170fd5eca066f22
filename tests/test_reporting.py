"""The leaderboard says what the metrics files say, failures included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from models import store
from tasks.pictures import save_grid
from tasks.registry import judge
from tasks.reporting import figures, leaderboard, page, table
from tasks.reporting.spread import combine, spread
from tasks.runs import Run
from tests.conftest import tiny_images, tiny_model


def metrics_of(family: str, distance: float, weights: str, **changes: Any) -> dict[str, Any]:
    return {
        "family": family,
        "seed": 0,
        "status": "ok",
        "reason": "",
        "samples": 1000,
        "frechet_distance": distance,
        "frechet_distance_std": 0.1,
        "frechet_distance_floor": 1.5,
        "kid": 0.2,
        "kid_std": 0.01,
        "kid_std_error": 0.02,
        "kid_floor": 0.02,
        "class_share_min": 0.08,
        "frechet_distance_untrained": 90.0,
        "manifold_samples": 1000,
        "recall": 0.5,
        "recall_floor": 0.9,
        "coverage": 0.8,
        "coverage_floor": 0.97,
        "features": "classifier",
        "features_sha256": "f" * 64,
        "train_seconds": 61.0,
        "train_images_per_second": 1000.0,
        "sample_images_per_second": 5000.0,
        "parameters": 1234,
        "peak_memory_mb": 400.0,
        "hardware": "a <CPU>",
        "git": "abc",
        "protocol": 1,
        "provenance": {"weights_sha256": weights, "data_sha256": "d", "steps": 10, "best_step": 5},
        "not_applicable": {},
        **changes,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """dcgan beats vae, realnvp failed."""
    for family, distance in (("vae", 9.0), ("dcgan", 4.0)):
        folder = tmp_path / Run(family, 0).trained
        model = tiny_model(family)
        store.save(folder, model, family, model.state_dict())
        history = [
            {"step": s, "main/loss": 9.0 / s, "validation/frechet_distance": 8.0 / s}
            for s in (1, 2, 3)
        ]
        (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
        weights = store.describe(folder)["weights_sha256"]
        extra = (
            {
                "bits_per_dim": 1.8,
                "nats": 80.0,
                "nats_std_error": 0.4,
                "likelihood_kind": "bound",
                "likelihood_draws": 64,
            }
            if family == "vae"
            else {}
        )
        (tmp_path / "metrics").mkdir(exist_ok=True)
        for name in ("samples", "neighbours"):
            save_grid(tmp_path / Run(family, 0).evaluated / f"{name}.png", tiny_images(4), 4)
        text = json.dumps(metrics_of(family, distance, weights, **extra))
        (tmp_path / Run(family, 0).metrics).write_text(text)
    reason = {"stage": "train", "reason": "NonFiniteLoss: step 7, phase 'main': loss is nan"}
    (tmp_path / Run("realnvp", 0).failure).write_text(json.dumps(reason))
    return tmp_path


def rows_of(project: Path, seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    return leaderboard.load_families(("vae", "dcgan", "realnvp"), seeds, project)


def test_best_first_failed_last_with_its_reason(project: Path) -> None:
    rows = rows_of(project)
    assert [(r["family"], r["rank"], r["status"]) for r in rows] == [
        ("dcgan", 1, "ok"),
        ("vae", 2, "ok"),
        ("realnvp", None, "failed"),
    ]
    assert rows[2]["reason"] == "train: NonFiniteLoss: step 7, phase 'main': loss is nan"
    table = leaderboard.to_table(rows)
    assert list(table.columns) == leaderboard.COLUMNS
    assert pd.isna(table.loc[0, "bits_per_dim"])
    assert table.loc[1, "bits_per_dim"] == 1.8


def test_a_stale_failure_does_not_hide_a_restored_result(project: Path) -> None:
    """DVC can bring a former result back without running the stage that clears the record."""
    (project / Run("vae", 0).failure).write_text('{"stage": "train", "reason": "old"}')
    assert rows_of(project)[1]["status"] == "ok"


def test_metrics_of_other_weights_are_not_shown(project: Path) -> None:
    folder = project / Run("vae", 0).trained
    other = {n: t + 1 for n, t in tiny_model("vae").state_dict().items()}
    store.save(folder, tiny_model("vae"), "vae", other)
    row = next(r for r in rows_of(project) if r["family"] == "vae")
    assert row["status"] == "failed"
    assert "other weights" in row["reason"]


def test_missing_metrics_name_the_stage(project: Path) -> None:
    (project / Run("vae", 0).metrics).unlink()
    row = next(r for r in rows_of(project) if r["family"] == "vae")
    assert row["reason"] == "evaluate: no metrics"


def written(project: Path, family: str, **changes: Any) -> None:
    """Changes to a family's metrics file; None takes a metric out."""
    file = project / Run(family, 0).metrics
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


WHY = {"frechet_distance": "50 samples are too few for the covariance of 64 features"}


def test_where_no_family_has_a_frechet_distance_the_kernel_distance_ranks(project: Path) -> None:
    gone = {"frechet_distance": None, "frechet_distance_std": None, "frechet_distance_floor": None}
    written(project, "vae", **gone, kid=0.1, not_applicable=WHY)
    written(project, "dcgan", **gone, kid=0.3, not_applicable=WHY)
    rows = rows_of(project)
    assert [r["family"] for r in rows] == ["vae", "dcgan", "realnvp"]
    assert leaderboard.score(rows[0]) == "kid"
    assert "KID" in render(project)
    for family in ("vae", "dcgan"):  # nothing at all to rank by: still a page
        written(project, family, kid=None, bits_per_dim=None, coverage=None, manifold_samples=None)
    assert {r["rank"] for r in rows_of(project)} == {None}
    assert render(project).count(f"Not ranked: no frechet_distance: {WHY['frechet_distance']}") == 4


def render(project: Path) -> str:
    manifest = {
        "name": "digits",
        "counts": {"train": 1277, "validation": 186, "test": 334},
        "spec": {"shape": [1, 8, 8], "levels": 17, "classes": ["a", "b"]},
        "content_sha256": "d" * 64,
    }
    judge_ = {"task": "classes", "test_accuracy": 0.979}
    return page.render(rows_of(project), "digits", manifest, judge_, project, budget="2,000 steps")


def test_the_page_is_self_contained_and_complete(project: Path) -> None:
    html = render(project)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "@import" not in html
    assert "a lower bound on the likelihood" in html
    assert "vae, 64 draws" in html
    for words in ("4.00", "9.00", "1.800", "bound", "97.90 %", "floor", "1,277"):
        assert words in html, words
    assert "failed: train: NonFiniteLoss: step 7, phase &#39;main&#39;" in html
    assert "a &lt;CPU&gt;" in html  # escaped
    assert html.count('role="img"') >= 4
    assert "For digits at 2,000 steps: dcgan is closest to the data" in html
    assert "git commit <code>abc</code>" in html
    assert html.count("the training images nearest to them") == 4
    assert 'data-value="4.0"' in html  # what the table sorts by


def test_a_page_with_only_failures_still_renders(project: Path) -> None:
    for family in ("vae", "dcgan"):
        (project / Run(family, 0).metrics).unlink()
    assert render(project).count("failed:") == 3


def test_seeds_become_a_mean_and_their_deviation() -> None:
    runs = [
        metrics_of(
            "vae",
            distance,
            "w",
            seed=seed,
            class_shares=[share, 1 - share],
            by_class={"a": distance, "b": 1.0} if seed else {"a": distance},
        )
        for seed, distance, share in ((0, 4.0, 0.25), (1, 6.0, 0.5), (2, 8.0, 0.75))
    ]
    row = combine(runs)
    assert row["seeds"] == [0, 1, 2]
    assert row["frechet_distance"] == 6.0
    assert row["frechet_distance_seed_std"] == 2.0
    assert spread(row, "frechet_distance") == 2.0  # not the 0.1 of the subsets
    assert spread(combine(runs[:1]), "frechet_distance") == 0.1
    assert row["class_shares"] == [0.5, 0.5]
    assert row["by_class"] == {"a": 6.0}  # the first seed has no b
    assert row["parameters"] == 1234
    assert "parameters_seed_std" not in row
    assert "frechet_distance_std_seed_std" not in row
    shown = table.table([row])
    assert shown.cells[0][0] == ("6.00", "± 2.00", 6.0)


def test_what_one_seed_lacks_is_not_averaged_over_the_others() -> None:
    lacking = metrics_of("vae", 4.0, "w", seed=1, not_applicable={"kid": "too few samples"})
    del lacking["kid"]
    row = combine([metrics_of("vae", 4.0, "w"), lacking])
    assert "kid" not in row
    assert row["not_applicable"] == {"kid": "seed 1: too few samples"}


def test_a_seed_that_failed_is_told_and_leaves_the_others(project: Path) -> None:
    rows = rows_of(project, (0, 7))
    vae = next(row for row in rows if row["family"] == "vae")
    assert (vae["status"], vae["seeds"]) == ("ok", [0])
    assert vae["reason"] == "seed 7: train: no trained model"
    assert table.warnings(vae) == ["Not of every seed: seed 7: train: no trained model."]
    failed = next(row for row in rows if row["family"] == "realnvp")
    assert failed["status"] == "failed"
    assert "seed 0: train: NonFiniteLoss" in failed["reason"]


def test_a_family_without_the_number_that_ranks_is_shown_but_not_ranked(project: Path) -> None:
    """Its bits/dim, a smaller number, must not be set against the others' Fréchet distances."""
    file = project / Run("vae", 0).metrics
    found = json.loads(file.read_text())
    for name in ("frechet_distance", "frechet_distance_std", "frechet_distance_floor"):
        del found[name]
    found["not_applicable"]["frechet_distance"] = "the samples are not finite"
    file.write_text(json.dumps(found))
    ranks = {row["family"]: row["rank"] for row in rows_of(project)}
    assert ranks == {"dcgan": 1, "vae": None, "realnvp": None}
    assert [row["family"] for row in rows_of(project)] == ["dcgan", "vae", "realnvp"]
    html = render(project)
    assert "<p>frechet_distance: the samples are not finite</p>" in html
    assert "vae: Not ranked: no frechet_distance: the samples are not finite." in html
    (project / Run("dcgan", 0).metrics).unlink()
    assert rows_of(project)[0]["rank"] == 1  # alone, by its bits/dim


def test_the_caption_speaks_of_ranks_where_the_points_have_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "Numbers are the ranks of the table."
    shown = sum("frechet_distance" in row for row in rows_of(project))
    monkeypatch.setattr(figures, "FEW", shown)
    assert words not in render(project)
    monkeypatch.setattr(figures, "FEW", shown - 1)
    assert words in render(project)


def test_the_pareto_line_joins_what_nothing_beats_in_both() -> None:
    points = [(1.0, 9.0), (2.0, 4.0), (3.0, 5.0), (4.0, 4.0), (5.0, 1.0), (1.0, 10.0)]
    assert figures.pareto(points) == [(1.0, 9.0), (2.0, 4.0), (5.0, 1.0)]


def test_many_families_are_told_apart_and_named_where_there_is_room() -> None:
    def figure(count: int) -> str:
        rows = [
            {**metrics_of(f"family{i:02d}", 1.0 + i, "w", train_seconds=10.0**i), "rank": i + 1}
            for i in range(count)
        ]
        return figures.quality_against_cost(rows)

    few, many = figure(figures.FEW), figure(figures.FEW + 1)
    assert ">family00<" in few
    assert ">family00<" not in many  # the rank within the point instead
    assert f">{figures.FEW + 1}<" in many
    names = [f"family{i:02d}" for i in range(24)]
    assert len(set(figures.styles(names).values())) == 24
    curve = [{"step": 1, "validation/kid": 1.0}]
    assert all(
        f">{n}<" in figures.validation_curves({n: [curve] for n in names}, "kid", "KID")
        for n in names
    )


TAGS = {
    "data_sha256": "d",
    "features_sha256": "f",
    "protocol": "1",
    "samples": "100",
    "score": "frechet_distance",
    "frechet_distance": "5.0",
}


@pytest.mark.parametrize(
    ("candidate", "champion", "alias", "words"),
    [
        ({}, None, "champion", "first"),
        ({"frechet_distance": "4.9"}, {}, "champion", "beats"),
        ({"frechet_distance": "5.0"}, {}, "challenger", "does not beat"),
        ({"frechet_distance": "11.0"}, {}, "challenger", "does not beat"),  # as numbers, not text
        ({"frechet_distance": "1.0", "data_sha256": "e"}, {}, "challenger", "other data"),
        ({"frechet_distance": "1.0", "features_sha256": "e"}, {}, "challenger", "other features"),
        ({"frechet_distance": "1.0", "protocol": "2"}, {}, "challenger", "another protocol"),
        (
            {"frechet_distance": "1.0", "samples": "9"},
            {},
            "challenger",
            "another number of samples",
        ),
        ({"score": "bits_per_dim", "bits_per_dim": "1.0"}, {}, "challenger", "another metric"),
        (
            {"score": "bits_per_dim", "bits_per_dim": "1"},
            {"score": "bits_per_dim", "bits_per_dim": "2"},
            "champion",
            "bits_per_dim 1 beats",
        ),
    ],
)
def test_the_gate(
    candidate: dict[str, str], champion: dict[str, str] | None, alias: str, words: str
) -> None:
    verdict = judge({**TAGS, **candidate}, None if champion is None else {**TAGS, **champion})
    assert verdict.alias == alias
    assert words in verdict.reason


def test_columns_appear_with_their_first_number_and_floors_with_theirs() -> None:
    plain = metrics_of("dcgan", 4.0, "w")
    pairs = metrics_of("pix2pix", 5.0, "w", psnr=17.0, psnr_floor=9.0, condition_accuracy=0.875)
    assert "PSNR, dB ↑" not in table.table([plain]).titles
    both = table.table([plain, pairs])
    place = both.titles.index("PSNR, dB ↑")
    assert both.cells[0][place] is None
    cell = both.cells[1][place]
    assert cell is not None
    assert cell.text == "17.0"
    assert both.floors[place] == "9.0"
    asked = both.cells[1][both.titles.index("as asked ↑")]
    assert asked is not None
    assert asked.text == "87.5%"


def test_nats_are_shown_of_binarised_data_alone() -> None:
    known = {"nats": 88.0, "nats_std_error": 0.3, "bits_per_dim": 0.16, "likelihood_kind": "bound"}
    binary = table.table([metrics_of("vae", 4.0, "w", **known, levels=2)])
    assert "88.00" in [cell.text for cell in binary.cells[0] if cell]
    assert "nats ↓" not in table.table([metrics_of("vae", 4.0, "w", **known, levels=256)]).titles


def test_mode_collapse_is_called_by_its_name() -> None:
    assert table.warnings(metrics_of("dcgan", 4.0, "w", coverage=0.49)) == []
    (warning,) = table.warnings(metrics_of("dcgan", 4.0, "w", coverage=0.48))
    assert "Mode collapse" in warning
    assert "48%" in warning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_duplicate_share": 0.3, "train_duplicate_share_floor": 0.05}, "Memorised: 30% of"),
        ({"train_duplicate_share": 0.3, "train_duplicate_share_floor": 0.25}, None),
        ({"nearest_train_ratio": 0.3}, "Memorised: its samples lie 0.30 times as far"),
        ({"nearest_train_ratio": 0.4}, None),
        ({"nearest_train_ratio": 0.1, "distinct_samples": 1}, "Every sample is the same image."),
    ],
)
def test_memorised_is_a_word_on_the_page(changes: dict[str, Any], words: str | None) -> None:
    found = table.warnings(metrics_of("dcgan", 4.0, "w", **changes))
    assert [words] == [text[: len(words)] for text in found] if words else found == []


def test_the_new_columns_have_their_floors_and_notes() -> None:
    row = metrics_of(
        "dcgan",
        4.0,
        "w",
        frechet_distance_train=3.5,
        frechet_distance_train_floor=1.25,
        inception_score=8.125,
        inception_score_floor=9.5,
        class_frechet_distance_max=7.75,
        class_frechet_distance_max_of="eight",
        nearest_train_ratio=0.91,
        train_duplicates=1,
    )
    found = table.table([row])
    shown = dict(zip(found.titles, zip(found.cells[0], found.floors, strict=True), strict=True))
    assert shown["to training ↓"] == (("3.50", "", 3.5), "1.25")
    assert shown["inception score ↑"] == (("8.12", "", 8.125), "9.50")
    assert shown["worst class ↓"] == (("7.75", "eight", 7.75), "")
    assert shown["nearest training image"] == (("0.91", "1 copy", 0.91), "")
    assert shown["KID ↓"] == (("0.200", "± 0.020", 0.2), "0.020")
