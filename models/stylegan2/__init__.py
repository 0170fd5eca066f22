"""StyleGAN2: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"; its
adaptive augmentation: Karras et al. 2020b, "Training GANs with Limited Data".

    mapping        z [B, latent_dim], normalised -> w [B, latent_dim]
    synthesis      ws [B, styles, latent_dim] -> [B, C, H, W], around [-1, 1]: a learned constant,
                   demodulated convolutions with noise inputs, colours summed on the way up
    discriminator  [B, C, H, W] -> logit [B, 1]: residual blocks, minibatch standard deviation
    losses         discriminator: -log D(x) - log(1 - D(G(z))); generator: -log D(G(z))
                   r1, every 16 steps: 16 gamma/2 E |dD/dx|^2 (Mescheder et al. 2018)
                   path_length, every 4: 4 weight E (|J^T y| - a)^2, a the running mean

As in the paper: equalised learning rate (0.01 of it in the mapping), the filter [1, 3, 3, 1],
style mixing, lazy regularisation with corrected Adam, shared by a network's phases; truncation.
Deviations: depth follows the image's size (sides halve, rounding up; crops where odd), and widths
suit a CPU. Each example has its own crossover of styles. The learning rate is 8e-3, not 2e-3, for
short runs. Path lengths are scaled as in the authors' code (noise over sqrt(H W), mean over
layers), on the whole batch, not half; their running mean starts at the first batch's, not at 0,
which would collapse a short run. gamma does not follow the resolution. Minibatch groups are
neighbours, the largest divisor of the batch up to 4, so workers form the groups of one worker if
each has a multiple of 4 rows. `temperature` is psi, and scales the noise inputs too: 0 leaves the
mean image. Given `z` decides the sample: noise inputs are off. `reconstruct` is the projection onto
w of appendix D, by squared error for LPIPS, noise inputs off. "ada" has mirroring (optional),
integer translation, brightness, contrast, cutout: no geometric warps (grid_sample has no second
derivative, which R1 needs), hues, filters or pixel noise; p follows each batch, not four, and ten
times as fast, for short runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import base
from models.adversarial import discriminator_loss, generator_loss, invert
from models.base import OptimizerConfig, Positive, rand, randn
from models.nn import global_mean, pyramid

Size = tuple[int, int]


class StyleGAN2Config(base.Config):
    latent_dim: Positive = 64  # of z and of w
    mapping_layers: Positive = 4
    width: Positive = 32  # channels beside the image; doubled at each halving, up to
    max_width: Positive = 128
    style_mixing: base.Fraction = 0.9  # probability of a second style from some layer on
    r1_gamma: float = Field(0.3, ge=0)
    r1_every: Positive = 16
    path_length_weight: float = Field(2.0, ge=0)
    path_length_every: Positive = 4
    augment: Literal["none", "ada"] = "none"
    augment_mirror: bool = False  # left for right, too; not for digits
    augment_images: Positive = 50_000  # real images in which p can go from 0 to 1
    inversion_steps: Positive = 300  # of Adam on w, for `reconstruct`
    generator_optimizer: OptimizerConfig = OptimizerConfig(lr=8e-3, betas=(0.0, 0.99))
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=8e-3, betas=(0.0, 0.99))


class StyleGAN2(base.GenerativeModel):
    """Two main phases a step, and the two regularisers' now and then."""

    Config = StyleGAN2Config
    paper = "Karras et al. 2020, arXiv:1912.04958"
    reconstruction = "inversion"
    config: StyleGAN2Config
    w_mean: Tensor
    path_length_mean: Tensor
    augment_p: Tensor

    def __init__(self, config: StyleGAN2Config, data: base.DataSpec) -> None:
        super().__init__(config, data)
        channels, *side = data.shape
        sizes = pyramid((side[0], side[1]))
        widths = [min(config.width * 2**i, config.max_width) for i in range(len(sizes))]
        layers = [
            Equal(config.latent_dim, config.latent_dim, rate=0.01)
            for _ in range(config.mapping_layers)
        ]
        self.mapping = nn.Sequential(Normalise(), *layers)
        self.synthesis = Synthesis(config.latent_dim, widths[::-1], sizes[::-1], channels)
        self.discriminator = discriminator(widths, sizes, channels)
        self.register_buffer("w_mean", torch.zeros(config.latent_dim))
        for name in ("path_length_mean", "augment_p"):
            self.register_buffer(name, torch.zeros(()))

    def phases(self) -> tuple[base.Phase, ...]:
        c, g, d = self.config, (self.mapping, self.synthesis), (self.discriminator,)
        g_adam = lazily(c.generator_optimizer, c.path_length_every)
        d_adam = lazily(c.discriminator_optimizer, c.r1_every)
        return (
            base.Phase("generator", g, g_adam),
            base.Phase("path_length", g, g_adam, every=c.path_length_every),
            base.Phase("discriminator", d, d_adam),
            base.Phase("r1", d, d_adam, every=c.r1_every),
        )

    def losses(self, batch: base.Batch, phase: str) -> dict[str, Tensor]:
        real = base.to_signed(batch.x, self.data.levels)
        if phase in ("r1", "path_length"):  # gradients of gradients, in full precision
            with torch.autocast(real.device.type, enabled=False):
                return self._r1_loss(real) if phase == "r1" else self._path_length_loss(len(real))
        if phase == "generator":
            return generator_loss(self._judge(self.synthesis(self._styles(len(real), track=True))))
        with torch.no_grad():
            fake = self.synthesis(self._styles(len(real)))
        logits = self._judge(real)
        losses = discriminator_loss(logits, self._judge(fake))
        if self.config.augment == "ada":
            certainty = global_mean(logits.sign().mean())  # r_t of Karras et al. 2020b
            step = len(real) * base.shard()[1] / self.config.augment_images
            self.augment_p += (certainty - 0.6).sign() * step
            self.augment_p.clamp_(0, 1)
            losses |= {"certainty": certainty, "augment_p": self.augment_p.clone()}
        return losses

    # Both add their networks' output times 0: where the penalty does not depend on a parameter,
    # its gradient is then 0 and not missing, and Adam takes the same step on any number of workers.

    @torch.compiler.disable  # compiled graphs cannot be differentiated twice
    def _r1_loss(self, real: Tensor) -> dict[str, Tensor]:
        penalty, logits = r1_penalty(self._judge, real)
        scale = 0.5 * self.config.r1_gamma * self.config.r1_every
        return {"loss": scale * penalty + 0 * logits.sum(), "penalty": penalty}

    @torch.compiler.disable
    def _path_length_loss(self, n: int) -> dict[str, Tensor]:
        y = randn((n, *self.data.shape), self.device)
        lengths, image = path_lengths(self.synthesis, self._styles(n), y)
        weight = torch.where(self.path_length_mean == 0, 1.0, 0.01)  # from the first batch's on
        self.path_length_mean.lerp_(global_mean(lengths.mean()), weight)
        penalty = (lengths - self.path_length_mean).square().mean()
        scale = self.config.path_length_weight * self.config.path_length_every
        loss = scale * penalty + 0 * image.sum()
        return {"loss": loss, "penalty": penalty, "length": lengths.mean()}

    def _judge(self, x: Tensor) -> Tensor:
        if self.config.augment == "ada":
            x = augment(x, self.augment_p, mirror=self.config.augment_mirror)
        return self.discriminator(x)

    def _styles(self, n: int, *, track: bool = False) -> Tensor:
        """Mixed styles for training, `[n, styles, latent_dim]`."""
        z = randn((n, 2 * self.config.latent_dim), self.device)
        w, other = (self.mapping(part) for part in z.chunk(2, 1))
        if track:
            self.w_mean.lerp_(global_mean(w.mean(0)), 0.005)
        u = rand((n, 2), self.device)
        return mix(w, other, u, self.config.style_mixing, self.synthesis.styles)

    def _image(self, w: Tensor, noise: float = 0.0) -> Tensor:
        return self.synthesis(w[:, None].expand(-1, self.synthesis.styles, -1), noise)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Project onto w: Adam from the mean of w, squared error in pixels."""
        target, config = base.to_signed(x, self.data.levels), self.config
        generate = lambda w: self._image(self.w_mean + w)  # noqa: E731
        w = invert(generate, target, config.latent_dim, config.inversion_steps)
        with torch.no_grad():
            return base.from_signed(generate(w), self.data.levels)

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
        noise = temperature if z is None else 0.0
        w = self.mapping(randn((n, self.config.latent_dim), self.device) if z is None else z)
        w = self.w_mean + temperature * (w - self.w_mean)
        return base.from_signed(self._image(w, noise), self.data.levels)


def lazily(optimizer: OptimizerConfig, every: int) -> OptimizerConfig:
    """Adam corrected for a regulariser's step after each `every` main ones (appendix B)."""
    c = every / (every + 1)
    betas = (optimizer.betas[0] ** c, optimizer.betas[1] ** c)
    return optimizer.model_copy(update={"lr": optimizer.lr * c, "betas": betas})


