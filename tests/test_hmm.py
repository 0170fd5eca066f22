"""The hidden Markov model: hmmlearn's likelihood, Baum-Welch's ascent, prompts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hmmlearn.hmm import CategoricalHMM

from models.data import Batch, DataSpec
from models.hmm import HMM, HMMConfig
from tests.conftest import tiny_images

DATA = DataSpec(shape=(1, 4, 4), levels=4)
TEXT = DataSpec(shape=(6,), levels=256, modality="text")


def small(data: DataSpec = DATA, **changes: float) -> HMM:
    torch.manual_seed(0)
    return HMM(HMMConfig(**{"states": 3, **changes}), data)


def fit(model: HMM, steps: range, n: int = 30) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        losses.append(float(model.fit(Batch(tiny_images(n, DATA)))["loss"]))
    return losses


def test_probabilities_sum_to_one() -> None:
    model = small(DataSpec(shape=(3, 1, 2), levels=2))
    every = torch.tensor(list(itertools.product(range(2), repeat=6))).view(-1, 3, 1, 2)
    assert float(model.log_prob(every).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_log_prob_is_hmmlearns_score() -> None:
    model = small()
    fit(model, range(3))
    reference = CategoricalHMM(3, n_features=4)
    reference.startprob_ = model.start.numpy()
    reference.transmat_ = model.transition.numpy()
    reference.emissionprob_ = model.emission.numpy()
    x = tiny_images(5, DATA, seed=1)
    scores = [reference.score(row.reshape(-1, 1).long().numpy()) for row in x]
    np.testing.assert_allclose(model.log_prob(x), scores, rtol=1e-5)


def test_baum_welch_never_lowers_the_likelihood() -> None:
    model = small(alpha=1e-6, tol=0.0)
    losses = fit(model, range(15))
    assert (np.diff(losses) < 1e-9).all()
    assert losses[-1] < losses[0] - 0.5
    now = -float(model.log_prob(tiny_images(30, DATA)).mean())
    assert now < losses[-1] + 1e-4


@pytest.mark.parametrize("values", [10_000, 160])
def test_resumed_from_the_state_is_straight(values: int) -> None:
    """Also where each iteration sees another part of the split."""
    straight, first = small(fit_values=values), small(fit_values=values)
    fit(straight, range(5))
    fit(first, range(2))
    resumed = HMM(first.config, DATA)
    resumed.load_state_dict(first.state_dict())
    fit(resumed, range(2, 5))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_parts_of_the_split_teach_what_the_whole_does() -> None:
    whole, parts = small(iterations=40, tol=0), small(iterations=40, fit_values=960)
    x, n = tiny_images(120, DATA), 0
    for model in (whole, parts):
        while not model.converged:
            torch.manual_seed(n := n + 1)
            model.fit(Batch(x))
    assert int(parts.iteration) == 40
    apart = whole.log_prob(x).mean() - parts.log_prob(x).mean()
    assert abs(float(apart)) < 0.04 * abs(float(whole.log_prob(x).mean()))


def test_samples_follow_the_model() -> None:
    model = small(DataSpec(shape=(1, 1, 3), levels=2))
    every = torch.tensor(list(itertools.product(range(2), repeat=3))).view(-1, 1, 1, 3)
    drawn = model.sample(20_000).flatten(1).long() @ torch.tensor([4, 2, 1])
    found = torch.bincount(drawn, minlength=8) / 20_000
    assert torch.allclose(found, model.log_prob(every).exp(), atol=0.015)


def cyclic() -> HMM:
    """Says a, b, c, a, b, c, and so on."""
    model = small(TEXT)
    symbols = torch.tensor(list(b"abc"))
    model.start.copy_(torch.tensor([1.0, 0, 0]))
    model.transition.copy_(torch.eye(3).roll(1, 1))
    model.emission.fill_(1e-9)
    model.emission[torch.arange(3), symbols] = 1.0
    model.emission.div_(model.emission.sum(1, keepdim=True))
    return model


def test_a_prompt_is_continued_and_a_stop_ends_it() -> None:
    model = cyclic()
    prompt = torch.tensor([list(b"ab")] * 2, dtype=torch.uint8)
    assert bytes(model.sample(2, text=prompt)[1].tolist()) == b"cabcab"
    assert bytes(model.sample(1, max_tokens=4)[0].tolist()) == b"abca"
    stopped = model.sample(2, text=prompt, max_tokens=7, stop="ca")
    assert bytes(stopped[0].tolist()) == b"ca\0\0\0\0\0"
    assert model.sample(3, text=prompt[:0].new_zeros(3, 0)).shape == (3, 6)
    greedy = small(TEXT).sample(4, temperature=0)
    assert (greedy == greedy[0]).all()


def test_channels_of_a_pixel_are_neighbours() -> None:
    model = small(DataSpec(shape=(3, 2, 2), levels=16))
    x = torch.arange(12).view(1, 3, 2, 2)
    assert model._sequences(x)[0, :4].tolist() == [0, 4, 8, 1]
    assert torch.equal(model._examples(model._sequences(x)).long(), x)
