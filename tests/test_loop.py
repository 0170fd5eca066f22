"""The training loop: exact resuming, honest stopping, the same step on any number of workers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from models import FAMILIES
from models.base import GenerativeModel, Phase
from models.config import OptimizerConfig
from models.data import Batch
from models.noise import randn
from tasks.training.candidates import load_best
from tasks.training.comm import Comm
from tasks.training.config import Budget, TrainConfig
from tasks.training.data import TrainData, check_batch
from tasks.training.loop import Outcome, train
from tasks.training.optim import learning_rate
from tasks.training.turns import NonFiniteLoss
from tests.conftest import TINY, tiny_data, tiny_images, tiny_model

IMAGES = 40


def config(steps: int = 12, **changes: Any) -> TrainConfig:
    settings = {
        "batch_size": 8,
        "budget": Budget(steps=steps),
        "log_every": 3,
        "validate_every": 4,
        "checkpoint_every": 4,
        "precision": "fp32",
        **changes,
    }
    return TrainConfig(**settings)


def run(family: str, directory: Path, settings: TrainConfig, **options: Any) -> tuple[Any, Outcome]:
    model = tiny_model(family)
    outcome = train(model, tiny_data(IMAGES, model.data), settings, directory, **options)
    return model, outcome


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def score_of_step(model: GenerativeModel, step: int) -> dict[str, float]:
    return {"score": float(step)}


def test_resumed_is_straight_bit_for_bit(family: str, tmp_path: Path) -> None:
    straight, _ = run(family, tmp_path / "straight", config(12))
    _, cut = run(family, tmp_path / "resumed", config(5))
    resumed, outcome = run(family, tmp_path / "resumed", config(12))
    assert outcome.resumed_from == cut.progress.step
    assert cut.progress.step == 5 or resumed.converged
    assert_equal(straight, resumed)
    averages = [
        sorted((tmp_path / n).glob("step-*"))[-1] / "average.safetensors"
        for n in ("straight", "resumed")
    ]
    assert averages[0].read_bytes() == averages[1].read_bytes()


def test_stopped_anywhere_resumes_to_the_same(family: str, tmp_path: Path) -> None:
    straight, whole = run(family, tmp_path / "straight", config(10))
    calls, at = iter(range(100)), min(7, whole.progress.step - 1)  # a fit may converge before
    _, first = run(family, tmp_path / "cut", config(10), should_stop=lambda: next(calls) == at - 1)
    assert first.finished == (at == 0)
    assert first.progress.step == at or at == 0
    cut, second = run(family, tmp_path / "cut", config(10))
    assert second.finished
    assert second.resumed_from == first.progress.step
    assert_equal(straight, cut)


def test_another_seed_is_another_run(family: str, tmp_path: Path) -> None:
    if not tiny_model(family).phases():
        pytest.skip("what is fitted in closed form need not depend on the seed")
    one, _ = run(family, tmp_path / "a", config(3, seed=0))
    two, _ = run(family, tmp_path / "b", config(3, seed=1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert not all(same)


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    for family in FAMILIES:
        model, told = run(family, Path(folder) / family, config(6, batch_size=16), comm=Comm())
        spent = {k: v for k, v in told.progress.spent().items() if k != "seconds"}
        torch.save([model.state_dict(), spent], Path(folder) / f"{family}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The states of every family after training on two gloo workers."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(_worker, args=(2, port, str(folder)), nprocs=2)
    return folder


def test_two_workers_are_one_with_twice_the_batch(
    family: str, two_workers: Path, tmp_path: Path
) -> None:
    start = {name: tensor.clone() for name, tensor in tiny_model(family).state_dict().items()}
    alone, told = run(family, tmp_path, config(6, batch_size=16))
    both = [torch.load(two_workers / f"{family}-{r}.pt", weights_only=True) for r in (0, 1)]
    states = [state for state, _ in both]
    for _, spent in both:
        assert spent == {name: told.progress.spent()[name] for name in spent}
    for name, tensor in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        moved = (tensor.double() - start[name].double()).abs().max()
        apart = (tensor.double() - states[0][name].double()).abs().max()
        assert apart <= 1e-6 + 0.02 * moved, f"{name}: moved {moved:.2e}, apart {apart:.2e}"


class Fitted(GenerativeModel):
    """Counts its fits, and has enough after four."""

    def __init__(self) -> None:
        super().__init__(None, TINY)
        self.register_buffer("fits", torch.zeros(1))

    def phases(self) -> tuple[Phase, ...]:
        return ()

    def fit(self, data: Batch) -> dict[str, Tensor]:
        assert len(data.x) == IMAGES  # the whole split, not a batch
        self.fits += 1
        return {"loss": self.fits[0].clone()}

    @property
    def converged(self) -> bool:
        return bool(self.fits >= 4)

    def sample(self, n: int, **options: Any) -> Tensor:
        raise NotImplementedError


def test_without_phases_the_whole_split_is_fitted_until_it_converges(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    seen: list[float] = []

    def validate(model: GenerativeModel, step: int) -> dict[str, float]:
        seen.append(float(model.fits))  # type: ignore[arg-type]
        return {"score": 0.0}

    outcome = train(
        Fitted(),
        TrainData(tiny_images(IMAGES)),
        config(100),
        tmp_path,
        validate=validate,
        on_record=records.append,
    )
    assert outcome.finished
    assert outcome.progress.step == 4
    assert outcome.progress.images == 4 * IMAGES
    assert outcome.progress.flops is None  # there is nothing to count
    assert seen == [4.0]  # itself, not an average
    assert records[-2]["fit/loss"] == 4.0
    assert records[-1] == {"step": 4, "validation/score": 0.0}


def test_the_learning_rate_warms_up_and_decays() -> None:
    options = OptimizerConfig(lr=2.0, warmup_steps=4, decay_steps=100)
    assert learning_rate(options, 0) == pytest.approx(0.5, rel=1e-3)
    assert learning_rate(options, 50) == pytest.approx(1.0)
    assert learning_rate(options, 100) == learning_rate(options, 400) == pytest.approx(0.0)
    assert learning_rate(OptimizerConfig(lr=2.0), 10**6) == 2.0


def test_best_checkpoint_is_the_validations_choice(tmp_path: Path) -> None:
    scores = {4: 3.0, 8: 1.0, 12: 2.0}
    kept: dict[int, dict[str, Tensor]] = {}

    def validate(model: GenerativeModel, step: int) -> dict[str, float]:
        assert not model.training
        kept[step] = {name: t.clone() for name, t in model.state_dict().items()}
        return {"score": scores[step]}

    _, outcome = run("vae", tmp_path, config(12), validate=validate)
    assert (outcome.best_step, outcome.best_score) == (8, 1.0)
    best = load_best(tmp_path)
    assert all(torch.equal(best[name], tensor) for name, tensor in kept[8].items())
    assert not torch.equal(best["encoder.0.weight"], kept[12]["encoder.0.weight"])


def test_moving_average_is_the_formula(tmp_path: Path) -> None:
    class Bare(GenerativeModel):
        def __init__(self) -> None:
            super().__init__(None, TINY)
            self.w = nn.Parameter(torch.zeros(1))
            self.register_buffer("seen", torch.zeros(1))

        def phases(self) -> tuple[Phase, ...]:
            return (Phase("main", (self,), OptimizerConfig(name="sgd", lr=1.0)),)

        def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
            self.seen += 1
            return {"loss": -self.w.sum()}  # w grows by one each step

        def sample(self, n: int, **options: Any) -> Tensor:
            raise NotImplementedError

    expected = averaged_buffer = 1.0
    for n in range(1, 30):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        averaged_buffer = decay * averaged_buffer + (1 - decay) * (n + 1)
    found: dict[str, float] = {}

    def validate(model: GenerativeModel, step: int) -> dict[str, float]:
        found.update({name: float(t) for name, t in model.state_dict().items()})
        return {"score": 0.0}

    settings = config(30, ema_decay=0.9, validate_every=30)
    train(Bare(), TrainData(tiny_images(IMAGES)), settings, tmp_path, validate=validate)
    assert found["w"] == pytest.approx(expected, rel=1e-5)
    assert found["seen"] == pytest.approx(averaged_buffer, rel=1e-5)


class Scripted(GenerativeModel):
    """Two phases whose schedule and batches are recorded."""

    def __init__(self) -> None:
        super().__init__(None, TINY)
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)
        self.calls: list[tuple[str, float, float]] = []
        self.explode_at: int | None = None

    def phases(self) -> tuple[Phase, ...]:
        fast = OptimizerConfig(lr=1e-3)
        return (
            Phase("critic", (self.a,), fast, repeats=3),
            Phase("regulariser", (self.b,), fast, every=2),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        noise = float(randn((len(batch.x), 1), batch.x.device)[0])
        self.calls.append((phase, float(batch.x.float().mean()), noise))
        module = self.a if phase == "critic" else self.b
        loss = module(torch.ones(1, 1)).mean()
        if self.explode_at == len(self.calls):
            loss = loss * math.nan
        return {"loss": loss}

    def sample(self, n: int, **options: Any) -> Tensor:
        raise NotImplementedError


def test_phases_repeat_and_skip(tmp_path: Path) -> None:
    model = Scripted()
    train(model, TrainData(tiny_images(IMAGES)), config(4), tmp_path)
    names = [name for name, _, _ in model.calls]
    assert names == (["critic"] * 3 + ["regulariser"] + ["critic"] * 3) * 2
    critic = [call for call in model.calls[:3] if call[0] == "critic"]
    assert len({batch for _, batch, _ in critic}) == 3  # a fresh batch each time
    assert len({noise for _, _, noise in model.calls}) == len(model.calls)


class Lazy(GenerativeModel):
    """A regulariser that shares its modules and optimizer with the main phase, and a clip."""

    def __init__(self) -> None:
        super().__init__(None, TINY)
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.ended: list[str] = []

    def phases(self) -> tuple[Phase, ...]:
        fast = OptimizerConfig(lr=1e-2)
        return (
            Phase("main", (self.a,), fast),
            Phase("regulariser", (self.a,), fast, every=4),
            Phase("other", (self.b,), fast),
        )

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        module = self.b if phase == "other" else self.a
        return {"loss": module(torch.ones(1, 1)).mean()}

    def after_step(self, phase: str) -> None:
        assert not torch.is_grad_enabled()
        self.ended.append(phase)
        self.b.weight.clamp_(-0.5, 0.5)

    def sample(self, n: int, **options: Any) -> Tensor:
        raise NotImplementedError


def test_lazy_regularisation_shares_the_optimiser_and_steps_have_an_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Lazy()
    train(model, TrainData(tiny_images(IMAGES)), config(8), tmp_path)
    assert model.ended == (["main", "regulariser", "other"] + ["main", "other"] * 3) * 2
    assert float(model.b.weight.detach().abs()) <= 0.5
    newest = sorted(tmp_path.glob("step-*"))[-1]
    states = torch.load(newest / "optimizer.pt", weights_only=True)
    assert [float(s["state"][0]["step"]) for s in states] == [
        10.0,
        8.0,
    ]  # main and regulariser: one


def test_unpaired_domains_are_shuffled_apart_and_each_is_seen_whole() -> None:
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    source, comm = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1), Comm()
    data = TrainData(x, source=source, aligned=False)
    assert len(data) == 24
    batches = [data.batch(i, 8, 0, comm) for i in range(15)]
    xs = torch.cat([b.x for b in batches]).flatten()
    sources = torch.cat([b.source for b in batches if b.source is not None]).flatten()
    assert [sorted(xs[i : i + 40].tolist()) for i in (0, 40, 80)] == [list(range(40))] * 3
    assert [sorted(sources[i : i + 24].tolist()) for i in range(0, 120, 24)] == [
        list(range(24))
    ] * 5
    equal = TrainData(x, source=x.clone(), aligned=False)
    both = [equal.batch(i, 8, 0, comm) for i in range(5)]
    assert not all(torch.equal(b.x, b.source) for b in both if b.source is not None)
    paired = TrainData(x, source=x.clone()).batch(3, 8, 0, comm)
    assert paired.source is not None
    assert torch.equal(paired.x, paired.source)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_phase(tmp_path: Path) -> None:
    model = Scripted()
    model.explode_at = 11  # step 2, the second step with critic, regulariser -> third step
    with pytest.raises(NonFiniteLoss, match=r"step 2, phase 'regulariser': loss is nan"):
        train(model, TrainData(tiny_images(IMAGES)), config(9), tmp_path)
    newest = sorted(tmp_path.glob("step-*"))
    assert newest == []  # nothing after the bad step was saved


def test_time_budget_ends_training_and_resumes_the_clock(tmp_path: Path) -> None:
    settings = config(batch_size=8, budget=Budget(minutes=0.02))
    _, outcome = run("vae", tmp_path, settings)
    assert outcome.finished
    assert 1.2 <= outcome.progress.seconds < 6
    _, again = run("vae", tmp_path, settings)
    assert again.progress.step == outcome.progress.step


def test_history_has_means_speed_and_validation(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    run("dcgan", tmp_path, config(8), on_record=records.append, validate=score_of_step)
    assert [r["step"] for r in records if "seconds" in r] == [3, 4, 6, 8]
    assert {"discriminator/loss", "generator/loss", "images_per_second", "images"} <= set(
        records[0]
    )
    assert [r["step"] for r in records if "validation/score" in r] == [4, 8]
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize(
    ("batch_size", "world", "words"),
    [(41, 1, "largest possible is 40"), (9, 2, "nearest that can is 8")],
)
def test_impossible_batches_are_refused(batch_size: int, world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_batch(IMAGES, batch_size, world)


def test_an_epoch_shows_every_image_once() -> None:
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    data, comm = TrainData(x), Comm()
    epochs = [torch.cat([data.batch(e * 5 + i, 8, 0, comm).x for i in range(5)]) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(40))
    assert epochs[0].flatten().tolist() != epochs[1].flatten().tolist()


def test_warmup_and_clipping_are_applied(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "lr": 1.0, "warmup_steps": 10, "clip_grad_norm": 1e-3}
    model = tiny_model("vae", optimizer=OptimizerConfig(**optimizer))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    records: list[dict[str, Any]] = []
    train(model, TrainData(tiny_images(IMAGES)), config(1), tmp_path, on_record=records.append)
    moved = math.sqrt(
        sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters())
    )
    assert moved == pytest.approx(1.0 / 10 * 1e-3, rel=1e-2)
    assert records[0]["main/grad_norm"] > 1e-3
