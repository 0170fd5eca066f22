"""The contract that every family keeps. A new family is tested by being in `FAMILIES`."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from models import FAMILIES, store
from models.base import Batch, DataSpec
from tests.conftest import TINY, tiny_images, tiny_model

SHAPES = [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 16, 16), (1, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_configuration_serves_all_shapes(family: str, shape: tuple[int, ...]) -> None:
    data = DataSpec(shape=shape, levels=16)
    model = tiny_model(family, data)
    x = tiny_images(4, data)
    for phase in model.phases():
        losses = model.losses(Batch(x), phase.name)
        assert losses["loss"].ndim == 0
        assert all(torch.isfinite(value) for value in losses.values())
    samples = model.eval().sample(3)
    assert samples.shape == (3, *shape)
    assert samples.dtype == torch.uint8
    assert int(samples.max()) < 16


def test_each_phase_trains_its_parameters_and_no_others(family: str) -> None:
    from tasks.training.comm import Comm
    from tasks.training.config import TrainConfig
    from tasks.training.loop import _Turn

    model = tiny_model(family)
    for phase in model.phases():
        before = {name: p.clone() for name, p in model.named_parameters()}
        turn = _Turn(phase, TrainConfig(), model)
        received: set[str] = set()
        for name, p in model.named_parameters():
            p.register_hook(functools.partial(_note, received, name))
        turn.run(model.losses, Batch(tiny_images(8)), 0, Comm())
        mine = {id(p) for module in phase.modules for p in module.parameters()}
        inside = {name for name, p in model.named_parameters() if id(p) in mine}
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert received == inside
        assert changed <= inside
        assert all(p.requires_grad for p in model.parameters())


def _note(received: set[str], name: str, gradient: torch.Tensor) -> None:
    received.add(name)


def test_every_parameter_belongs_to_a_phase(family: str) -> None:
    model = tiny_model(family)
    covered = {id(p) for phase in model.phases() for m in phase.modules for p in m.parameters()}
    assert covered == {id(p) for p in model.parameters()}


def test_saved_and_loaded_is_equal(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.losses(Batch(tiny_images(8)), model.phases()[0].name)  # moves batch statistics
    store.save(tmp_path / "m", model, family, model.state_dict())
    loaded = store.load(tmp_path / "m")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    torch.manual_seed(3)
    mine = model.eval().sample(4)
    torch.manual_seed(3)
    assert torch.equal(mine, loaded.sample(4))


def test_replaced_weights_are_refused(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    store.save(tmp_path / "m", model, family, model.state_dict())
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    store.save(tmp_path / "other", model, family, other)
    (tmp_path / "other" / store.WEIGHTS).replace(tmp_path / "m" / store.WEIGHTS)
    with pytest.raises(ValueError, match="damaged or replaced"):
        store.load(tmp_path / "m")


def test_loss_falls_on_one_batch(family: str) -> None:
    """Each phase alone, so that a generator and a discriminator are judged separately."""
    batch = Batch(tiny_images(16))
    for name in [phase.name for phase in tiny_model(family).phases()]:
        model = tiny_model(family)
        phase = next(p for p in model.phases() if p.name == name)
        parameters = [p for module in phase.modules for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=2e-3)
        trace, before = [], [p.detach().clone() for p in parameters]
        for step in range(60):
            torch.manual_seed(step % 3)
            loss = model.losses(batch, name)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(float(loss.detach()))
        # a parameter that stays put is dead: a saddle in its initialisation, or no path to it
        assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        assert sum(trace[-6:]) / 6 < 0.9 * sum(trace[:6]) / 6, f"{name}: {trace[0]} -> {trace[-1]}"


def test_what_it_claims_is_what_it_can(family: str) -> None:
    model, x = tiny_model(family).eval(), tiny_images(3)
    if model.likelihood == "none":
        with pytest.raises(NotImplementedError):
            model.log_prob(x)
    else:
        log_prob = model.log_prob(x, samples=2)
        assert log_prob.shape == (3,)
        assert (log_prob < 0).all()
    if model.reconstruction == "none":
        with pytest.raises(NotImplementedError):
            model.reconstruct(x)
    else:
        rendered = model.reconstruct(x)
        assert rendered.shape == x.shape
        assert rendered.dtype == torch.uint8


def test_temperature_and_latents(family: str) -> None:
    """Temperature 0 leaves no spread; given latents decide the sample."""
    model = tiny_model(family).eval()
    with torch.no_grad():
        cold = model.sample(4, temperature=0.0)
        width = getattr(model.config, "latent_dim", TINY.dimensions)
        z = torch.randn(2, width)
        again = [model.sample(2, z=z) for _ in range(2)]
    assert (cold == cold[0]).all()
    assert torch.equal(*again)


def test_every_family_names_its_paper_and_has_its_file(family: str, root: Path) -> None:
    cls = FAMILIES[family]
    text = (root / "models" / f"{family}.py").read_text()
    assert cls.__module__ == f"models.{family}"
    assert cls.paper.split(",")[0].split(" ")[0] in text
    assert issubclass(cls, nn.Module)
