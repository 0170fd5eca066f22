"""What a family is asked for when it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import GenerativeModel
from tasks.data.shards import Split

LARGEST_VALUES = 500 * 784  # in one batch of samples: networks hold many numbers for each


def ask(model: GenerativeModel, split: Split, n: int) -> dict[str, Tensor]:
    """The model's conditions from the first `n` rows of `split`, from the start again at its end.

    A source is asked for once: the second time it would tell nothing new.
    """
    given = {"label": split.label, "source": split.source, "text": split.text}
    asked = {}
    for name in sorted(model.conditions):
        rows = given[name]
        if rows is None and name not in type(model).conditions:
            continue  # an option that this data says nothing of: text without a prompt
        assert rows is not None
        count = min(n, len(rows)) if "source" in model.conditions else n
        asked[name] = torch.from_numpy(rows[np.arange(count) % len(rows)])
    return asked


def draw(
    model: GenerativeModel,
    split: Split,
    n: int,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """`n` samples (fewer where the split has fewer sources) asked for as `split` has it."""
    asked = ask(model, split, n)
    n = min([n, *map(len, asked.values())])
    batch_size = min(batch_size, LARGEST_VALUES // model.data.dimensions or 1)
    parts, shown = [], time.monotonic()
    for start in range(0, n, batch_size):
        count = min(batch_size, n - start)
        given: dict[str, Any] = {
            name: rows[start : start + count].to(model.device) for name, rows in asked.items()
        }
        parts.append(model.sample(count, **given).cpu())
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"sampled {start + count:,}/{n:,}")
    return torch.cat(parts)
