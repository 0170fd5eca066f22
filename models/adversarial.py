"""What the adversarial families share: the DCGAN body, its initialisation, two losses, the
inversion of a generator, how an unconditional one samples and reconstructs, and what keeps
gradients of gradients out of compiled graphs.

    ConvGenerator      z [B, latent_dim] -> [B, C, H, W] in [-1, 1]: projection, then transposed
                       convolutions (kernel 4, stride 2) with batch norm and ReLU, tanh
    ConvDiscriminator  [B, C, H, W] -> [B, 1] (or features [B, F] from `features`): strided
                       convolutions with LeakyReLU(0.2), a norm in all but the first

Radford et al. 2016; depth follows the image's size, and kernels are 4x4, not 5x5, so that
transposed convolutions tile evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import GenerativeModel
from models.data import from_signed, to_signed
from models.nn import BatchNorm2d, Upsample, pyramid
from models.noise import randn

P = ParamSpec("P")
R = TypeVar("R")


class ConvGenerator(nn.Sequential):
    """`[B, inputs] -> [B, *shape]` in [-1, 1]."""

    def __init__(self, inputs: int, width: int, shape: tuple[int, ...]) -> None:
        sizes, widths = _sizes(shape, width)
        layers: list[nn.Module] = [
            nn.Linear(inputs, widths[-1] * math.prod(sizes[-1]), bias=False),
            nn.Unflatten(1, (widths[-1], *sizes[-1])),
            BatchNorm2d(widths[-1]),
            nn.ReLU(),
        ]
        for i in range(len(sizes) - 2, 0, -1):
            layers += [
                Upsample(widths[i], widths[i - 1], sizes[i], bias=False),
                BatchNorm2d(widths[i - 1]),
                nn.ReLU(),
            ]
        super().__init__(*layers, Upsample(widths[0], shape[0], sizes[0]), nn.Tanh())


class ConvDiscriminator(nn.Sequential):
    """`[B, *shape] -> [B, 1]`.

    Args:
        norm: makes the normalisation of so many channels; None: there is none.
        bias: of the last layer; a Wasserstein critic needs none, for it would cancel.
    """

    def __init__(
        self,
        width: int,
        shape: tuple[int, ...],
        *,
        norm: Callable[[int], nn.Module] | None = BatchNorm2d,
        bias: bool = True,
    ) -> None:
        sizes, widths = _sizes(shape, width)
        layers: list[nn.Module] = [down(shape[0], widths[0], sizes[0]), nn.LeakyReLU(0.2)]
        for (outer, inner), size in zip(pairwise(widths), sizes[1:], strict=False):
            layers.append(down(outer, inner, size, bias=norm is None))
            layers += [norm(inner)] if norm else []
            layers.append(nn.LeakyReLU(0.2))
        self.width_out = widths[-1] * math.prod(sizes[-1])
        super().__init__(*layers, nn.Flatten(), nn.Linear(self.width_out, 1, bias=bias))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, `[B, width_out]`."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def _sizes(shape: tuple[int, ...], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    _, height, breadth = shape
    sizes = pyramid((height, breadth), smallest=4 if min(height, breadth) > 8 else 2)
    return sizes, [width * 2**i for i in range(len(sizes) - 1)] or [width]


def down(inputs: int, outputs: int, size: tuple[int, int], *, bias: bool = True) -> nn.Module:
    """Convolution (kernel 4, stride 2) that halves `size`, rounding up where a side is odd."""
    odd_h, odd_w = (side % 2 for side in size)
    conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
    return nn.Sequential(nn.ZeroPad2d((0, odd_w, 0, odd_h)), conv) if odd_h or odd_w else conv


def initialise(module: nn.Module) -> None:
    """Radford et al.: weights from N(0, 0.02), scales from N(1, 0.02); for `nn.Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def discriminator_loss(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """-log D(x) - log(1 - D(G(z))) of logits (Goodfellow et al. 2014), and both probabilities."""
    real, fake = real.float(), fake.float()
    return {
        "loss": F.softplus(-real).mean() + F.softplus(fake).mean(),
        "real_probability": real.sigmoid().mean(),
        "fake_probability": fake.sigmoid().mean(),
    }


def generator_loss(fake: Tensor) -> dict[str, Tensor]:
    """-log D(G(z)) of logits: the non-saturating loss of Goodfellow et al. 2014."""
    return {"loss": F.softplus(-fake.float()).mean()}


def invert(
    generate: Callable[[Tensor], Tensor], target: Tensor, latent_dim: int, steps: int
) -> Tensor:
    """Latents `[B, latent_dim]` whose images come nearest to `target`, by squared error.

    Adam on z from the prior's mean (Creswell & Bharath 2018).
    """
    with torch.enable_grad():
        z = torch.zeros(len(target), latent_dim, device=target.device, requires_grad=True)
        descent = torch.optim.Adam([z], lr=0.05)
        for _ in range(steps):
            error = (generate(z) - target).square().flatten(1).sum(1).sum()
            (z.grad,) = torch.autograd.grad(error, [z])
            descent.step()
    return z.detach()


class UnconditionalGAN(GenerativeModel):
    """A GAN whose `generator` maps z ~ N(0, I) to images in [-1, 1]; its Config has `latent_dim`
    and `inversion_steps`."""

    reconstruction = "inversion"
    decodes = True
    generator: nn.Module

    def reconstruct(self, x: Tensor) -> Tensor:
        """Invert the generator: Adam on z from the prior's mean, squared error in pixels."""
        target, config = to_signed(x, self.data.levels), self.config
        z = invert(self.generator, target, config.latent_dim, config.inversion_steps)
        with torch.no_grad():
            return from_signed(self.generator(z), self.data.levels)

    def decode(self, z: Tensor) -> Tensor:
        return self.generator(z)

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
        if z is None:
            z = temperature * randn((n, self.config.latent_dim), self.device)
        return from_signed(self.generator(z), self.data.levels)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which stays as it is where `torch.compile` compiles its caller: compiled graphs
    cannot be differentiated twice.

    As a decorator `torch.compiler.disable` would import the compiler, a second of every process.
    """

    @wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return either
