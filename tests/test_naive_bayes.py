"""Naive Bayes: the counts are the counts, and the classes are summed over exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.data import Batch, DataSpec
from models.naive_bayes import NaiveBayes, NaiveBayesConfig

CLASSES = DataSpec(shape=(1, 2, 2), levels=3, classes=("a", "b", "never"))


def fitted(data: DataSpec = CLASSES, alpha: float = 0.5) -> tuple[NaiveBayes, Batch]:
    torch.manual_seed(0)
    label = (torch.rand(50) < 0.3).long()
    x = torch.randint(0, 3, (50, *data.shape))
    x[label == 1, 0, 0] = 2
    batch = Batch(x.to(torch.uint8), label if data.classes else None)
    model = NaiveBayes(NaiveBayesConfig(alpha=alpha), data)
    assert not model.converged
    loss = model.fit(batch)["loss"]
    assert float(loss) == pytest.approx(-float(model.log_prob(batch.x).mean()), rel=1e-5)
    assert model.converged
    return model, batch


@pytest.mark.parametrize("classes", [(), ("a", "b", "never")])
def test_probabilities_sum_to_one(classes: tuple[str, ...]) -> None:
    model, _ = fitted(CLASSES.model_copy(update={"classes": classes}))
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    assert float(model.log_prob(every).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_it_is_the_sum_over_classes_of_smoothed_counts() -> None:
    model, batch = fitted()
    assert batch.label is not None
    x = batch.x.flatten(1)
    point, total = torch.tensor([2, 0, 1, 2]), 0.0
    for group in range(2):
        rows = x[batch.label == group]
        shares = ((rows == point).sum(0) + 0.5) / (len(rows) + 1.5)
        total += len(rows) / len(x) * float(shares.prod())
    assert float(model.log_prob(point.view(1, 1, 2, 2)).exp()) == pytest.approx(total, rel=1e-5)


def test_samples_follow_label_shares_and_temperature() -> None:
    model, batch = fitted()
    assert batch.label is not None
    torch.manual_seed(1)
    ones = model.sample(4000, label=torch.ones(4000, dtype=torch.long))
    expected = model.log_table[1].exp()[:, 2]
    assert torch.allclose((ones.flatten(1) == 2).float().mean(0), expected, atol=0.03)
    mixed = model.sample(4000)
    share = batch.label.float().mean()
    corner = share * expected[0] + (1 - share) * model.log_table[0].exp()[0, 2]
    assert float((mixed[:, 0, 0, 0] == 2).float().mean()) == pytest.approx(float(corner), abs=0.03)
    cold = model.sample(5, temperature=0)
    assert (cold.flatten(1) == model.log_table[0].argmax(1)).all()
    assert model.conditions == {"label"}


def test_without_classes_it_takes_no_label_and_tables_have_a_limit() -> None:
    assert fitted(CLASSES.model_copy(update={"classes": ()}))[0].conditions == frozenset()
    huge = DataSpec(shape=(3, 256, 256), levels=256, classes=tuple("0123456789"))
    assert "entries" in str(NaiveBayes.unsuited(huge))
    assert NaiveBayes.unsuited(CLASSES) is None
