"""Budgets: what an image and a FLOP is, and that every machine buys the same steps with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import GenerativeModel, Phase
from models.config import OptimizerConfig
from models.data import Batch
from tasks.errors import BadInput
from tasks.params import load_params
from tasks.training.checks import check
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.flops import _count, count_flops
from tasks.training.loop import Outcome, train
from tests.conftest import TINY, tiny_data, tiny_images, tiny_model

IMAGES, B = 40, 8


def config(budget: Budget | None = None, **changes: Any) -> TrainConfig:
    settings = {
        "batch_size": B,
        "budget": budget or Budget(steps=5),
        "checkpoint_every": 100,
        "precision": "fp32",
        **changes,
    }
    return TrainConfig(**settings)


def run(family: str, directory: Path, budget: Budget, **options: Any) -> Outcome:
    model = tiny_model(family)
    return train(model, tiny_data(IMAGES, model.data), config(budget), directory, **options)


class Bare(GenerativeModel):
    """Whose cost can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__(None, TINY)
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 3)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("main", (self,), OptimizerConfig()),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        return {"loss": self.cost(batch.x.flatten(1).float())}

    def cost(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).mean()

    def sample(self, n: int, **options: Any) -> Tensor:
        raise NotImplementedError


class Attentive(Bare):
    """Sixteen tokens of four numbers that look at each other."""

    def cost(self, x: Tensor) -> Tensor:
        tokens = self.first(x).view(-1, 1, 4, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean()


class Pairwise(Bare):
    """Every example is held against every other: the cost is no straight line."""

    def cost(self, x: Tensor) -> Tensor:
        return (self.first(x) @ x[:, :16].T).mean()


def cost_of(model: GenerativeModel, **changes: Any) -> int:
    return count_flops(model, TrainData(tiny_images(IMAGES)), config(**changes))["main"]


def test_a_cost_is_what_it_is_by_hand() -> None:
    """Two for each weight and row forward; backward as many for the weights, and as many again
    for what they were multiplied with, except for the data."""
    first, second = 2 * B * 64 * 16, 2 * B * 16 * 3
    assert cost_of(Bare()) == 2 * first + 3 * second
    product = 2 * B * 4 * 4 * 4  # of queries and keys, or of attention and values
    assert cost_of(Attentive()) == 2 * first + 2 * product + 4 * product
    pairs = 2 * B * B * 16
    assert cost_of(Pairwise()) == 2 * first + 2 * pairs


def test_precision_and_compilation_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cost_of(Attentive())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compiled, a loss is no longer counted")

    monkeypatch.setattr(torch, "compile", never)
    assert cost_of(Attentive(), precision="bf16", compile=True) == plain


def test_few_rows_tell_the_cost_of_a_batch_and_change_nothing(family: str) -> None:
    model = tiny_model(family)
    data = tiny_data(IMAGES, model.data)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = count_flops(model, data, config())
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(costs) == {phase.name for phase in model.phases()}
    assert all(cost > 0 for cost in costs.values())
    assert costs == (_count(model, data, config(), B) if costs else {})


def test_spending_is_counted_phase_by_phase(tmp_path: Path) -> None:
    """A critic's repeats read new images and cost again; a regulariser costs when it runs."""
    spent = run("wgan", tmp_path / "wgan", Budget(steps=5)).progress
    assert spent.images == 5 * 2 * B  # n_critic is 2
    once = spent.phase_flops
    assert spent.flops == 5 * (2 * once["critic"] + once["generator"])
    spent = run("stylegan2", tmp_path / "stylegan2", Budget(steps=18)).progress
    assert spent.images == 18 * B
    once = spent.phase_flops
    runs = {"generator": 18, "discriminator": 18, "path_length": 5, "r1": 2}
    assert spent.flops == sum(n * once[name] for name, n in runs.items())


@pytest.mark.parametrize("unit", ["images", "flops"])
def test_the_step_that_reaches_the_budget_is_the_last_also_after_a_resume(
    unit: str, tmp_path: Path
) -> None:
    five = run("wgan", tmp_path / "five", Budget(steps=5)).progress
    amount = getattr(five, unit)
    for more, steps in ((0, 5), (1, 6), (-1, 5)):
        budget, folder = Budget(**{unit: amount + more}), tmp_path / f"{more}"
        straight = run("wgan", folder / "straight", budget)
        assert straight.finished
        assert straight.progress.step == steps
        calls = iter(range(100))
        cut = run("wgan", folder / "cut", budget, should_stop=lambda calls=calls: next(calls) == 2)
        assert (cut.finished, cut.progress.step) == (False, 3)
        resumed = run("wgan", folder / "cut", budget).progress
        assert (resumed.step, resumed.images, resumed.flops) == (
            straight.progress.step,
            straight.progress.images,
            straight.progress.flops,
        )


def test_a_resume_does_not_count_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has learnt could cost another amount: what was counted first stays."""
    from tasks.training import loop

    first = run("vae", tmp_path, Budget(steps=2)).progress
    monkeypatch.setattr(loop, "count_flops", lambda *_: {"main": 1})
    again = run("vae", tmp_path, Budget(steps=4)).progress
    assert first.flops
    assert again.flops == 2 * first.flops


def test_what_is_fitted_has_no_flops(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ValueError, match="a budget of flops, but they are not counted"):
        run("gmm", tmp_path, Budget(flops=1e9))
    params = load_params(root / "params.yaml")
    train_config = params.train.model_copy(update={"budget": Budget(flops=1e9)})
    manifest = {"counts": {"train": 1000}, "spec": json.loads(TINY.model_dump_json())}
    changed = params.model_copy(update={"train": train_config})
    with pytest.raises(BadInput, match=r"train\.budget: flops, but gmm is fitted.*use steps, im"):
        check("gmm", changed, manifest)
    check("vae", changed, manifest)


def test_loss_selects_where_there_is_one_phase(root: Path) -> None:
    params = load_params(root / "params.yaml")
    train_config = params.train.model_copy(update={"select": "loss"})
    params = params.model_copy(update={"train": train_config})
    manifest = {"counts": {"train": 1000}, "spec": json.loads(TINY.model_dump_json())}
    for family, words in (
        ("dcgan", r"2 of them \(discriminator, generator\), which do not add up"),
        ("gmm", "fitted, not descended"),
    ):
        with pytest.raises(BadInput, match=rf"train\.select: loss, but {family}.*{words}.*auto"):
            check(family, params, manifest)
    check("vae", params, manifest)


def test_budgets_read_as_they_are_written() -> None:
    assert [str(Budget(**b)) for b in ({"steps": 20}, {"minutes": 1.5}, {"flops": 1e15})] == [
        "20 steps",
        "1.5 minutes",
        "1e+15 flops",
    ]
