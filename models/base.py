"""What every generative family is: one class, one `Config`, the same six methods.

Data are integer levels in `0 .. levels - 1` wherever they cross this interface: images
`[B, C, H, W]`, text `[B, T]` (bytes), points of the plane `[B, 2]` (cells of a grid). What a
family does inside (scaling, dequantisation) is its own business. Labels are class numbers `[B]`,
or `[B, A]` of 0 and 1 where the data has attributes. Captions are UTF-8 bytes `[B, T]`, zeros
after the end.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Modality = Literal["image", "text", "points"]
Likelihood = Literal["exact", "bound", "ode", "ais", "none"]


class Config(BaseModel):
    """Base of every configuration: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimizerConfig(Config):
    """One optimiser, spelled as in `params.yaml`."""

    name: Literal["adam", "adamw", "adamax", "rmsprop", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # Adam's; ignored by rmsprop and sgd
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)  # linear from 0 to lr
    decay_steps: Positive | None = None  # cosine from lr to 0 at this step; None: constant
    clip_grad_norm: float | None = Field(None, gt=0)  # None: no clipping


class SourceSpec(Config):
    """The other image of a pair, or the other domain: what translation starts from.

    A `masked` source has one channel more than the image, the last: `levels - 1` where pixels
    are missing (they are 0 in the others), 0 where they are known.
    """

    kind: Literal["pair", "edges", "low_resolution", "masked"]
    shape: tuple[Positive, ...]  # (C, H, W)
    aligned: bool = True  # False: training never sees a pair, its rows are drawn independently
    truth: bool = True  # whether the rows of validation and test are true pairs


class DataSpec(Config):
    """What a family must know of the data to size itself."""

    shape: tuple[Positive, ...]  # one example: image (C, H, W), text (T,), points (2,)
    levels: int = Field(ge=2)  # integer levels of one channel, 256 for 8-bit images and bytes
    classes: tuple[str, ...] = ()  # names; empty when there are no labels
    attributes: tuple[str, ...] = ()  # names of yes/no attributes; then there are no classes
    source: SourceSpec | None = None
    text_length: int = Field(0, ge=0)  # bytes of the longest caption; 0: no captions
    modality: Modality = "image"

    @property
    def dimensions(self) -> int:
        """Discrete values in one example; the D of bits per dimension."""
        return math.prod(self.shape)


PLURALS = {"image": "images", "text": "text", "points": "points"}


class Batch(NamedTuple):
    """What the data layer hands every family."""

    x: Tensor  # integer levels, [B, *shape], uint8
    label: Tensor | None = None  # [B] class numbers, or [B, A] attributes; int64
    source: Tensor | None = None  # levels of the other image of each pair, or of the other domain
    text: Tensor | None = None  # [B, T] bytes of the captions, uint8, zeros after the end


class Phase(NamedTuple):
    """One optimiser's turn within a training step."""

    name: str
    modules: tuple[nn.Module, ...]  # trained in this phase; everything else is frozen
    optimizer: OptimizerConfig  # phases of equal modules and optimizer share the optimiser
    every: int = 1  # runs on steps divisible by this
    repeats: int = 1  # times in a row, each on a fresh batch (WGAN's critic)


