"""VQ-VAE: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning".

    encoder    x [B, C, H, W] -> z_e [B, N, D], N = h * w positions after the halvings
    codebook   e [K, D]; a position's code is its nearest entry, codes [B, N] in 0 .. K - 1
    decoder    e[codes] [B, D, h, w] -> mixture of discretised logistics per pixel
    prior      transformer over the N codes in raster order, p(codes) or p(codes|label)
    "codes"    -log p(x|e[codes]) + beta * |z_e - sg(e)|^2 (mean over positions), nats per
               example; the gradient passes from e[codes] straight through to z_e (eq. 3)
    "prior"    -log p(codes), nats per example, of the codes that the encoder gives just then

The codebook follows the encoder by running counts and sums, not by gradients (appendix A.1).
Each x has one code, so log P(x) >= log p(x|codes(x)) + log p(codes(x)): the other codes' share
of the sum is left out. That bound is deterministic; there is nothing to draw more often.

The buffers are the counts N_i and the sums m_i themselves, and an entry is m_i / N_i. So a
moving average of weights and buffers holds the entry averaged over time by its use, over the
same window as the encoder that chose it, and what a restarted code was before has no weight.

Deviations from the paper: the prior is trained beside the autoencoder and not after it, on
codes that still drift (let `codes_optimizer.decay_steps` end before the budget, and the codes
come to rest first); it is a transformer, not a PixelCNN; the decoder's likelihood is a mixture
of discretised logistics, so that the bound is in nats of the discrete levels (with two levels:
Bernoulli); convolutions have kernel 3, to halve odd sides too, and the networks open and close
with one at full resolution; a code that is hardly used is moved to an encoder output of the
batch (`restart_dead`), and so is every code in the first step; beta 2, gamma 0.8 and one
residual block where the paper has 0.25, 0.99 and two: in a few thousand steps a slower codebook
loses the encoder; `sample` shows the decoder's mean, not a draw of pixel noise around it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel, Phase
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec, to_signed
from models.decoder import Decoder
from models.nn import gather_batch, log_mean_exp, pyramid
from models.noise import random_labels
from models.vqvae.networks import autoencoder

DEAD = 0.05  # a code is dead when it is used less than this part of an even share
FLOOR = 1e-4  # of a count: a code that is never used must not end at 0 / 0


class VQVAEConfig(Config):
    codes: int = Field(32, ge=2)  # K, entries of the codebook
    code_dim: Positive = 16  # D
    halvings: int = Field(2, ge=0)  # of each side before the codes, while both stay >= 4
    width: Positive = 32  # channels of encoder and decoder
    residual_blocks: int = Field(1, ge=0)  # on either side of the codes
    mixture: Positive = 3  # discretised logistics per pixel
    beta: float = Field(2.0, ge=0)  # weight of the commitment loss
    gamma: float = Field(0.8, gt=0, lt=1)  # decay of the codebook's running counts and sums
    restart_dead: bool = True  # False: codes are never moved by hand, as in the paper
    class_conditional: bool = False  # of the prior
    prior_width: Positive = 64
    prior_layers: Positive = 2
    prior_heads: Positive = 4
    prior_dropout: float = Field(0.2, ge=0, lt=1)
    codes_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    prior_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)


class VQVAE(GenerativeModel):
    """Autoencoder with a discrete bottleneck, and a prior over its codes."""

    Config = VQVAEConfig
    paper = "van den Oord et al. 2017, arXiv:1711.00937"
    likelihood = "bound"
    most_draws = 1
    reconstruction = "encode-decode"
    config: VQVAEConfig
    counts: Tensor
    sums: Tensor

    def __init__(self, config: VQVAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        if config.class_conditional:
            if not data.classes:
                raise ValueError("class_conditional: true needs classes, and the data has none")
            self.conditions = frozenset({"label"})
        _, height, width = data.shape
        sizes = pyramid((height, width))[: config.halvings + 1]
        self.grid = sizes[-1]
        self.encoder, self.decoder = autoencoder(
            data,
            sizes,
            width=config.width,
            blocks=config.residual_blocks,
            code_dim=config.code_dim,
            mixture=config.mixture,
        )
        self.prior = Decoder(
            config.codes,
            context=math.prod(self.grid),
            positions=True,
            width=config.prior_width,
            layers=config.prior_layers,
            heads=config.prior_heads,
            dropout=config.prior_dropout,
            classes=len(data.classes) if config.class_conditional else 0,
        )
        self.register_buffer("counts", torch.full((config.codes,), FLOOR))  # N_i of the paper
        self.register_buffer("sums", FLOOR * torch.randn(config.codes, config.code_dim))  # m_i

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("codes", (self.encoder, self.decoder), self.config.codes_optimizer),
            Phase("prior", (self.prior,), self.config.prior_optimizer),
        )

    @property
    def codebook(self) -> Tensor:
        """The entries e_i = m_i / N_i, `[K, D]`."""
        return self.sums / self.counts[:, None]

    def features(self, x: Tensor) -> Tensor:
        """The encoder's outputs z_e, `[B, N, D]`."""
        z = self.encoder(to_signed(x, self.data.levels)).to(self.sums.dtype)
        return z.flatten(2).transpose(1, 2)

    def nearest(self, z: Tensor) -> Tensor:
        """Number of the entry nearest to each row of `z` `[B, N, D]`: `[B, N]`."""
        book = self.codebook
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would confuse neighbours
            return (book.square().sum(1) - 2 * z @ book.T).argmin(-1)

    def encode(self, x: Tensor) -> Tensor:
        """The codes of `x`, `[B, N]`."""
        return self.nearest(self.features(x))

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if phase == "prior":
            with torch.no_grad():
                codes = self.encode(batch.x)
            label = batch.label if self.config.class_conditional else None
            return {"loss": -self.prior.log_prob(codes, label).mean()}
        z = self.features(batch.x)
        rows = gather_batch(z).flatten(0, 1)  # of all workers
        dead = self.counts < DEAD * len(rows) / self.config.codes
        if self.training and self.config.restart_dead:
            self._restart(rows, dead)
        quantised = self.codebook[self.nearest(z)]
        distortion = -self.decoder.log_likelihood(batch.x, straight_through(z, quantised)).mean()
        commitment = (z - quantised).square().sum(2).mean()
        chosen = F.one_hot(self.nearest(rows), self.config.codes).to(rows.dtype)
        if self.training:
            self._follow(rows, chosen)
        return {
            "loss": distortion + self.config.beta * commitment,
            "reconstruction_nats": distortion,
            "commitment": commitment,
            "perplexity": perplexity(chosen),
            "dead_codes": dead.float().mean(),  # before the restart
        }

    @torch.no_grad()
    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        """The codebook's step towards the rows `[R, D]` that chose it, `[R, K]` of 0 and 1
        (appendix A.1, eqs. 6 to 8)."""
        with torch.autocast(rows.device.type, enabled=False):
            self.counts.lerp_(chosen.sum(0), 1 - self.config.gamma)
            self.sums.lerp_(chosen.T @ rows, 1 - self.config.gamma)
        raised = (FLOOR / self.counts).clamp(min=1)  # both alike: the entry stays where it is
        self.counts *= raised
        self.sums *= raised[:, None]

    @torch.no_grad()
    def _restart(self, rows: Tensor, dead: Tensor) -> None:
        """Move `dead` codes to encoder outputs among `rows`, with the count of an even share."""
        codes = self.config.codes
        # drawn by every worker alike, over all workers' rows; distinct while there are enough
        order = torch.randperm(max(len(rows), codes), device=rows.device)[:codes] % len(rows)
        even = len(rows) / codes
        self.sums.copy_(torch.where(dead[:, None], even * rows[order], self.sums))
        self.counts.masked_fill_(dead, even)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """log p(x|codes(x)) + log p(codes(x)), a lower bound, whatever `samples` is."""
        codes = self.encode(x)
        labels: list[Tensor | None] = [None]
        if self.config.class_conditional:  # all are as likely
            labels = [codes.new_full((len(x),), y) for y in range(len(self.data.classes))]
        prior = log_mean_exp(torch.stack([self.prior.log_prob(codes, y) for y in labels]))
        return self.decoder.log_likelihood(x, self.codebook[codes]) + prior

    @property
    def likelihood_note(self) -> str:
        return "of the one code that the encoder chooses; more samples would not change it"

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder.mean_image(self.codebook[self.encode(x)])

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """As the base class says; codes are drawn from the `top_k` likeliest (0: from all) that
        hold `top_p` of the probability."""
        if z is not None:
            raise ValueError("vqvae draws codes and takes no latents")
        if not self.config.class_conditional:
            label = None
        elif label is None:
            label = random_labels(n, self.data, self.device)
        tokens = math.prod(self.grid)
        codes = self.prior.generate(
            n, tokens, label=label, temperature=temperature, top_k=top_k, top_p=top_p
        )
        return self.decoder.mean_image(self.codebook[codes])


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """`quantised`, with the gradient of `z`."""
    return z + (quantised - z).detach()


def perplexity(chosen: Tensor) -> Tensor:
    """exp of the entropy of the codes' shares; `chosen` `[R, K]` of 0 and 1."""
    return torch.exp(torch.special.entr(chosen.float().mean(0)).sum())
