"""The GAN's losses are the paper's, in probabilities."""

from __future__ import annotations

import pytest
import torch

from models.data import Batch, DataSpec, to_signed
from models.gan import GAN, GANConfig
from models.noise import randn

DATA = DataSpec(shape=(1, 8, 8), levels=4)


@pytest.mark.parametrize("loss", ["minimax", "nonsaturating"])
def test_losses_are_the_papers_formulas(loss: str, double: None) -> None:
    """Equation 1, with D a probability; both players, on the same images and latents."""
    torch.manual_seed(0)
    model = GAN(GANConfig(latent_dim=3, hidden=16, dropout=0.0, loss=loss), DATA).eval()
    x = torch.randint(0, 4, (6, 1, 8, 8))
    torch.manual_seed(1)
    fake = model.generator(randn((6, 3), torch.device("cpu")))
    p_real = model.discriminator(to_signed(x, 4)).sigmoid()
    p_fake = model.discriminator(fake).sigmoid()
    value = p_real.log().mean() + (1 - p_fake).log().mean()  # V(D, G)
    expected = {
        "discriminator": -value,
        "generator": (1 - p_fake).log().mean() if loss == "minimax" else -p_fake.log().mean(),
    }
    for phase, formula in expected.items():
        torch.manual_seed(1)
        found = model.losses(Batch(x), phase)["loss"].double()
        assert float(found.detach()) == pytest.approx(float(formula.detach()), rel=1e-5)


def test_minimax_is_flat_where_the_discriminator_is_sure() -> None:
    """Why the paper advises the other loss: the same direction, but no gradient to follow."""
    slopes = {}
    for loss in ("minimax", "nonsaturating"):
        torch.manual_seed(0)
        model = GAN(GANConfig(latent_dim=3, hidden=16, dropout=0.0, loss=loss), DATA)
        with torch.no_grad():
            model.discriminator[-1].bias.fill_(-12.0)  # every image is surely fake
        torch.manual_seed(1)
        model.losses(Batch(torch.zeros(4, 1, 8, 8)), "generator")["loss"].backward()
        slopes[loss] = model.generator[-3].weight.grad
    assert torch.cosine_similarity(*(s.flatten() for s in slopes.values()), dim=0) > 0.99
    assert slopes["minimax"].norm() < 1e-4 * slopes["nonsaturating"].norm()


def test_dropout_noise_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    model = GAN(GANConfig(latent_dim=3, hidden=16, dropout=0.5), DATA)
    x = torch.randn(4, 1, 8, 8)
    assert not torch.equal(model.discriminator(x), model.discriminator(x))
    model.eval()
    assert torch.equal(model.discriminator(x), model.discriminator(x))


@pytest.fixture
def double() -> object:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
