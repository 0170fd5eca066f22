"""The sentences on top of the page follow from the table."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.reporting.note import note
from tasks.reporting.verdict import best, verdict


def row(family: str, **numbers: Any) -> dict[str, Any]:
    return {"family": family, "status": "ok", "reason": "", **numbers}


def scored(family: str, distance: float, deviation: float = 0.1, **more: Any) -> dict[str, Any]:
    own = {"frechet_distance": distance, "frechet_distance_std": deviation}
    return row(family, **own, frechet_distance_floor=1.5, **more)


def said(rows: list[dict[str, Any]]) -> str:
    return "\n".join(verdict(rows, "digits", "2,000 steps"))


def test_the_winner_is_named_with_its_number_and_the_floor() -> None:
    text = said([scored("dcgan", 2.0), scored("vae", 6.0)])
    assert text.startswith(
        "For digits at 2,000 steps: dcgan is closest to the data "
        "(Fréchet distance 2.00 ± 0.10; training images score 1.50)."
    )
    assert "vae" not in text


@pytest.mark.parametrize(("gap", "tied"), [(0.28, True), (0.29, False)])  # 2 sqrt(2) 0.1
def test_what_the_numbers_cannot_tell_apart_is_a_tie(gap: float, tied: bool) -> None:
    text = said([scored("dcgan", 2.0), scored("vae", 2.0 + gap), scored("gan", 9.0)])
    assert ("but vae cannot be told from it" in text) is tied
    assert ("dcgan is closest to the data" in text) is not tied
    assert "gan cannot" not in text


def test_the_deviation_of_seeds_comes_before_that_of_subsets() -> None:
    near = [scored("dcgan", 2.0), scored("vae", 2.5)]
    assert "cannot be told" not in said(near)
    seeds = [{**r, "frechet_distance_seed_std": 0.4} for r in near]
    assert "cannot be told" in said(seeds)


def test_reaching_the_floor_is_said() -> None:
    assert "no farther from the test images" in said([scored("dcgan", 1.69), scored("vae", 6.0)])
    assert "no farther" not in said([scored("dcgan", 1.71), scored("vae", 6.0)])


def test_sharpest_and_most_varied_may_be_others_than_the_winner() -> None:
    rows = [
        scored("dcgan", 2.0, precision=0.80, coverage=0.91, coverage_floor=0.97),
        scored("vae", 6.0, precision=0.95, coverage=0.905),
        scored("gan", 7.0, precision=0.80, coverage=0.5),
    ]
    text = said(rows)
    assert "Sharpest: vae; 95% of the samples" in text
    # within a point of each other, neither with a spread
    assert "Most varied: dcgan and vae; 91% of the test images are covered (as many" in text
    assert "97%" in text


def test_the_best_of_nothing_is_not_praised() -> None:
    rows = [scored(name, 30.0, precision=0.0, coverage=0.0) for name in ("dcgan", "vae")]
    assert "Sharpest" not in said(rows)
    assert "Most varied" not in said(rows)


def test_a_missing_metric_makes_no_sentence_and_no_winner() -> None:
    text = said([scored("dcgan", 2.0, coverage=0.9), row("transformer", bits_per_dim=2.0)])
    assert "dcgan is closest" in text
    assert "Sharpest" not in text
    assert "likelihood" not in text  # a single one has nothing to be lower than
    assert best([row("a", kid=float("nan")), row("b", kid=1.0)], "kid") == (row("b", kid=1.0), [])
    assert best([row("a")], "kid") is None


def test_likelihoods_are_compared_within_their_kind_alone() -> None:
    def probable(family: str, bits: float, kind: str) -> dict[str, Any]:
        own = {"bits_per_dim": bits, "bits_per_dim_std_error": 0.01, "likelihood_kind": kind}
        return row(family, **own)

    rows = [
        probable("vae", 1.0, "bound"),
        probable("pixelcnn", 1.5, "exact"),
        probable("realnvp", 1.8, "exact"),
        probable("glow", 1.52, "exact"),
    ]
    text = said(rows)
    assert "Of the likelihoods of kind exact, pixelcnn and glow: 1.500 bits/dim" in text
    assert "vae" not in text


def test_speed_is_compared_with_the_winner_and_only_where_it_matters() -> None:
    rows = [
        scored("ddpm", 2.0, sample_images_per_second=10.0),
        scored("vae", 6.0, sample_images_per_second=400.0),
        scored("gan", 7.0, sample_images_per_second=390.0),
    ]
    assert "Fastest to sample: vae, 40x ddpm." in said(rows)
    rows[0]["sample_images_per_second"] = 500.0
    assert "Fastest" not in said(rows)
    rows[0]["sample_images_per_second"] = 1000.0
    assert "Fastest to sample: ddpm, 2.5x vae." in said(rows)


def test_unequal_budgets_are_called_so() -> None:
    rows = [scored("dcgan", 2.0, budget="2,000 steps"), scored("vae", 6.0, budget="2,000 steps")]
    assert "Budgets" not in said(rows)
    rows[1]["budget"] = "10 minutes"
    assert said(rows).startswith("Budgets differ (2,000 steps, 10 minutes)")


def test_failures_are_told_and_nothing_is_claimed_where_nothing_finished() -> None:
    failed = {"family": "wgan", "status": "failed", "reason": "train: NaN"}
    assert "wgan failed: the table says why." in said([scored("dcgan", 2.0), failed])
    assert said([failed]) == "No family finished on digits: the table says why."
    alone = said([scored("dcgan", 2.0, coverage=0.9, precision=0.9)])
    assert "Only dcgan was measured" in alone
    assert "Sharpest" not in alone


def test_the_note_is_a_table_in_markdown_and_leaves_out_what_nobody_has() -> None:
    rows = [
        scored("dcgan", 2.0, rank=1, bits_per_dim=float("nan")),
        scored("vae", 6.0, rank=2, psnr=21.04),
        {"family": "gan", "status": "failed", "reason": "loss is nan", "rank": None},
    ]
    text = note(rows, "digits", "2,000 steps")
    assert text.startswith("- For digits at 2,000 steps: dcgan is closest to the data")
    table = text[text.index("| #") :].splitlines()
    assert table == [
        "| # | family | Fréchet distance | PSNR, dB |",
        "| --- | --- | --- | --- |",
        "| 1 | dcgan | 2.00 ± 0.10 | - |",
        "| 2 | vae | 6.00 ± 0.10 | 21.0 |",
        "| - | gan | - | - |",
        "",
        "- gan: loss is nan",
    ]
