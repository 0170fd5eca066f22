"""Configurations: frozen, strict, and what they are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


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
