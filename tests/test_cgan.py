"""The conditional GAN: what the label reaches, and how."""

from __future__ import annotations

import pytest
import torch

from models.cgan import CGAN, CGANConfig, label_rows
from models.data import Batch, DataSpec, to_signed
from tests.conftest import tiny_images

CLASSES = DataSpec(shape=(1, 8, 8), levels=4, classes=("a", "b", "c"))
ATTRIBUTES = DataSpec(shape=(1, 8, 8), levels=4, attributes=("p", "q", "r"))
LABELS = {
    "classes": (CLASSES, torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])),
    "attributes": (
        ATTRIBUTES,
        torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]]),
    ),
}


def small(conditioning: str, data: DataSpec) -> CGAN:
    torch.manual_seed(0)
    return CGAN(CGANConfig(latent_dim=4, width=8, conditioning=conditioning), data)


@pytest.mark.parametrize("conditioning", ["projection", "embedding"])
@pytest.mark.parametrize("kind", list(LABELS))
def test_both_networks_heed_the_label(conditioning: str, kind: str) -> None:
    data, label, other = LABELS[kind]
    model = small(conditioning, data)
    x = tiny_images(4)
    model.losses(Batch(x, label), "discriminator")  # moves batch norm's statistics
    model.eval()
    y, changed = label_rows(label, data), label_rows(other, data)
    with torch.no_grad():
        z = torch.randn(4, 4)
        images = [model.generator(z, rows) for rows in (y, changed)]
        logits = [model.discriminator(to_signed(x, 4), rows) for rows in (y, changed)]
        drawn = model.sample(5)
    assert ((images[0] - images[1]).flatten(1).abs().amax(1) > 1e-4).all()
    assert ((logits[0] - logits[1]).abs() > 1e-5).all()
    assert drawn.shape == (5, 1, 8, 8)


def test_projection_adds_the_inner_product_with_the_labels_row() -> None:
    """Miyato & Koyama's equation 3, written out for each example."""
    model = small("projection", CLASSES).eval()
    x, label = to_signed(tiny_images(4), 4), torch.tensor([2, 0, 1, 2])
    found = model.discriminator(x, label_rows(label, CLASSES))
    phi = model.discriminator.body.features(x)
    rows = model.discriminator.embed.weight.T
    plain = model.discriminator.body(x)
    for i, k in enumerate(label.tolist()):
        torch.testing.assert_close(found[i, 0], plain[i, 0] + rows[k] @ phi[i])


def test_attributes_that_are_classes_are_the_same_model() -> None:
    """One linear map serves both: a one-hot row of attributes is a class."""
    as_class = small("projection", CLASSES).eval()
    as_row = small("projection", ATTRIBUTES).eval()
    label, z = torch.tensor([0, 2, 1]), torch.randn(3, 4)
    with torch.no_grad():
        a = as_class.sample(3, label=label, z=z)
        b = as_row.sample(3, label=torch.eye(3, dtype=torch.long)[label], z=z)
    assert torch.equal(a, b)


def test_labels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        small("projection", CLASSES).sample(1, label=torch.tensor([3]))
    with pytest.raises(ValueError, match="label"):
        small("projection", CLASSES).losses(Batch(tiny_images(2)), "generator")
