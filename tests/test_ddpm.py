"""Diffusion: schedules and posterior in closed form, DDIM, the bound, guidance, inversion."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from models.data import Batch, DataSpec, from_signed
from models.ddpm import DDPM, DDPMConfig
from models.ddpm.process import alpha_bars, discretised_gaussian_log_prob
from models.unet import UNet
from tests.conftest import TINY, tiny_images

LEVELS, MEAN, SPREAD = 256, 0.1, 0.25  # of the Gaussian data of the toy


def small(data: DataSpec = TINY, **changes: Any) -> DDPM:
    torch.manual_seed(0)
    model = DDPM(DDPMConfig(width=8, **changes), data)
    with torch.no_grad():  # away from the zeros at which it starts
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def optimal(**changes: Any) -> DDPM:
    """The best model of independent pixels N(MEAN, SPREAD^2): its epsilon is known."""
    config = DDPMConfig(width=8, likelihood_draws=1000, **changes)
    model = DDPM(config, DataSpec(shape=(1, 4, 4), levels=LEVELS))
    abar = model.process.alpha_bar

    def epsilon(x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        t = (time * model.config.timesteps / 1000).round().long()
        a = abar[t].view(-1, 1, 1, 1)
        best = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)
        if not model.config.learned_variance:
            return best.float()
        b = abar[t - 1].view(-1, 1, 1, 1)  # the true variance, as the mix that yields it
        beta, small = 1 - a / b, (1 - a / b) * (1 - b) / (1 - a)
        unknown = SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a)  # of x_0, given x_t
        true = small + (b.sqrt() * beta / (1 - a)) ** 2 * unknown
        mix = (true.log() - small.log()) / (beta.log() - small.log())
        mix = torch.where(b == 1, torch.ones_like(mix), mix)
        return torch.cat([best, (2 * mix - 1).expand_as(best)], 1).float()

    model.net.forward = epsilon  # type: ignore[method-assign]
    return model.eval()


def exact() -> Tensor:
    """Log-probabilities of the toy's levels: the Gaussian's integral over each bin."""
    edges = (torch.arange(1, LEVELS, dtype=torch.float64) * 2 - LEVELS) / (LEVELS - 1)
    below = 0.5 * (1 + torch.erf((edges - MEAN) / SPREAD / math.sqrt(2)))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return torch.cat([zero, below, one]).diff().log()


def flat_images(copies: int) -> Tensor:
    """Each level as `copies` images of that level alone: `[LEVELS * copies, 1, 4, 4]`."""
    levels = torch.arange(LEVELS, dtype=torch.uint8).repeat_interleave(copies)
    return levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def test_schedules_are_the_papers() -> None:
    cosine, linear = alpha_bars("cosine", 1000), alpha_bars("linear", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 500, 999)]
    assert cosine[[1, 500, 999]].tolist() == pytest.approx([v / f[0] for v in f[1:]], rel=1e-9)
    assert float(1 - cosine[1000] / cosine[999]) == pytest.approx(0.999)
    betas = 1 - linear[1:] / linear[:-1]
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert torch.allclose(betas.diff(), betas.diff()[0].expand(999), atol=1e-12)


def test_coarse_levels_begin_at_more_noise() -> None:
    fine = DDPM(DDPMConfig(width=8), DataSpec(shape=(1, 8, 8), levels=256)).process.alpha_bar
    assert torch.allclose(fine, alpha_bars("cosine", 1000), rtol=1e-12)
    coarse = DDPM(DDPMConfig(width=8), DataSpec(shape=(1, 8, 8), levels=17)).process.alpha_bar
    assert float((1 - coarse[1]).sqrt()) == pytest.approx(0.3 * 2 / 16, rel=0.1)
    assert float(coarse[1000]) == pytest.approx(float(fine[1000]))
    assert len(coarse) == 1001
    assert (coarse.diff() < 0).all()


@pytest.mark.parametrize(("t", "s"), [(1000, 999), (2, 1), (500, 450), (700, 20)])
def test_posterior_is_bayes_rule(t: int, s: int) -> None:
    """q(x_s|x_t, x_0) from the product of q(x_t|x_s) and q(x_s|x_0), and q(x_t|x_0) itself."""
    model = small()
    a, b = float(model.process.alpha_bar[t]), float(model.process.alpha_bar[s])
    x0, x = torch.randn(2, 1, 1, 8, 8).double().unbind(0)
    precision = (a / b) / (1 - a / b) + 1 / (1 - b)
    expected = math.sqrt(a / b) / (1 - a / b) * x + math.sqrt(b) / (1 - b) * x0
    mean, variance = model.process.posterior(x0, x, torch.tensor([t]), torch.tensor([s]))
    assert float(variance) == pytest.approx(1 / precision, rel=1e-5)
    assert torch.allclose(mean, expected / precision, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_one_and_every_step_is_ancestral() -> None:
    model = small(timesteps=40)
    assert model.process.times(40) == list(range(40, -1, -1))
    x = torch.randn(6, 1, 8, 8)
    for time in (40, 17, 2):
        t = torch.full((6,), time)
        found = model.predict(x, t)
        mean, sigma = model.process.ddim(found, x, t, t - 1, eta=1.0)
        expected, variance = model.process.posterior(found.x0, x, t, t - 1)
        assert torch.allclose(mean, expected, atol=1e-5)
        assert torch.allclose(sigma**2, variance)
    learned = small(timesteps=40, learned_variance=True)
    found = learned.predict(x, t)
    _, sigma = learned.process.ddim(found, x, t, t - 1, eta=1.0)
    assert torch.allclose(
        2 * sigma.log(), learned.process.log_variance(t, t - 1, found.mix), atol=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"prediction": "v"}, {"learned_variance": True}])
def test_ddim_without_noise_is_the_same_without_the_posterior(changes: dict[str, Any]) -> None:
    model = small(timesteps=40, **changes)
    z, times, x = torch.randn(6, 64), model.process.times(9), torch.empty(0)
    for eta in (0.0, 1e-30):  # so small a one takes the way of all others, and leaves no trace
        x = z.view(6, 1, 8, 8)
        for time, after in pairwise(times):
            t, s = torch.full((6,), time), torch.full((6,), after)
            found = model.predict(x, t)
            x, sigma = model.process.ddim(found, x, t, s, eta)
            kept, spread = model.process.at(s)
            _, variance = model.process.posterior(found.x0, x, t, s)
            away = (spread.square() - eta**2 * variance).clamp(min=0).sqrt()
            assert torch.equal(x, kept * found.x0 + away * found.noise)
            assert float(sigma.abs().max()) <= 1e-29
    assert torch.equal(model.sample(6, z=z, steps=9), from_signed(x, TINY.levels))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_the_optimal_network_are_the_data(eta: float) -> None:
    torch.manual_seed(0)
    model = optimal()
    x = model._denoise(torch.randn(400, 1, 4, 4), model.process.times(500), None, eta=eta)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(SPREAD, abs=0.015)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mean", [-1.3, -0.02, 0.7])
def test_the_decoders_probabilities_sum_to_one(levels: int, mean: float) -> None:
    x = torch.arange(levels).view(-1, 1, 1, 1)
    for log_variance in (-9.0, -2.0, 1.0):
        one = torch.full((1, 1, 1, 1), mean, dtype=torch.float64)
        mass = discretised_gaussian_log_prob(x, one, one * 0 + log_variance, levels).exp()
        assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_is_below_the_truth_and_close(learned: bool) -> None:
    """In the mean over the data, since E[log q(x)] <= E[log p(x)] for any model q."""
    torch.manual_seed(0)
    model, log_p = optimal(timesteps=250, learned_variance=learned), exact()
    bound = model.log_prob(flat_images(16), samples=250).view(LEVELS, 16).double() / 16
    gap = float((log_p.exp() * (log_p - bound.mean(1))).sum())
    error = float((log_p.exp() * bound.std(1) / 4).square().sum().sqrt())
    assert error < 0.01
    # a fixed variance is not the best one, and costs a little
    assert -3 * error < gap < (0 if learned else 0.1) + 3 * error


def test_draws_of_t_are_unbiased_and_do_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    model = optimal(timesteps=50)
    x = flat_images(400)[400 * 140 :][:400]
    whole = model.log_prob(x, samples=50)
    for samples in (1, 8):
        drawn = model.log_prob(x, samples=samples)
        error = float((drawn.var() + whole.var()).sqrt()) / 20
        assert abs(float((drawn - whole).mean())) < 4 * error
        halves = drawn[::2] - drawn[::2].mean(), drawn[1::2] - drawn[1::2].mean()
        related = (halves[0] * halves[1]).mean() / drawn.var()
        assert abs(float(related)) < 4 / math.sqrt(200)  # neighbours share no time, no noise
    assert float(model.log_prob(x, samples=8).std()) < 0.5 * float(model.log_prob(x).std())


def test_no_more_draws_are_taken_than_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs, predict = small(likelihood_draws=2), [], DDPM.predict

    def counted(self: DDPM, *given: Any) -> Any:
        runs.append(1)
        return predict(self, *given)

    monkeypatch.setattr(DDPM, "predict", counted)
    model.log_prob(tiny_images(3, TINY), samples=500)
    assert len(runs) == 2


def test_guidance_one_is_conditional_and_zero_is_unconditional() -> None:
    model = small(class_conditional=True)
    x, t, label = torch.randn(4, 1, 8, 8), torch.full((4,), 300), torch.tensor([0, 1, 0, 1])
    by = {w: model._network(x, t, label, w) for w in (0.0, 1.0, 0.5, 1 + 1e-6, 1e-6)}
    time, null = t.float(), torch.full_like(t, 2)
    assert torch.allclose(by[1.0], model.net(x, time, label))
    assert torch.allclose(by[0.0], model.net(x, time, null))
    assert torch.allclose(by[0.0], model._network(x, t, None, 1.0))
    assert torch.allclose(by[0.5], (by[0.0] + by[1.0]) / 2, atol=1e-5)
    assert torch.allclose(by[1 + 1e-6], by[1.0], atol=1e-4)  # the other branch, same limits
    assert torch.allclose(by[1e-6], by[0.0], atol=1e-4)
    assert not torch.allclose(by[0.0], by[1.0], atol=1e-2)
    with pytest.raises(ValueError, match="class_conditional"):
        small().sample(2, guidance=2.0)
    with pytest.raises(ValueError, match="no classes"):
        small(DataSpec(shape=(1, 8, 8), levels=4), class_conditional=True)


def test_labels_are_dropped_at_the_stated_rate() -> None:
    model = small(class_conditional=True)
    seen: list[Tensor] = []
    forward = model.net.forward
    model.net.forward = lambda x, t, y: seen.append(y) or forward(x, t, y)  # type: ignore
    x = torch.zeros(3000, 1, 8, 8, dtype=torch.uint8)
    with torch.no_grad():
        model.losses(Batch(x, torch.ones(3000, dtype=torch.long)), "main")
    assert float((seen[0] == 2).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert set(seen[0].tolist()) == {1, 2}


def test_encoding_is_the_inverse_of_sampling() -> None:
    torch.manual_seed(0)
    model = optimal(inversion_steps=200)
    x = torch.randint(60, 220, (64, 1, 4, 4), dtype=torch.uint8)
    z = model.encode(x)
    again = model.sample(64, z=z, steps=200)
    assert float((again.float() - x.float()).abs().max()) <= 2
    assert torch.equal(model.reconstruct(x), again)
    # the deterministic path of Gaussian data is an affine map to N(0, 1)
    y = x.float() * (2 / 255) - 1
    assert torch.allclose(z.view_as(y), (y - MEAN) / SPREAD, atol=0.1)


def test_the_hybrid_loss_teaches_only_the_variance() -> None:
    model = small(learned_variance=True, vlb_weight=1.0)
    batch = Batch(torch.randint(0, 4, (8, 1, 8, 8), dtype=torch.uint8))
    found = model.losses(batch, "main")
    last = model.net.last[-1].weight
    (gradient,) = torch.autograd.grad(found["loss"] - found["simple"], last)
    assert float(gradient[0].abs().max()) == pytest.approx(0, abs=1e-6)
    assert float(gradient[1].abs().max()) > 1e-4


def test_attention_sees_all_pixels_and_odd_sides_return() -> None:
    torch.manual_seed(0)
    net = UNet((3, 9, 13), 3, width=8, blocks=2, attention=49, classes=3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 9, 13, requires_grad=True)
    out = net(x, torch.tensor([3.0, 900.0]), torch.tensor([0, 2]))
    assert out.shape == x.shape
    (gradient,) = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert (gradient[0].abs().sum(0) > 0).all()
    assert not gradient[1].any()  # rows do not mix
