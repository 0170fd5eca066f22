"""How to train: the `train:` section of `params.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.config import Config, Positive


class Budget(Config):
    """When training stops: exactly one of the four. The step that reaches it is the last."""

    steps: Positive | None = None
    images: Positive | None = None  # read in batches; each of a critic's repeats reads its own
    minutes: float | None = Field(None, gt=0)  # of training steps, validation not counted
    flops: float | None = Field(None, gt=0)  # of matrix products and convolutions, as counted once

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"got {' and '.join(given)}" if given else "got none"
            raise ValueError(f"needs exactly one of steps, images, minutes or flops; {found}")
        return self

    def share(self, *, step: int, images: int, seconds: float, flops: int | None) -> float:
        """How much of it is spent; from 1 on, all. `flops` is None where they are not counted."""
        if self.steps is not None:
            return step / self.steps
        if self.images is not None:
            return images / self.images
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        assert self.flops is not None
        if flops is None:
            raise ValueError("a budget of flops, but they are not counted")
        return flops / self.flops

    def __str__(self) -> str:
        """As in `2,000 steps` or `10 minutes`."""
        name, amount = next(iter(self.model_dump(exclude_none=True).items()))
        return f"{amount:g} {name}" if isinstance(amount, float) else f"{amount:,} {name}"


class TrainSection(Config):
    batch_size: Positive = 64  # over all workers
    budget: Budget = Budget(steps=1000)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor has it
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the weights that are evaluated; 0: none
    compile: bool = False  # torch.compile the family's losses
    # memory: the training images lie on the device; stream: they are read from disk again in every
    # epoch, for more of them than memory holds; auto: stream where they take more than half of it.
    # The result is the same
    data: Literal["auto", "memory", "stream"] = "auto"
    log_every: Positive = 20  # steps
    validate_every: Positive = 250  # steps
    checkpoint_every: Positive = 250  # steps; what a kill can cost
    # asynchronous: a process beside the training validates, at the lowest priority; synchronous:
    # training waits meanwhile, for GPUs (or memory) that have no room for a second process; auto:
    # asynchronous where the trainings leave a processor over, for without one it only adds a start
    validation: Literal["auto", "asynchronous", "synchronous"] = "auto"
    validation_images: Positive = 512  # of the validation split, for the likelihood
    validation_samples: int = Field(512, ge=8)  # drawn from the model, for the Fréchet distance
    # auto: bits_per_dim for a family with a likelihood, else frechet_distance; loss: of families
    # with one phase, on the validation split
    select: Literal[
        "auto", "bits_per_dim", "frechet_distance", "loss", "perceptual_distance", "psnr"
    ] = "auto"
    max_failures: int = Field(3, ge=0)  # lost workers that are replaced before giving up


class TrainConfig(TrainSection):
    """The section with the seed of one run: what the loop takes."""

    seed: int = Field(0, ge=0)
