"""The contract that every family keeps. A new family is tested by being in `FAMILIES`."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from models import FAMILIES, store
from models.base import GenerativeModel
from models.data import Batch
from tests.conftest import conditions, suited_data, tiny_batch, tiny_images, tiny_model

ODD_SHAPES = [(3, 9, 13), (1, 4, 4)]  # a family may declare itself unsuited to these alone
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 16, 16), *ODD_SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_configuration_serves_all_shapes(family: str, shape: tuple[int, ...]) -> None:
    try:
        data = suited_data(family, shape, levels=16, classes=False)
    except LookupError as error:
        if shape not in ODD_SHAPES:
            raise
        pytest.skip(f"{error}, and says so")
    model = tiny_model(family, data)
    for losses in once(model, tiny_batch(12, data)):
        assert losses["loss"].ndim == 0
        assert all(torch.isfinite(value) for value in losses.values())
    samples = model.eval().sample(3, **conditions(model, 3))
    assert samples.shape == (3, *shape)
    assert samples.dtype == torch.uint8
    assert int(samples.max()) < 16


def once(model: GenerativeModel, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """What each phase says of the batch; or what a fit of it says, where there are no phases."""
    phases = model.phases()
    return [model.losses(batch, p.name) for p in phases] if phases else [model.fit(batch)]


def test_what_is_fitted_has_no_parameters_and_the_rest_cannot_be_fitted(family: str) -> None:
    model = tiny_model(family)
    if model.phases():
        with pytest.raises(NotImplementedError):
            model.fit(tiny_batch(8, model.data))
    else:
        assert not list(model.parameters())  # the loop would average, clip and freeze them


def test_each_phase_trains_its_parameters_and_no_others(family: str) -> None:
    """And all that it may train, the phases of the same modules taken together: a gradient
    penalty reaches no bias of a piecewise linear network."""
    from tasks.training.comm import Comm
    from tasks.training.config import TrainConfig
    from tasks.training.turns import Turn

    model = tiny_model(family)
    reached: dict[frozenset[str], set[str]] = {}
    for phase in model.phases():
        before = {name: p.clone() for name, p in model.named_parameters()}
        turn = Turn(phase, TrainConfig(), model)
        received: set[str] = set()
        hooks = [
            p.register_hook(functools.partial(_note, received, name))
            for name, p in model.named_parameters()
        ]
        turn.run(model.losses, tiny_batch(8, model.data), 0, Comm())
        for hook in hooks:
            hook.remove()
        mine = {id(p) for module in phase.modules for p in module.parameters()}
        inside = frozenset(name for name, p in model.named_parameters() if id(p) in mine)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert received
        assert received <= inside
        assert changed <= inside
        assert all(p.requires_grad for p in model.parameters())
        reached.setdefault(inside, set()).update(received)
    for inside, received in reached.items():
        assert received == inside


def _note(received: set[str], name: str, gradient: torch.Tensor) -> None:
    received.add(name)


def test_every_parameter_belongs_to_a_phase(family: str) -> None:
    model = tiny_model(family)
    covered = {id(p) for phase in model.phases() for m in phase.modules for p in m.parameters()}
    assert covered == {id(p) for p in model.parameters()}


def test_saved_and_loaded_is_equal(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    once(model, tiny_batch(12, model.data))  # moves batch statistics
    store.save(tmp_path / "m", model, family, model.state_dict())
    loaded = store.load(tmp_path / "m")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        if not name.startswith(model.training_only):
            assert torch.equal(tensor, loaded.state_dict()[name]), name
    torch.manual_seed(3)
    asked = conditions(model, 4)
    mine = model.eval().sample(4, **asked)
    torch.manual_seed(3)
    assert torch.equal(mine, loaded.sample(4, **asked))


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
    moved: set[str] = set()
    if not tiny_model(family).phases():
        _fit_helps(family)
    for name in [phase.name for phase in tiny_model(family).phases()]:
        model = tiny_model(family)
        batch = tiny_batch(16, model.data)
        phase = next(p for p in model.phases() if p.name == name)
        parameters = [p for module in phase.modules for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=2e-3)
        trace, before = [], {n: p.detach().clone() for n, p in model.named_parameters()}
        for step in range(60):
            torch.manual_seed(step % 3)
            loss = model.losses(batch, name)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.after_step(name)
            trace.append(float(loss.detach()))
        moved |= {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        start, end = sum(trace[:6]) / 6, sum(trace[-6:]) / 6
        assert end < start - 0.1 * abs(start), f"{name}: {trace[0]} -> {trace[-1]}"
    # a parameter that no phase moves is dead: a saddle in its initialisation, or no path to it
    assert moved == {n for n, _ in tiny_model(family).named_parameters()}


def _fit_helps(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(16, model.data)
    with torch.no_grad():
        before = model.log_prob(batch.x).mean()
        for _ in range(5):
            loss = model.fit(batch)["loss"]
            if model.converged:
                break
        after = model.log_prob(batch.x).mean()
    assert after > before + 0.1 * before.abs()
    assert math.isfinite(loss)


def test_what_it_claims_is_what_it_can(family: str) -> None:
    model = tiny_model(family).eval()
    x = tiny_images(3, model.data)
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


def test_a_likelihood_that_takes_one_draw_needs_no_more(family: str) -> None:
    """And one that says it takes more is a random estimate."""
    model = tiny_model(family).eval()
    if model.likelihood == "none":
        pytest.skip("it has no likelihood")
    x, values = tiny_images(3, model.data), []
    with torch.no_grad():
        for seed in (0, 1):
            torch.manual_seed(seed)
            values.append(model.log_prob(x, samples=1))
    random = not torch.equal(*values)
    assert random or model.most_draws == 1
    if not model.phases() or model.likelihood in ("exact", "bound"):
        assert random == (model.most_draws != 1)


def test_temperature_and_latents(family: str) -> None:
    """Temperature 0 leaves no spread but the conditions'; given latents decide the sample."""
    model = tiny_model(family).eval()
    asked = {
        name: rows[:1].expand(4, *rows.shape[1:]) for name, rows in conditions(model, 4).items()
    }
    with torch.no_grad():
        cold = model.sample(4, temperature=0.0, **asked)
    assert (cold == cold[0]).all()
    if model.latent_dim is None:
        with pytest.raises(ValueError, match="latents"), torch.no_grad():
            model.sample(4, z=torch.zeros(4, 1), **asked)
        return
    z = torch.randn(4, model.latent_dim)
    with torch.no_grad():
        again = [model.sample(4, z=z, **asked) for _ in range(2)]
    assert torch.equal(*again)


