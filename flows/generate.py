"""Samples of a registered model in bulk, kept with DVC."""

from __future__ import annotations

import json
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, State

from flows.process import allow, stop_all
from flows.stage import as_own, run_stage
from tasks.drawing import GenerateSettings
from tasks.generate import GENERATED


@flow(name="generate")
def generate(settings: GenerateSettings = GenerateSettings()) -> State[Any]:  # noqa: B008
    """Draw samples of a registered model, any conditions, side by side on Ray.

    `data/generated/<name>` gets Parquet, pictures and a note; DVC keeps it.
    """
    allow()
    try:
        words = ("tasks.generate", "--settings", settings.model_dump_json())
        state = run_stage("generate", {}, words, return_state=True)
    finally:
        stop_all()
    if state.is_failed():
        return as_own(state)
    _show()
    return Completed()


def _show() -> None:
    """The newest result's note."""
    newest = max(GENERATED.glob("*/generated.json"), key=lambda file: file.stat().st_mtime)
    facts = json.loads(newest.read_text())
    lines = [f"## {facts['samples']:,} samples in `{newest.parent}`", ""]
    lines += [f"- {name}: `{facts[name]}`" for name in ("model", "version", "digest")]
    lines += ["", "```json", json.dumps(facts["settings"], indent=2), "```", ""]
    lines += [f"For git: `{newest.parent}.dvc`"]
    said = "Where the samples are, and what they are samples of"
    create_markdown_artifact("\n".join(lines), key="generated", description=said)
