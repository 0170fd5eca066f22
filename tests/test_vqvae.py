"""VQ-VAE: the nearest code, the codebook's running means, and a bound that is one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from models.data import Batch, DataSpec
from models.vqvae import FLOOR, VQVAE, VQVAEConfig, perplexity, straight_through
from tests.conftest import TINY, tiny_images


def small(data: DataSpec = TINY, **changes: Any) -> VQVAE:
    torch.manual_seed(0)
    settings = {"codes": 6, "code_dim": 3, "width": 8, "prior_width": 16, "prior_layers": 1}
    return VQVAE(VQVAEConfig(**{**settings, "prior_heads": 2, **changes}), data)


def filled(model: VQVAE) -> VQVAE:
    """With entries at a distance from each other and unequal counts."""
    model.counts.copy_(torch.rand(model.counts.shape) + 0.5)
    model.sums.copy_(torch.randn(model.sums.shape) * model.counts[:, None])
    return model


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 8, 8), (4, 4)),
        ((1, 28, 28), (7, 7)),
        ((3, 16, 16), (4, 4)),
        ((3, 9, 13), (5, 7)),
        ((1, 4, 4), (4, 4)),
    ],
    ids=str,
)
def test_the_grid_of_codes_follows_the_image(
    shape: tuple[int, int, int], grid: tuple[int, int]
) -> None:
    model = small(DataSpec(shape=shape, levels=4))
    x = torch.randint(0, 4, (2, *shape), dtype=torch.uint8)
    assert model.grid == grid
    assert model.encode(x).shape == (2, math.prod(grid))


def test_each_position_gets_its_nearest_entry() -> None:
    model = filled(small())
    z = torch.randn(5, 16, 3)
    distance = (z[:, :, None] - model.codebook).square().sum(3)
    assert torch.equal(model.nearest(z), distance.argmin(2))
    assert len(model.nearest(z).unique()) > 3


def test_bfloat16_does_not_blur_the_neighbours() -> None:
    model = small(code_dim=1, codes=2)
    model.counts.fill_(1.0)
    model.sums.copy_(torch.tensor([[100.0], [100.2]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.nearest(torch.tensor([[[100.18], [100.02]]])).tolist() == [[1, 0]]


def test_the_codebook_moves_as_in_the_appendix() -> None:
    """N_i <- gamma N_i + (1 - gamma) n_i and m_i <- gamma m_i + (1 - gamma) sum of z; e = m / N."""
    model = filled(small(gamma=0.8, restart_dead=False))
    x = tiny_images(12)
    with torch.no_grad():
        z = model.features(x)
        rows = z.flatten(0, 1)[torch.randperm(12 * 16)[:6]]  # entries where the encoder is
        model.sums.copy_(rows * model.counts[:, None])
        counts, sums = model.counts.clone(), model.sums.clone()
        codes = model.encode(x)
        model.losses(Batch(x), "codes")
    assert len(codes.unique()) > 1
    for i in range(6):
        mine = z[codes == i]
        count = 0.8 * counts[i] + 0.2 * len(mine)
        total = 0.8 * sums[i] + 0.2 * mine.sum(0)
        assert torch.allclose(model.counts[i], count)
        assert torch.allclose(model.codebook[i], total / count, atol=1e-5)


def test_nothing_moves_the_codebook_but_training_the_autoencoder() -> None:
    model = filled(small())
    before = model.sums.clone()
    model.losses(Batch(tiny_images(4)), "prior")
    model.eval().losses(Batch(tiny_images(4)), "codes")
    model.log_prob(tiny_images(4))
    assert torch.equal(model.sums, before)
    model.train().losses(Batch(tiny_images(4)), "codes")
    assert not torch.equal(model.sums, before)


def test_gradients_pass_straight_through() -> None:
    z, quantised = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    through = straight_through(z, quantised)
    assert torch.allclose(through, quantised)
    wanted = torch.randn(2, 4, 3)
    (through * wanted).sum().backward()
    assert torch.equal(z.grad, wanted)  # type: ignore[arg-type]


def test_the_encoders_gradient_is_the_decoders_plus_the_commitment() -> None:
    """Through `losses`: the decoder's gradient at e[codes], plus beta * 2 (z_e - e) / (B N)."""
    model = filled(small(beta=0.7, restart_dead=False))
    x = tiny_images(3)
    z = model.features(x).detach()
    quantised = model.codebook[model.nearest(z)].requires_grad_()
    (-model.decoder.log_likelihood(x, quantised).mean()).backward()
    assert quantised.grad is not None
    expected = quantised.grad + 0.7 * 2 * (z - quantised.detach()) / (3 * 16)
    received: list[Any] = []
    model.encoder.register_full_backward_hook(lambda m, i, o: received.append(o[0]))  # type: ignore[index]
    model.losses(Batch(x), "codes")["loss"].backward()
    found = received[0].flatten(2).transpose(1, 2)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_usage_is_logged() -> None:
    assert float(perplexity(torch.eye(4)[[0, 0, 1, 1]])) == pytest.approx(2.0)
    assert float(perplexity(torch.eye(4)[[0, 0, 0, 1]])) == pytest.approx(4 / 3**0.75)
    model = small(codes=4)
    model.counts.copy_(torch.tensor([9.0, 9.0, 0.01, 9.0]))
    found = model.losses(Batch(tiny_images(4)), "codes")
    assert float(found["dead_codes"]) == pytest.approx(0.25)
    assert 1 <= float(found["perplexity"]) <= 4
    assert float(model.losses(Batch(tiny_images(4)), "codes")["dead_codes"]) == 0  # restarted


