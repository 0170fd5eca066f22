"""What makes the loop fast changes no bit: a loop as one writes it down, held against it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import OptimizerConfig
from tasks.training.average import MovingAverage
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import Data
from tasks.training.loop import train
from tasks.training.optim import clip_gradients, lay_out, learning_rate, seed_noise
from tasks.training.turns import fold_seed
from tests.conftest import suited_data, tiny_batch, tiny_data, tiny_model

KINDS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
STEPS, BATCH, DECAY = 5, 8, 0.6  # a decay that is reached, so that both of its branches are


def plain(model: GenerativeModel, data: Data) -> dict[str, Tensor]:
    """Train `model`, and return the moving average of its state."""
    optimizers: dict[Any, torch.optim.Optimizer] = {}
    phases, average = model.phases(), copy.deepcopy(model)
    draws = max(phase.repeats for phase in phases)
    for step in range(STEPS):
        for phase in (phase for phase in phases if step % phase.every == 0):
            settings = phase.optimizer
            mine = [p for module in phase.modules for p in module.parameters()]
            if phase[1:3] not in optimizers:
                betas = {} if settings.name in ("rmsprop", "sgd") else {"betas": settings.betas}
                optimizers[phase[1:3]] = KINDS[settings.name](
                    mine, settings.lr, weight_decay=settings.weight_decay, foreach=False, **betas
                )
            optimizer = optimizers[phase[1:3]]
            for repeat in range(phase.repeats):
                batch = data.batch(step * draws + repeat, BATCH, 0, Comm())
                torch.manual_seed(fold_seed(0, step, phase.name, repeat))
                model.requires_grad_(False)
                for parameter in mine:
                    parameter.requires_grad_(True)
                model.losses(batch, phase.name)["loss"].backward()
                if settings.clip_grad_norm is not None:
                    nn.utils.clip_grad_norm_(mine, settings.clip_grad_norm, foreach=False)
                optimizer.param_groups[0]["lr"] = learning_rate(settings, step)
                optimizer.step()
                model.zero_grad()
                with torch.no_grad():
                    model.after_step(phase.name)
        decay = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, seen in zip(_tensors(average), _tensors(model), strict=True):
                if step and kept.is_floating_point():
                    kept.lerp_(seen, 1 - decay)
                else:
                    kept.copy_(seen)
    return average.state_dict()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def looped(model: GenerativeModel, data: Data, directory: Path) -> dict[str, Tensor]:
    """The same by the loop."""
    found: dict[str, Tensor] = {}

    def validate(average: GenerativeModel, step: int) -> dict[str, float]:
        found.update({name: t.clone() for name, t in average.state_dict().items()})
        return {"score": 0.0}

    config = TrainConfig(
        batch_size=BATCH,
        budget=Budget(steps=STEPS),
        precision="fp32",
        ema_decay=DECAY,
        validate_every=STEPS,
    )
    train(model, data, config, directory, validate=validate)
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_the_loop_is_the_plain_loop_bit_for_bit(family: str, tmp_path: Path) -> None:
    one, two = tiny_model(family), tiny_model(family)
    if not one.phases():
        pytest.skip("nothing is descended")
    data = tiny_data(40, one.data)
    averages = plain(one, data), looped(two, data, tmp_path)
    same(one.state_dict(), two.state_dict())
    same(*averages)


@pytest.mark.parametrize("name", KINDS)
def test_every_optimiser_is_torchs_own_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings = OptimizerConfig.model_validate(
        {"name": name, "lr": 1e-2, "weight_decay": 0.01, "clip_grad_norm": 0.5}
    )
    one, two = (tiny_model("vae", optimizer=settings) for _ in range(2))
    data = tiny_data(40, one.data)
    averages = plain(one, data), looped(two, data, tmp_path)
    same(one.state_dict(), two.state_dict())
    same(*averages)


@pytest.mark.parametrize("most", [1e-3, 1e6])
@pytest.mark.parametrize("worst", [1.0, float("nan"), float("inf")])
def test_clipping_is_torchs_bit_for_bit(most: float, worst: float) -> None:
    def gradients() -> list[nn.Parameter]:
        torch.manual_seed(0)
        found = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7)), nn.Parameter()]
        for parameter in found[:2]:
            parameter.grad = torch.randn_like(parameter)
        found[1].grad[0] = worst  # type: ignore[index]
        return found

    one, two = gradients(), gradients()
    assert torch.equal(
        clip_gradients(one, most).nan_to_num(), nn.utils.clip_grad_norm_(two, most).nan_to_num()
    )
    for mine, theirs in zip(one[:2], two[:2], strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad.isnan(), theirs.grad.isnan())
        assert torch.equal(mine.grad.nan_to_num(), theirs.grad.nan_to_num())


def test_the_average_follows_a_buffer_that_is_replaced_and_a_state_that_is_loaded() -> None:
    model = nn.BatchNorm1d(2)
    average = MovingAverage(model, 0.9)
    average.update()
    model.running_mean = torch.full((2,), 11.0)
    average.update()
    mean = average.module.running_mean
    assert torch.allclose(mean, torch.full((2,), 11 * (1 - 2 / 11)))
    assert torch.equal(average.n_averaged, torch.tensor(2))
    average.load_state_dict({**average.state_dict(), "n_averaged": torch.tensor(0)})
    average.update()  # the first again: a copy
    assert torch.equal(mean, torch.full((2,), 11.0))


def test_seeding_draws_what_torchs_would() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    seed_noise(7, torch.device("cpu"))
    assert torch.equal(torch.rand(3), wanted)


LAID_OUT = ["dcgan", "glow", "realnvp", "vae", "wgan", "wgan_gp"]


def bf16(steps: int) -> TrainConfig:
    return TrainConfig(batch_size=BATCH, budget=Budget(steps=steps), precision="bf16")


def strided(model: GenerativeModel) -> bool:
    """Whether some weight lies in channels_last alone."""
    weights = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous()]
    return any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_weights_lie_in_channels_last_where_the_family_says_so_and_bf16_is_trained(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    data = tiny_data(16, model.data)
    assert model.channels_last == (family in LAID_OUT)
    train(model, data, bf16(1).model_copy(update={"precision": "fp32"}), tmp_path / "fp32")
    assert not strided(model)
    if model.phases():
        train(model, data, bf16(1), tmp_path / "bf16")
        assert strided(model) == model.channels_last


@pytest.mark.parametrize("family", LAID_OUT)
def test_resumed_is_straight_in_bf16(family: str, tmp_path: Path) -> None:
    straight, cut, resumed = (tiny_model(family) for _ in range(3))
    data = tiny_data(16, straight.data)
    train(straight, data, bf16(4), tmp_path / "straight")
    train(cut, data, bf16(2), tmp_path / "resumed")
    train(resumed, data, bf16(4), tmp_path / "resumed")
    assert strided(resumed)
    same(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("family", LAID_OUT)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_the_layout_is_the_same_model(family: str, shape: tuple[int, ...]) -> None:
    """In bf16 to its eight bits; two levels, which some families model by other means."""
    one, two = (tiny_model(family, suited_data(family, shape, levels=2)) for _ in range(2))
    lay_out(two, "bf16")
    same(one.state_dict(), two.state_dict())
    batch = tiny_batch(8, one.data)
    for phase in one.phases():
        found = []
        for model in (one, two):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(float(model.losses(batch, phase.name)["loss"]))
        assert found[0] == pytest.approx(found[1], rel=2**-6, abs=2**-6)
