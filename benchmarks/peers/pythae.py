"""pythae: its VAE in its own trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import MNIST

from benchmarks.peers import Clock, Peer, count, quiet


def pythae(model: Any, root: Path, batch: int) -> Peer:
    """pythae's VAE with our encoder and decoder and its Bernoulli likelihood, its own trainer."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = model.encoder

        def forward(self, x: Tensor) -> Any:
            mean, log_var = self.body(x).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = model.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.body(z)))

    class Ticking(TrainingCallback):
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_train_step_end(self, *_: Any, **__: Any) -> None:
            self.clock.tick()

    config = VAEConfig((1, 28, 28), latent_dim=model.config.latent_dim, reconstruction_loss="bce")
    theirs = VAE(config, Encoder(), Decoder())
    x = (MNIST(root, train=True).data[:, None] > 127).float()

    def train(steps: int) -> float:
        clock, rows = Clock(batch), steps * batch
        with tempfile.TemporaryDirectory() as folder, quiet():
            settings = BaseTrainerConfig(
                output_dir=folder,
                num_epochs=1,
                per_device_train_batch_size=batch,
                learning_rate=model.config.optimizer.lr,
                no_cuda=True,
            )
            data = BaseDataset(x.repeat(-(-rows // len(x)), 1, 1, 1)[:rows], torch.ones(rows))
            BaseTrainer(theirs, data, None, settings, callbacks=[Ticking(clock)]).train()
        return clock.rate()

    return Peer("pythae", count(theirs), train)