def test_dead_codes_are_restarted_where_the_encoder_is() -> None:
    model = filled(small())
    model.counts.fill_(20.0)
    model.sums.copy_(model.sums.sign() * 20)
    model.counts[2] = FLOOR
    model.sums[2] = 1e3 * FLOOR  # an entry far away from everything
    others = model.codebook[[0, 1, 3, 4, 5]]
    z = model.features(tiny_images(8)).detach().flatten(0, 1)
    model._restart(z, model.counts < 1)
    assert torch.equal(model.codebook[[0, 1, 3, 4, 5]], others)
    assert float((z - model.codebook[2]).norm(dim=1).min()) < 1e-5
    assert float(model.counts[2]) == pytest.approx(8 * 16 / 6)


def test_an_unused_code_stays_finite_and_where_it_is() -> None:
    model = filled(small(gamma=0.5, restart_dead=False))
    with torch.no_grad():
        model.counts[3], model.sums[3] = 1.0, 1e4
        for _ in range(300):  # 0.5 ** 300 is no float32
            model.losses(Batch(tiny_images(4)), "codes")
    assert float(model.counts[3]) == pytest.approx(FLOOR)
    assert torch.allclose(model.codebook[3], torch.tensor(1e4))


def trained(data: DataSpec, **changes: Any) -> VQVAE:
    """A model whose codes carry something, and all of the data's examples."""
    model = small(data, codes=3, code_dim=2, halvings=0, mixture=1, gamma=0.8, **changes)
    x = every(data)
    label = (x.flatten(1)[:, 0] > 0).long()
    flat = x.flatten(1).amin(1) == x.flatten(1).amax(1)
    batch = Batch(x[flat].repeat(8, 1, 1, 1), label[flat].repeat(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model.losses(batch, "codes")["loss"] + model.losses(batch, "prior")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def every(data: DataSpec) -> torch.Tensor:
    values = itertools.product(range(data.levels), repeat=data.dimensions)
    return torch.tensor(list(values), dtype=torch.uint8).view(-1, *data.shape)


def exact(model: VQVAE, x: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """log of the sum over every grid of codes of p(x|codes) p(codes|label), `[B]`."""
    grids = torch.tensor(list(itertools.product(range(3), repeat=math.prod(model.grid))))
    labels = None if label is None else label.expand(len(grids))
    prior = model.prior.log_prob(grids, labels)
    assert float(prior.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    quantised = model.codebook[grids]
    parts = [
        model.decoder.log_likelihood(image.expand(len(grids), -1, -1, -1), quantised) for image in x
    ]
    return torch.logsumexp(torch.stack(parts) + prior, 1)


@pytest.mark.parametrize("levels", [2, 3])
def test_the_bound_is_below_the_sum_over_all_codes(levels: int) -> None:
    model = trained(DataSpec(shape=(1, 2, 2), levels=levels))
    x = every(model.data)
    with torch.no_grad():
        truth, bound = exact(model, x, None), model.log_prob(x)
        assert torch.equal(bound, model.log_prob(x, samples=3))
    assert float(truth.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert (bound <= truth + 1e-5).all()
    assert float((truth - bound).max()) > 1e-3  # else nothing was left out, and nothing tested
    flat = x.flatten(1).amin(1) == x.flatten(1).amax(1)
    uniform = -model.data.dimensions * math.log(levels)
    assert float(bound[flat].mean()) > uniform + 0.5  # and it says something where the data is


def test_without_a_label_the_classes_are_averaged() -> None:
    data = DataSpec(shape=(1, 2, 2), levels=3, classes=("a", "b"))
    model = trained(data, class_conditional=True)
    x = every(data)[::7]
    with torch.no_grad():
        codes = model.encode(x)
        parts = [model.prior.log_prob(codes, torch.full((len(x),), y)).exp() for y in (0, 1)]
        expected = ((parts[0] + parts[1]) / 2).log()
        expected += model.decoder.log_likelihood(x, model.codebook[codes])
        assert not torch.allclose(parts[0], parts[1], rtol=0.1)
        assert torch.allclose(model.log_prob(x), expected, rtol=1e-5)


def test_labels_choose_what_is_sampled() -> None:
    """Dark images in one class, bright ones in the other."""
    data = DataSpec(shape=(1, 4, 4), levels=4, classes=("dark", "bright"))
    model = small(data, codes=4, class_conditional=True, prior_dropout=0.0)
    label = torch.arange(32) % 2
    x = (3 * label).to(torch.uint8)[:, None, None, None].expand(32, 1, 4, 4).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        found = [model.losses(Batch(x, label), name)["loss"] for name in ("codes", "prior")]
        optimizer.zero_grad()
        sum(found).backward()  # type: ignore[union-attr]
        optimizer.step()
    model.eval()
    assert model.conditions == {"label"}
    with torch.no_grad():
        drawn = model.sample(8, label=torch.tensor([0, 1] * 4)).float().flatten(1).mean(1)
    assert float(drawn[::2].mean()) < 1
    assert float(drawn[1::2].mean()) > 2


def test_conditioning_needs_classes() -> None:
    with pytest.raises(ValueError, match="class_conditional"):
        small(DataSpec(shape=(1, 8, 8), levels=4), class_conditional=True)
    with pytest.raises(ValidationError):
        VQVAEConfig(codes=1)


def test_options_of_sampling_are_named() -> None:
    model = small().eval()
    assert model.options == {"top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        greedy = model.sample(3, temperature=0.0)
        assert torch.equal(model.sample(3, top_k=1), greedy)


def test_samples_are_as_likely_as_the_prior_says() -> None:
    """Of codes drawn by `generate`, the share of each equals its probability."""
    model = trained(DataSpec(shape=(1, 1, 2), levels=2))
    grids = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        p = model.prior.log_prob(grids).exp()
        drawn = model.prior.generate(4000, 2)
    share = F.one_hot(drawn[:, 0] * 3 + drawn[:, 1], 9).float().mean(0)
    assert float((share - p).abs().max()) < 0.03
