"""Gated PixelCNN: its order, its total probability, and sampling from cached maps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from models.data import Batch, DataSpec
from models.pixelcnn import PixelCNN, PixelCNNConfig

SMALL = {"width": 6, "layers": 3, "first_kernel": 5, "kernel": 3, "hidden": 7}


def small(
    shape: tuple[int, int, int],
    levels: int,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
    **changes: object,
) -> PixelCNN:
    """Evaluation mode, with logits `spread` times as far apart as at the start of training."""
    torch.manual_seed(0)
    data = DataSpec(shape=shape, levels=levels, classes=("a", "b", "c"))
    model = PixelCNN(PixelCNNConfig(**{**SMALL, **changes}), data).to(dtype).eval()
    with torch.no_grad():
        model.output.weight.mul_(spread)
    return model


def every(shape: tuple[int, int, int], levels: int) -> torch.Tensor:
    """All images there are."""
    grids = itertools.product(range(levels), repeat=math.prod(shape))
    return torch.tensor(list(grids), dtype=torch.uint8).view(-1, *shape)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 3), ((3, 1, 2), 2), ((3, 2, 1), 2)])
@torch.no_grad()
def test_probabilities_sum_to_one(
    shape: tuple[int, int, int], levels: int, conditional: bool
) -> None:
    model = small(shape, levels, torch.float32, spread=10, class_conditional=conditional)
    log_prob = model.log_prob(every(shape, levels))
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(log_prob.std()) > 0.1  # not the uniform distribution, which proves little


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 4, 4), (2, 1, 5), (2, 5, 1)], ids=str)
def test_a_value_depends_on_all_before_it_and_on_nothing_else(shape: tuple[int, int, int]) -> None:
    """No peeking, and no blind spot: rows from the top, pixels from the left, then colours."""
    model = small(shape, 3, width=24, layers=6, first_kernel=3, hidden=24)  # no dead colour
    x = (torch.rand(1, *shape, dtype=torch.float64) * 2 - 1).requires_grad_()
    logits = model.logits(x).flatten(1, 3)[0]
    for position, row in enumerate(logits):
        weighted = (row * torch.randn(3, dtype=torch.float64)).sum()
        (gradient,) = torch.autograd.grad(weighted, x, retain_graph=True, allow_unused=True)
        reached = gradient.permute(0, 2, 3, 1).flatten() != 0
        assert reached[:position].all()
        assert not reached[position:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "levels", "changes"),
    [
        ((1, 6, 5), 2, {}),
        ((3, 4, 3), 4, {"class_conditional": True}),
        ((2, 3, 1), 3, {"layers": 1}),
        ((1, 1, 7), 5, {"first_kernel": 3, "kernel": 5}),
    ],
)
def test_cached_sampling_is_naive_sampling(
    shape: tuple[int, int, int],
    levels: int,
    changes: dict[str, object],
    dtype: torch.dtype,
    temperature: float,
) -> None:
    model = small(shape, levels, dtype, spread=3, **changes)
    found = []
    for draw in (model.sample, model.sample_naive):
        torch.manual_seed(1)
        found.append(draw(9, temperature=temperature))
    assert torch.equal(*found)
    assert temperature == 0 or len(found[0].unique()) == levels


@torch.no_grad()
def test_samples_come_as_often_as_their_probability_says() -> None:
    shape, n = (2, 1, 2), 40_000
    model = small(shape, 2, torch.float32, spread=10)
    samples = model.sample(n).flatten(1).long()
    shares = torch.bincount(samples @ torch.tensor([8, 4, 2, 1]), minlength=16) / n
    expected = model.log_prob(every(shape, 2)).exp()
    assert float((shares - expected).abs().max()) < 0.01  # four standard deviations
    assert float(expected.max()) > 0.1


def test_classes_condition_and_their_mixture_is_the_likelihood() -> None:
    model = small((1, 3, 3), 4, class_conditional=True)
    x = torch.randint(0, 4, (5, 1, 3, 3), dtype=torch.uint8)
    labels = torch.arange(3)
    parts = torch.stack([model._log_prob(x, labels[i].expand(5)) for i in range(3)])
    assert float((parts[0] - parts[1]).abs().min()) > 1e-3
    assert torch.allclose(model.log_prob(x).exp(), parts.exp().mean(0), rtol=1e-10)
    loss = model.losses(Batch(x, labels[1].expand(5)), "main")["loss"]
    assert torch.allclose(loss, -parts[1].mean() / (9 * math.log(2)))
    with pytest.raises(ValueError, match="no classes"):
        PixelCNN(PixelCNNConfig(class_conditional=True), DataSpec(shape=(1, 3, 3), levels=2))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="odd"):
        PixelCNNConfig(kernel=4)
    with pytest.raises(ValueError, match="at least 3"):
        PixelCNN(PixelCNNConfig(width=2), DataSpec(shape=(3, 8, 8), levels=4))
