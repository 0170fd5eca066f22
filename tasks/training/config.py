"""How to train: the `train:` section of `params.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.base import Config, Positive


class Budget(Config):
    """When training stops: exactly one of the two."""

    steps: Positive | None = None
    minutes: float | None = Field(None, gt=0)  # of training steps, validation not counted

    @property
    def words(self) -> str:
        """As in `2,000 steps` or `10 minutes`."""
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.minutes:g} minutes"

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("needs either 'steps' or 'minutes', not both and not neither")
        return self


class TrainSection(Config):
    batch_size: Positive = 64  # over all workers
    budget: Budget = Budget(steps=1000)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor has it
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the weights that are evaluated; 0: none
    compile: bool = False  # torch.compile the family's losses
    log_every: Positive = 20  # steps
    validate_every: Positive = 250  # steps
    checkpoint_every: Positive = 250  # steps; what a kill can cost
    validation_images: Positive = 512  # of the validation split, for the likelihood
    validation_samples: int = Field(512, ge=8)  # drawn from the model, for the Fréchet distance
    select: Literal["auto", "bits_per_dim", "frechet_distance", "perceptual_distance", "psnr"] = (
        "auto"  # bits_per_dim for a family with a likelihood, else frechet_distance
    )
    max_failures: int = Field(3, ge=0)  # lost workers that are replaced before giving up


class TrainConfig(TrainSection):
    """The section with the seed of one run: what the loop takes."""

    seed: int = Field(0, ge=0)