class GenerativeModel(nn.Module, ABC):
    """Base class of the families.

    A capability that a family lacks raises `NotImplementedError`; its class attributes say
    beforehand which ones it has, so nothing ever needs to ask for a family by name.
    """

    Config: ClassVar[type[Config]]
    paper: ClassVar[str]
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})  # of Modality
    likelihood: ClassVar[Likelihood] = "none"
    reconstruction: ClassVar[Literal["encode-decode", "inversion", "cycle", "none"]] = "none"
    # of {"label", "source", "text"}: what the class needs; an instance may have more, by its config
    conditions: frozenset[str] = frozenset()
    most_draws: int | None = None  # that `log_prob` takes, however many are asked for
    decodes: ClassVar[bool] = False  # whether it has `decode`
    training_only: ClassVar[tuple[str, ...]] = ()  # prefixes of buffers that no sample depends on
    requirements: ClassVar[tuple[str, ...]] = ()  # packages beyond torch that sampling needs

    def __init__(self, config: Any, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.data = data

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        """Why the family cannot learn from such data, in words; None: it can."""
        if data.modality not in cls.modalities:
            kinds = " and ".join(PLURALS[kind] for kind in sorted(cls.modalities))
            return f"it models {kinds}, not {PLURALS[data.modality]}"
        if "label" in cls.conditions and not (data.classes or data.attributes):
            return "it needs labels, and the data has no classes"
        if "source" in cls.conditions and data.source is None:
            return "it needs pairs (dataset.name: paired_folder, or dataset.derive)"
        if "text" in cls.conditions and not data.text_length:
            return "it needs captions (dataset.captions, or captions.csv beside the images)"
        return None

    @property
    def latent_dim(self) -> int | None:
        """Width of the latents `z` that `sample` takes, `[n, latent_dim]`; None: it takes none."""
        return getattr(self.config, "latent_dim", None)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `sample` that this family alone has, with their defaults."""
        common = inspect.signature(GenerativeModel.sample).parameters
        mine = inspect.signature(type(self).sample).parameters
        return {name: p.default for name, p in mine.items() if name not in common}

    def phases(self) -> tuple[Phase, ...]:
        """The optimisers of one step, in order. Default: one, over everything.

        None at all: the family is not trained by gradients; every step calls `fit`.
        """
        return (Phase("main", (self,), self.config.optimizer),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Scalar losses of `batch`; `"loss"` is differentiated, all are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def fit(self, data: Batch) -> dict[str, Tensor]:
        """One pass over the whole train split (an EM iteration, a count), for families without
        phases; returns scalars to log, `"loss"` among them. State is in buffers."""
        raise NotImplementedError(f"{type(self).__name__} is trained by gradients")

    @property
    def converged(self) -> bool:
        """Whether another `fit` would change nothing worth having; training then ends."""
        return False

    def after_step(self, phase: str) -> None:
        """Called after each optimiser step of `phase`, without gradients (weight clipping)."""

    @abstractmethod
    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw `n` examples, uint8 levels `[n, *shape]`.

        `label`, `source` and `text` are the conditions, one row for each example, as in
        `Batch`; a family that has them in `conditions` draws labels itself where none are
        given, and raises ValueError without the source or the text that it needs. `z` fixes the
        latents. `temperature` scales the spread of the noise, 0 leaves none (for StyleGAN2 it is
        the truncation psi). A model of text continues `text`, `[n, P]` bytes without padding.
        """

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Log-probability of the discrete data in nats, `[B]`.

        `samples` is the number of Monte Carlo draws (importance samples, dequantisation
        noise) behind each estimate where the family needs any: more is tighter; memory does
        not grow with it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no likelihood")

    @property
    def likelihood_note(self) -> str:
        """How the number of `log_prob` comes about, beyond its kind: tolerance, chains, steps."""
        return ""

    def decode(self, z: Tensor) -> Tensor:
        """The images of latents `[B, latent_dim]`, floats `[B, *shape]` about [-1, 1],
        differentiable and without noise; the likelihood of a family that `decodes` but has none
        is estimated from outside."""
        raise NotImplementedError(f"{type(self).__name__} has no decoder")

    def reconstruct(self, x: Tensor) -> Tensor:
        """The model's nearest rendering of `x`, uint8 levels `[B, C, H, W]`."""
        raise NotImplementedError(f"{type(self).__name__} cannot reconstruct")

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device


# -- levels and real numbers ----------------------------------------------------------------


def to_signed(x: Tensor, levels: int) -> Tensor:
    """Levels `0 .. levels - 1` to floats in [-1, 1]."""
    return x.to(torch.get_default_dtype()) * (2.0 / (levels - 1)) - 1.0


def from_signed(y: Tensor, levels: int) -> Tensor:
    """Floats in [-1, 1] to the nearest level, as uint8; what lies outside is clamped."""
    _note_nans(y)
    scaled = (y.float() + 1.0) * ((levels - 1) / 2.0)
    return scaled.round().clamp(0, levels - 1).to(torch.uint8)


def from_unit(y: Tensor, levels: int) -> Tensor:
    """Reals in [0, 1) to the level in whose cell they lie, as uint8, which undoes `dequantise`;
    what lies outside is clamped."""
    _note_nans(y)
    return (y * levels).floor().clamp(0, levels - 1).to(torch.uint8)


_nans: ContextVar[list[int] | None] = ContextVar("nans", default=None)


@contextmanager
def counting_nans() -> Iterator[list[int]]:
    """Inside, `from_signed` and `from_unit` note how many of the examples that they are given hold
    a value that is not a number: as a level, nothing would tell it from the others. Yields the list
    of the counts, one for each call."""
    counts: list[int] = []
    token = _nans.set(counts)
    try:
        yield counts
    finally:
        _nans.reset(token)


def _note_nans(y: Tensor) -> None:
    counts = _nans.get()
    if counts is not None:
        counts.append(int(y.isnan().flatten(1).any(1).sum()))


def dequantise(x: Tensor, levels: int) -> tuple[Tensor, float]:
    """Uniform dequantisation: levels to reals in [0, 1), with the log-volume of the map.

    Returns `y = (x + u) / levels`, u ~ U[0, 1), and `c` such that for a density p over y
    `log P(x) >= E_u[log p(y)] + c` (Theis et al. 2016, section 3.1); c is in nats for one
    whole example.
    """
    u = rand(x.shape, x.device)
    return (x.to(u.dtype) + u) / levels, -math.prod(x.shape[1:]) * math.log(levels)


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(values), stable."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


def random_labels(n: int, data: DataSpec, device: torch.device) -> Tensor:
    """Labels for samples that nobody asked a label of: uniform over classes, or fair attributes."""
    if data.attributes:
        return (rand((n, len(data.attributes)), device) < 0.5).long()
    return (rand((n,), device) * len(data.classes)).long()


# -- noise that does not depend on the number of workers ---------------------------------------

_shard: ContextVar[tuple[int, int]] = ContextVar("shard", default=(0, 1))


@contextmanager
def noise_shard(rank: int, world: int) -> Iterator[None]:
    """Inside, `randn` and `rand` draw the global batch's noise and keep this rank's rows.

    Every worker seeds alike, so two workers with batch B see the noise that one worker with
    batch 2B sees. Drawing the other rows too costs little beside a network.
    Blocks that look across the batch (`models.nn`) take the number of workers from here as well.
    """
    token = _shard.set((rank, world))
    try:
        yield
    finally:
        _shard.reset(token)


def randn(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise; the first dimension of `shape` is the batch."""
    return _rows(torch.randn, shape, device)


def rand(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform noise in [0, 1); the first dimension of `shape` is the batch."""
    return _rows(torch.rand, shape, device)


def _rows(draw: Any, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    rank, world = _shard.get()
    rows = shape[0]
    return draw(rows * world, *shape[1:], device=device)[rank * rows : (rank + 1) * rows]


def shard() -> tuple[int, int]:
    """(rank, world) inside `noise_shard`; (0, 1) outside."""
    return _shard.get()
