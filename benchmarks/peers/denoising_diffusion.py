"""denoising-diffusion-pytorch: its diffusion in its own Trainer."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.datasets import MNIST

from benchmarks.peers import Clock, Peer, count, nearest, quiet


def denoising_diffusion(model: Any, root: Path, batch: int, *, own: bool = False) -> Peer:
    """Its Trainer over a folder of PNG files, with our U-Net or with its own of a like size."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    class Network(nn.Module):
        channels = out_dim = 1
        self_condition = False

        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            return self.net(x, t.float())

    net: nn.Module = Network()
    if own:
        widths = range(32, 7, -8)
        net = nearest(lambda w: Unet(w, dim_mults=(1, 2, 2), channels=1), widths, count(model))
    diffusion = GaussianDiffusion(
        net, image_size=28, timesteps=1000, objective="pred_noise", beta_schedule="cosine"
    )
    folder = root / "png"
    if not folder.exists():
        folder.mkdir()
        for i, (image, _) in enumerate(itertools.islice(MNIST(root, train=True), 10_000)):
            image.save(folder / f"{i}.png")
    results = Path(tempfile.mkdtemp(dir=root))
    trainer: Any = None

    def train(steps: int) -> float:
        nonlocal trainer
        clock = Clock(batch)
        with quiet():
            if trainer is None:  # starts as many loader processes as there are processors
                trainer = Trainer(
                    diffusion,
                    folder,
                    train_batch_size=batch,
                    train_lr=model.config.optimizer.lr,
                    augment_horizontal_flip=False,
                    calculate_fid=False,
                    save_and_sample_every=10**9,
                    results_folder=str(results),
                )
            trainer.step, trainer.train_num_steps = 0, steps
            hook = trainer.opt.optimizer.register_step_post_hook(clock.tick)
            trainer.train()
            hook.remove()
        return clock.rate()

    name = "denoising-diffusion-pytorch"
    return Peer(f"{name}, its own U-Net" if own else name, count(net), train)