def test_conditions_are_asked_for_and_matter(family: str) -> None:
    """Without a source or a text there is nothing to say; other conditions, other samples."""
    model = tiny_model(family).eval()
    for name in model.conditions - {"label"}:
        with pytest.raises(ValueError, match=name), torch.no_grad():
            model.sample(2, **{n: c for n, c in conditions(model, 2).items() if n != name})
    if "label" in model.conditions:
        assert model.sample(2).shape == (2, *model.data.shape)
    if not model.conditions:
        return
    model.train()  # so that batch norm does not hide behind statistics that are still empty
    with torch.no_grad():
        asked = conditions(model, 8)
        other = {name: rows.roll(1, 0) for name, rows in asked.items()}
        same = [_seeded(model, asked), _seeded(model, asked), _seeded(model, other)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def _seeded(model: GenerativeModel, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    return model.sample(8, temperature=0.0, **asked)


@pytest.mark.parametrize("penalised", ["wgan_gp", "stylegan2"])
def test_gradients_of_gradients_survive_compilation(penalised: str) -> None:
    model = tiny_model(penalised)
    compiled = torch.compile(model.losses, backend="aot_eager")
    for phase in model.phases():
        torch.manual_seed(1)
        compiled(tiny_batch(8, model.data), phase.name)["loss"].backward()


def test_every_family_names_its_paper_and_has_its_folder(family: str, root: Path) -> None:
    cls = FAMILIES[family]
    text = (root / "models" / family / "__init__.py").read_text()
    assert cls.__module__ == f"models.{family}"
    assert cls.paper.split(",")[0].split(" ")[0] in text
    assert issubclass(cls, nn.Module)
