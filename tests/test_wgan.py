"""The Wasserstein critics: the clip, the schedule and the gradient penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.data import Batch, DataSpec, to_signed
from models.noise import rand, randn
from models.wgan import WGAN, WGANConfig
from models.wgan_gp import WGANGP, gradient_penalty
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData
from tasks.training.loop import train
from tests.conftest import tiny_images

DATA = DataSpec(shape=(1, 8, 8), levels=4)


def test_wgan_never_leaves_the_clip_and_takes_n_critic_steps(tmp_path: Path) -> None:
    """Watched from inside the loss, so from the first step on; no parameter is left out."""
    largest: list[tuple[str, float, int]] = []

    class Watched(WGAN):
        def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
            parameters = [p.detach().abs() for p in self.critic.parameters()]
            top = max(float(p.max()) for p in parameters)
            held = sum(int((p == p.new_tensor(0.03)).sum()) for p in parameters)
            if len(batch.x) == 8:  # not the few rows on which the cost of a step is counted
                largest.append((phase, top, held))
            return super().losses(batch, phase)

    torch.manual_seed(0)
    model = Watched(WGANConfig(latent_dim=4, width=8, clip=0.03, n_critic=3), DATA)
    settings = TrainConfig(batch_size=8, budget=Budget(steps=5), precision="fp32")
    train(model, TrainData(tiny_images(40)), settings, tmp_path)
    assert [phase for phase, _, _ in largest] == (["critic"] * 3 + ["generator"]) * 5
    assert all(top <= torch.tensor(0.03).item() for _, top, _ in largest)
    assert largest[-1][2] > 0  # weights did reach the clip: it held them
    assert any(float(p.detach().abs().max()) > 0.03 for p in model.generator.parameters())


def small(family: Any) -> Any:
    """A model in evaluation mode whose critic is far from flat, so that errors show."""
    torch.manual_seed(0)
    model = family(family.Config(latent_dim=4, width=8), DATA).eval()
    for parameter in model.critic.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    return model


@pytest.mark.parametrize("family", [WGAN, WGANGP])
def test_the_estimate_is_the_difference_of_means(family: Any) -> None:
    model = small(family)
    x = tiny_images(6)
    torch.manual_seed(1)
    z = randn((6, 4), x.device)
    with torch.no_grad():
        real = model.critic(to_signed(x, 4)).mean()
        fake = model.critic(model.generator(z)).mean()
    torch.manual_seed(1)
    values = model.losses(Batch(x), "critic")
    torch.testing.assert_close(values["wasserstein_estimate"].detach(), real - fake)
    penalty = 10 * values.get("gradient_penalty", torch.zeros(()))
    torch.testing.assert_close(values["loss"].detach(), (fake - real + penalty).detach())
    torch.manual_seed(1)
    torch.testing.assert_close(model.losses(Batch(x), "generator")["loss"].detach(), -fake)


def test_penalty_is_that_of_each_examples_jacobian() -> None:
    """Float64, against torch.func's Jacobian of every example alone at the same points."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1, bias=False)
    ).double()
    real, fake = torch.randn(2, 5, 2, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    share = rand((5, 1, 1, 1), real.device).double()
    points = share * real + (1 - share) * fake
    slopes = torch.func.vmap(torch.func.jacrev(lambda x: critic(x[None])[0, 0]))(points)
    expected = (slopes.flatten(1).norm(dim=1) - 1).square().mean()
    torch.manual_seed(1)
    found = gradient_penalty(critic, real, fake)
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found, next(iter(critic.parameters())))
    theirs = torch.autograd.grad(expected, next(iter(critic.parameters())))
    torch.testing.assert_close(mine, theirs)


def test_penalty_of_a_critic_whose_slope_is_known() -> None:
    """f(x) = w.x has the gradient w everywhere: (|w| - 1)^2, and zero where |w| is one."""
    real, fake = torch.randn(2, 4, 1, 8, 8)
    for length in (3.0, 1.0, 0.25):
        weight = torch.full((64, 1), length / 8)
        penalty = gradient_penalty(lambda x, w=weight: x.flatten(1) @ w, real, fake)
        assert float(penalty) == pytest.approx((length - 1) ** 2, abs=1e-6)


def test_penalty_is_differentiated_twice_and_exact_under_autocast() -> None:
    model = small(WGANGP)
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = model.losses(Batch(tiny_images(6)), "critic")
        first = next(model.critic.parameters())
        assert values["gradient_penalty"].dtype == torch.float32
        (gradient,) = torch.autograd.grad(values["gradient_penalty"], first)
        gradients.append((values["gradient_penalty"].detach(), gradient))
    assert gradients[0][1].norm() > 0
    # only the generator ran in bf16: the points differ by its rounding, the penalty by less
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
