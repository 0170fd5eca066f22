"""What every generative family is: one class, one `Config`, the same six methods."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.config import Config, OptimizerConfig
from models.data import PLURALS, Batch, DataSpec

Likelihood = Literal["exact", "bound", "ode", "ais", "none"]


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
    # whether it trains faster in bfloat16 on a CPU with its weights in channels_last (measured)
    channels_last: ClassVar[bool] = False

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