def r1_penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """E |dD/dx|^2, and the logits `[B, 1]`."""
    real = real.detach().requires_grad_()
    logits = discriminate(real)
    (gradient,) = torch.autograd.grad(logits.sum(), [real], create_graph=True)
    return gradient.square().flatten(1).sum(1).mean(), logits


def path_lengths(
    synthesise: Callable[[Tensor], Tensor], ws: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """|J^T y|, a root mean square over the layers, `[B]`; and the images."""
    image = synthesise(ws)
    product = (image * y).sum() / math.sqrt(math.prod(y.shape[-2:]))
    (gradient,) = torch.autograd.grad(product, [ws], create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt(), image


def mix(w: Tensor, other: Tensor, u: Tensor, probability: float, styles: int) -> Tensor:
    """`w` up to a crossover, `other` from there on: whether and where, the uniform `u` decides."""
    at = 1 + (u[:, 1] * (styles - 1)).long()  # 1 .. styles - 1: each has one layer at least
    crossover = torch.where(u[:, 0] < probability, at, styles)
    first = torch.arange(styles, device=w.device) < crossover[:, None]
    return torch.where(first[..., None], w[:, None], other[:, None])


def augment(x: Tensor, p: Tensor, *, mirror: bool = False) -> Tensor:
    """Images in [-1, 1], each changed in each way with probability `p`; twice differentiable."""
    n, _, *sides = x.shape
    u, v = rand((n, 10, 1), x.device), randn((n, 2, 1, 1), x.device)
    on = u[:, :5] < p
    places, holes = [], []
    for axis, side in enumerate(sides):
        i = torch.arange(side, device=x.device)
        if mirror and axis == 1:
            i = torch.where(on[:, 4] & (u[:, 9] < 0.5), side - 1 - i, i)
        moved = (i - on[:, 0] * ((2 * u[:, 5 + axis] - 1) * side / 8).round().long()).abs()
        places.append(torch.where(moved < side, moved, 2 * (side - 1) - moved))  # reflected
        holes.append(on[:, 3] & (((i + 0.5) / side - u[:, 7 + axis]).abs() < 0.25))
    example = torch.arange(n, device=x.device)[:, None, None]
    x = x.movedim(1, 3)[example, places[0][:, :, None], places[1][:, None]].movedim(3, 1)
    x = x + 0.2 * on[:, 1, None, None] * v[:, :1]
    x = x * torch.exp2(0.5 * on[:, 2, None, None] * v[:, 1:])
    return x.masked_fill((holes[0][:, :, None] & holes[1][:, None])[:, None], 0.0)


# -- networks -------------------------------------------------------------------------------


def activate(x: Tensor) -> Tensor:
    """LeakyReLU, scaled to keep the variance that equalised weights rely on."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Equal(nn.Module):
    """Linear layer, or convolution if there is a kernel, and LeakyReLU. Weights from N(0, 1) are
    scaled at run time (Karras et al. 2018). Linear layers stay in full precision."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 0,
        *,
        stride: int = 1,
        rate: float = 1.0,
        bias: float | None = 0.0,
        active: bool = True,
    ) -> None:
        super().__init__()
        shape = (outputs, inputs, *[kernel] * 2) if kernel else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(shape) / rate)
        self.bias = None if bias is None else nn.Parameter(torch.full((outputs,), bias))
        self.scale, self.rate = rate / math.sqrt(self.weight[0].numel()), rate
        self.stride, self.padding = stride, kernel // 2 if stride == 1 else 0
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        bias = None if self.bias is None else self.bias * self.rate
        if weight.ndim == 4:
            x = F.conv2d(x, weight, bias, self.stride, self.padding)
        else:
            with torch.autocast(x.device.type, enabled=False):
                x = F.linear(x.to(weight.dtype), weight, bias)
        return activate(x) if self.active else x


