"""Trainings by other libraries, each by its own trainer or by the loop that its documentation has.

A peer gets our networks where it takes networks, else builds its own of the same sizes. All train
in fp32, which is what their documentation does. Each function makes a training and returns it with
the number of parameters; called with a number of steps it trains so many and returns images/s.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

SKIP = 5  # steps before the clock starts
Training = Callable[[int], float]


@dataclass
class Peer:
    name: str
    parameters: int
    train: Training


class Clock:
    """Images per second from the end of step `SKIP` to the end of the last."""

    def __init__(self, images: int) -> None:
        self.images, self.ticks = images, [time.perf_counter()]

    def tick(self, *_: Any) -> None:
        self.ticks.append(time.perf_counter())

    def rate(self) -> float:
        steps = len(self.ticks) - 1 - SKIP
        return steps * self.images / (self.ticks[-1] - self.ticks[SKIP])


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def loader(root: Path, batch: int, *after: Callable[[Tensor], Tensor], workers: int = 0) -> Any:
    """A DataLoader over torchvision's MNIST, as everybody has it."""
    chain = transforms.Compose([transforms.ToTensor(), *after])
    data = MNIST(root, train=True, transform=chain)
    return DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=workers)


def endless(batches: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


# -- pythae ---------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their progress bars go into a buffer, where they cost what they cost."""
    logging.disable(logging.INFO)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


# -- normflows ------------------------------------------------------------------------------------


def normflows(model: Any, root: Path, batch: int) -> Peer:
    """normflows' RealNVP or Glow of our sizes, in the loop of its examples."""
    import normflows as nf

    glow = type(model).__name__ == "Glow"
    levels = _glow_blocks(model, nf) if glow else _couplings(model, nf)
    shapes = [shape for _, shape in levels]
    bases = [nf.distributions.DiagGaussian(shape, trainable=False) for shape in shapes]
    merges = [nf.flows.Merge() for _ in levels[1:]]
    logit = nf.transforms.Logit(model.config.alpha)
    flow = nf.MultiscaleFlow(bases, [f for f, _ in levels], merges, logit, class_cond=False)
    batches = loader(root, batch, nf.utils.Scale(255.0 / 256.0), nf.utils.Jitter(1 / 256.0))
    settings = model.config.optimizer
    optimizer = torch.optim.Adam(flow.parameters(), settings.lr, weight_decay=settings.weight_decay)

    def train(steps: int) -> float:
        clock = Clock(batch)
        for x, _ in itertools.islice(endless(batches), steps):
            optimizer.zero_grad()
            loss = flow.forward_kld(x)
            if ~(torch.isnan(loss) | torch.isinf(loss)):
                loss.backward()
                optimizer.step()
            clock.tick()
        return clock.rate()

    return Peer("normflows", count(flow), train)


class _Half(nn.Module):
    """The scale or the shift of a network that gives both, and is run once for the two of them."""

    def __init__(self, net: nn.Module, known: list[Tensor], *, scale: bool) -> None:
        super().__init__()
        self.net = net if scale else None
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        if self.net is None:
            return self.known.pop()
        raw, shift = self.net(x).chunk(2, 1)
        self.known.append(shift)
        return torch.tanh(raw)


def _couplings(model: Any, nf: Any) -> list[tuple[list[Any], tuple[int, ...]]]:
    """normflows' masked couplings over our masks, with networks of ours; coarsest level first."""

    def flows(couplings: Any) -> list[Any]:
        found = []
        for coupling in couplings:
            known: list[Tensor] = []
            scale, shift = (_Half(coupling.net, known, scale=first) for first in (True, False))
            found.append(nf.flows.MaskedAffineFlow(coupling.mask, shift, scale))
        return found[::-1]  # they are written from the latents to the data

    levels: list[tuple[list[Any], tuple[int, ...]]] = [(flows(model.last), model.last_shape)]
    shape = model.last_shape
    for before, after in zip(reversed(model.before), reversed(model.after), strict=True):
        levels.append(([*flows(after), nf.flows.Squeeze(), *flows(before)], shape))
        shape = (shape[0] // 2, 2 * shape[1], 2 * shape[2])
    return levels


def _glow_blocks(model: Any, nf: Any) -> list[tuple[list[Any], tuple[int, ...]]]:
    """normflows' Glow blocks, as many and as wide as ours; coarsest level first."""
    shape, levels = model.last_shape, []
    for number in range(len(model.levels)):  # the last level keeps all, the others lose a half
        channels = shape[0] if number == 0 else 2 * shape[0]
        blocks = [
            nf.flows.GlowBlock(channels, model.config.width, split_mode="channel", net_actnorm=True)
            for _ in range(model.config.steps)
        ]
        levels.append(([*blocks, nf.flows.Squeeze()], shape))
        shape = (channels // 4, 2 * shape[1], 2 * shape[2])
    return levels


# -- torchcfm -------------------------------------------------------------------------------------


def torchcfm(model: Any, root: Path, batch: int, *, own: bool = False) -> Peer:
    """The loop of torchcfm's MNIST example, with our U-Net or with its own of a like size."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel

    net: nn.Module = model.net
    if own:
        net = nearest(
            lambda w: UNetModel(dim=(1, 28, 28), num_channels=w, num_res_blocks=1),
            (32, 64),  # its norms have 32 groups
            count(model),
        )
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), model.config.optimizer.lr)
    batches = loader(root, batch, transforms.Normalize((0.5,), (0.5,)))

    def train(steps: int) -> float:
        clock = Clock(batch)
        for x1, _ in itertools.islice(endless(batches), steps):
            optimizer.zero_grad()
            x0 = torch.randn_like(x1)
            t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
            vt = net(t, xt) if own else net(xt, 1000 * t)
            loss = torch.mean((vt - ut) ** 2)
            loss.backward()
            optimizer.step()
            clock.tick()
        return clock.rate()

    return Peer("torchcfm, its own U-Net" if own else "torchcfm", count(net), train)


def nearest(build: Callable[[int], nn.Module], widths: Any, parameters: int) -> nn.Module:
    """Of the widths the one whose number of parameters is nearest."""
    return min((build(w) for w in widths), key=lambda net: abs(count(net) - parameters))


# -- denoising-diffusion-pytorch ------------------------------------------------------------------


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