class FIR(nn.Module):
    """Resampling by the filter [1, 3, 3, 1] along both axes, `[..., *size] -> [..., *outputs]`.

    Inputs lie `up` apart, zeros between and around them; output o sees four places from
    `o * down - pad` on. As two matrix products: on small images as fast as a convolution, with a
    second derivative that is much faster."""

    rows: Tensor
    columns: Tensor

    def __init__(
        self, size: Size, outputs: Size, pad: int, *, up: int = 1, down: int = 1, gain: int = 1
    ) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) * (gain / 8)
        for name, i, o in zip(("rows", "columns"), size, outputs, strict=True):
            k = torch.arange(i) * up - (torch.arange(o)[:, None] * down - pad)
            matrix = torch.where((k >= 0) & (k < 4), taps[k.clamp(0, 3)], 0.0)
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # colours stay in full precision
            return self.rows.to(x.dtype) @ (x @ self.columns.to(x.dtype).T)


class Normalise(nn.Module):
    """z onto the sphere of radius sqrt(latent_dim)."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def modulated_conv(
    x: Tensor, weight: Tensor, style: Tensor, *, up: bool = False, demodulate: bool = True
) -> Tensor:
    """Each example's own convolution: weights `style_i w_oik`, over their norm for each output o.

    Inputs and outputs are scaled in place of weights, which is the same (section 2.2) and needs
    no grouped convolution. `up`: transposed, to 2h + 1 rows that are yet to be filtered.
    `x [B, I, h, w]`, `weight [O, I, k, k]`, `style [B, I]`.
    """
    x = x * style[:, :, None, None]
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    if not demodulate:
        return x
    with torch.autocast(x.device.type, enabled=False):
        norm = style.square() @ weight.square().sum((2, 3)).T
    return x * torch.rsqrt(norm + 1e-8)[:, :, None, None]


class Styled(nn.Module):
    """`[B, I, *size] -> [B, O, *size]`, or `*outer` if given. 3x3: demodulated convolution, noise,
    bias, LeakyReLU. 1x1, to colours: without demodulation, noise or LeakyReLU."""

    def __init__(
        self,
        dim: int,
        inputs: int,
        outputs: int,
        kernel: int,
        size: Size,
        outer: Size | None = None,
    ) -> None:
        super().__init__()
        self.style = Equal(dim, inputs, bias=1.0, active=False)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.strength = nn.Parameter(torch.zeros(())) if kernel > 1 else None  # of the noise
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        spread = (2 * size[0] + 1, 2 * size[1] + 1)
        self.blur = FIR(spread, outer, pad=1, gain=2) if outer else None

    def forward(self, x: Tensor, w: Tensor, noise: float) -> Tensor:
        weight, colour = self.weight * self.scale, self.strength is None
        x = modulated_conv(
            x, weight, self.style(w), up=self.blur is not None, demodulate=not colour
        )
        x = self.blur(x) if self.blur else x
        if self.strength is not None and noise:
            x = x + self.strength * noise * randn((len(x), 1, *x.shape[2:]), x.device)
        return x + self.bias if colour else activate(x + self.bias)


class Synthesis(nn.Module):
    """Styles `[B, styles, dim]` -> images `[B, channels, *sizes[-1]]`."""

    def __init__(self, dim: int, widths: list[int], sizes: list[Size], channels: int) -> None:
        super().__init__()
        self.styles = 2 * len(sizes)
        self.constant = nn.Parameter(torch.randn(widths[0], *sizes[0]))
        layers = [Styled(dim, widths[0], widths[0], 3, sizes[0])]
        for (inner, outer), (size, larger) in zip(pairwise(widths), pairwise(sizes), strict=True):
            layers.append(Styled(dim, inner, outer, 3, size, larger))
            layers.append(Styled(dim, outer, outer, 3, larger))
        self.layers = nn.ModuleList(layers)
        colours = zip(widths, sizes, strict=True)
        self.colours = nn.ModuleList(Styled(dim, w, channels, 1, size) for w, size in colours)
        self.grow = nn.ModuleList(FIR(*pair, pad=2, up=2, gain=2) for pair in pairwise(sizes))

    def forward(self, ws: Tensor, noise: float = 1.0) -> Tensor:
        w = ws.unbind(1)
        x = self.layers[0](self.constant.expand(len(ws), -1, -1, -1), w[0], noise)
        image = self.colours[0](x, w[1], noise)
        for i, grow in enumerate(self.grow, 1):
            x = self.layers[2 * i - 1](x, w[2 * i - 1], noise)
            x = self.layers[2 * i](x, w[2 * i], noise)
            image = grow(image) + self.colours[i](x, w[2 * i + 1], noise)
        return image


class ResidualBlock(nn.Module):
    """`[B, inputs, *size] -> [B, outputs, *smaller]`; filters before it drops pixels."""

    def __init__(self, inputs: int, outputs: int, size: Size, smaller: Size) -> None:
        super().__init__()
        self.first = Equal(inputs, inputs, 3)
        self.blur = FIR(size, (2 * smaller[0] + 1, 2 * smaller[1] + 1), pad=2)
        self.second = Equal(inputs, outputs, 3, stride=2)
        self.shrink = FIR(size, smaller, pad=1, down=2)
        self.skip = Equal(inputs, outputs, 1, bias=None, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.blur(self.first(x))) + self.skip(self.shrink(x))) / math.sqrt(2)


class Deviation(nn.Module):
    """One more channel: how much the group of neighbours in the batch differs."""

    def forward(self, x: Tensor) -> Tensor:
        group = next(g for g in (4, 3, 2, 1) if len(x) % g == 0)
        groups = (x if x.dtype == torch.float64 else x.float()).reshape(-1, group, x[0].numel())
        spread = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1)
        plane = spread.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, plane.to(x.dtype)], 1)


def discriminator(widths: list[int], sizes: list[Size], channels: int) -> nn.Sequential:
    """`[B, channels, *sizes[0]] -> [B, 1]`."""
    steps, width = zip(pairwise(widths), pairwise(sizes), strict=True), widths[-1]
    return nn.Sequential(
        Equal(channels, widths[0], 1),
        *[ResidualBlock(*change, *size) for change, size in steps],
        Deviation(),
        Equal(width + 1, width, 3),
        nn.Flatten(),
        Equal(width * math.prod(sizes[-1]), width),
        Equal(width, 1, active=False),
    )
