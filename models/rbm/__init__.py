"""Restricted Boltzmann machine, a Markov random field over visible and hidden units: Smolensky
1986, "Information processing in dynamical systems: foundations of harmony theory".

    visible   v [B, D] levels; two levels: one binary unit for each value, else one softmax unit of
              `levels` states (Salakhutdinov, Mnih & Hinton 2007); R = D or D * levels rows
    hidden    h [B, hidden] in {0, 1}; weight W [R, hidden], visible bias a [R], hidden bias b
    energy    E(v, h) = -a.v - b.h - v W h, v as zeros and ones [R]
    free      F(v) = -log sum_h exp(-E(v, h)) = -a.v - sum_j log(1 + exp(b_j + v W_j)), nats
    loss      differentiated as F(data) - F(fantasy), whose gradient is that of -log p(data); the
              fantasies are `chains` Gibbs chains that go on for `gibbs_steps` from where the last
              step left them (persistent contrastive divergence, Tieleman 2008, after Hinton 2002)
    log_prob  -F(v) - log Z, log Z by annealed importance sampling (Salakhutdinov & Murray 2008)
              from the base-rate model: W = 0, visible biases the train split's frequencies

That difference hovers about zero and tells nothing, so the loss has another value: the negative
pseudo-log-likelihood -sum_i log p(v_i | the others) (Besag 1975) from one random i an example, in
nats. log Z is estimated once for each set of weights, from a seed of its own, and kept
outside of the state. The estimate of Z is unbiased, so that log Z is more likely low than high,
and the likelihood is then flattered: `likelihood_note` says by how much about.

Deviations from the papers: Adam, not plain gradient steps; visible biases start at the logarithm
of the first batch's frequencies (Hinton 2010, a practical guide, section 8). Every worker runs all
chains with the same noise, so that any number of workers takes the same step. A sample's chain
starts at the base rates and is annealed like log Z's in the first half of its `gibbs_steps`.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec
from models.nn import gather_batch
from models.noise import noise_shard, rand
from models.rbm.units import Noise, at, bernoulli, categorical

UNITS = 16_384  # visible units above which one Gibbs step costs more than it teaches


class RBMConfig(Config):
    hidden: Positive = 256  # hidden units
    chains: Positive = 64  # persistent Gibbs chains, over all workers
    gibbs_steps: Positive = 5  # of each chain in each training step
    ais_chains: Positive = 100
    ais_steps: int = Field(1000, ge=2)  # inverse temperatures from the base-rate model's 0 to 1
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-3, weight_decay=1e-3)


class RBM(GenerativeModel):
    """Binary hidden units over binary or softmax visible units."""

    Config = RBMConfig
    paper = "Smolensky 1986, Parallel Distributed Processing 1, chapter 6"
    likelihood = "ais"
    most_draws = 1
    reconstruction = "encode-decode"
    training_only = ("chain",)
    config: RBMConfig
    chain: Tensor
    counts: Tensor

    def __init__(self, config: RBMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        d, levels = data.dimensions, data.levels
        rows = _units(data)
        self.weight = nn.Parameter(0.01 * torch.randn(rows, config.hidden))
        self.visible_bias = nn.Parameter(torch.zeros(rows))
        self.hidden_bias = nn.Parameter(torch.zeros(config.hidden))
        # integers, so that a moving average of the state leaves them as they are
        self.register_buffer("chain", torch.zeros(config.chains, d, dtype=torch.uint8))
        self.register_buffer("counts", torch.zeros(d, levels, dtype=torch.long))  # of data seen
        self._partition: tuple[str, float, float] | None = None  # whose weights, log Z, its error

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        if data.modality in cls.modalities and _units(data) > UNITS:
            return (
                f"{data.dimensions:,} values of {data.levels} levels are {_units(data):,} visible "
                f"units, more than {UNITS:,}; binarised data (dataset.name: binarized_mnist) needs "
                "one unit a value, and smaller images (dataset.image_size) need fewer"
            )
        return super().unsuited(data)

    # -- the two layers, given each other -------------------------------------------------------

    def _hidden(self, v: Tensor) -> Tensor:
        """Log-odds of the hidden units, b + v W: levels `[B, D]` to `[B, hidden]`."""
        if self.data.levels == 2:
            return v.to(self.weight.dtype) @ self.weight + self.hidden_bias
        # v as zeros and ones has a single one for each value: a sum of D rows of W
        first = torch.arange(v.shape[1], device=v.device) * self.data.levels
        return F.embedding_bag(v.long() + first, self.weight, mode="sum") + self.hidden_bias

    def _table(self, rows: Tensor) -> Tensor:
        """`[..., R]` to log-odds of each level `[..., D, levels]`; a binary unit's 0 has none."""
        if self.data.levels == 2:
            return F.pad(rows.unsqueeze(-1), (1, 0))
        return rows.unflatten(-1, (self.data.dimensions, self.data.levels))

    def _visible(self, h: Tensor) -> Tensor:
        """Log-odds of the levels, a + W h: `[B, hidden]` to `[B, D, levels]`."""
        return self._table((h @ self.weight.T).float() + self.visible_bias)

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) in nats, `[B]`, of levels `[B, D]`."""
        return -at(self._table(self.visible_bias), v) - F.softplus(self._hidden(v)).sum(1)

    def base_rates(self) -> Tensor:
        """Log-frequencies of the levels in the data seen, smoothed, `[D, levels]`."""
        counts = self.counts.float() + 1
        return (counts / counts.sum(1, keepdim=True)).log()

    # -- training -------------------------------------------------------------------------------

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        v = batch.x.flatten(1).long()
        with torch.no_grad():
            pseudo = self._pseudo_nats(v)
            everyone = gather_batch(v)
            with noise_shard(0, 1):  # all chains, on every worker
                self._count(everyone)
                fantasy = self.chain.long()
                for _ in range(self.config.gibbs_steps):
                    h = bernoulli(self._hidden(fantasy), rand)
                    fantasy = categorical(self._visible(h), rand)
            self.chain.copy_(fantasy)
        with torch.autocast(v.device.type, enabled=False):  # a small difference of large numbers
            gap = self.free_energy(v).mean() - self.free_energy(fantasy).mean()
        return {"loss": pseudo + gap - gap.detach(), "free_energy_gap": gap}

    def _count(self, v: Tensor) -> None:
        first = not bool(self.counts.any())
        ones = torch.ones_like(v, dtype=self.counts.dtype)
        self.counts.scatter_add_(1, v.T, ones.T)
        if first:
            rates = self.base_rates()
            binary = self.data.levels == 2
            self.visible_bias.copy_(rates[:, 1] - rates[:, 0] if binary else rates.flatten())
            self.chain.copy_(categorical(rates.expand(len(self.chain), -1, -1), rand))

    def _pseudo_nats(self, v: Tensor) -> Tensor:
        """-D log p(v_i | the others), i random in each example, nats: the mean over the batch."""
        example, site = torch.arange(len(v), device=v.device), rand((len(v),), v.device)
        site = (site * v.shape[1]).long()
        if self.data.levels == 2:
            rows = F.pad(self.weight[site].unsqueeze(1), (0, 0, 1, 0))
        else:
            rows = self.weight.unflatten(0, (-1, self.data.levels))[site]  # [B, levels, hidden]
        level = v[example, site]
        odds = self._hidden(v) - rows[example, level]  # without the value at the site
        score = self._table(self.visible_bias)[site] + F.softplus(odds.unsqueeze(1) + rows).sum(2)
        return F.cross_entropy(score.float(), level) * v.shape[1]

    # -- the likelihood -------------------------------------------------------------------------

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        return -self.free_energy(x.flatten(1)) - self.log_partition()[0]

    @property
    def likelihood_note(self) -> str:
        chains, steps = self.config.ais_chains, self.config.ais_steps
        error = self.log_partition()[1]
        return f"ais: {chains:,} chains, {steps:,} steps, log Z +- {error:.2g}"

    @torch.no_grad()
    def log_partition(self) -> tuple[float, float]:
        """log Z in nats and its standard error, the spread of the chains' importance weights."""
        state = [self.weight, self.visible_bias, self.hidden_bias, self.counts]
        digest = hashlib.sha256()
        for part in state:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if self._partition is None or self._partition[0] != key:
            self._partition = (key, *self._anneal())
        return self._partition[1:]

    def _anneal(self) -> tuple[float, float]:
        """Annealed importance sampling with p_beta(v, h) ~ exp((1 - beta) a0.v - beta E(v, h)), a0
        the base rates: at 0 it is normalised but for the hidden units' 2^hidden states."""
        generator = torch.Generator(self.device).manual_seed(0)

        def noise(shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        rates, bias = self.base_rates(), self._table(self.visible_bias)
        v = categorical(rates.expand(self.config.ais_chains, -1, -1), noise)
        log_weight = torch.zeros(len(v), dtype=torch.float64, device=self.device)
        steps = self.config.ais_steps
        for step in range(1, steps + 1):
            before, beta = (step - 1) / steps, step / steps
            odds = self._hidden(v)
            gain = F.softplus(beta * odds).sum(1) - F.softplus(before * odds).sum(1)
            log_weight += (gain + (at(bias, v) - at(rates, v)) / steps).double()
            if step < steps:
                v = self._gibbs(v, beta, rates, noise)
        weight = (log_weight - log_weight.max()).exp()
        log_z = log_weight.max() + weight.mean().log() + self.config.hidden * math.log(2)
        error = weight.std() / weight.mean() / math.sqrt(len(v)) if len(v) > 1 else math.inf
        return float(log_z), float(error)

    def _gibbs(
        self, v: Tensor, beta: float, rates: Tensor, noise: Noise, temperature: float = 1.0
    ) -> Tensor:
        """Hidden given visible, visible given hidden, at the inverse temperature `beta`."""
        h = bernoulli(beta * self._hidden(v), noise, temperature)
        odds = (1 - beta) * rates + beta * self._visible(h)
        return categorical(odds, noise, temperature)

    # -- samples --------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        gibbs_steps: int = 500,
    ) -> Tensor:
        """Ends of `n` Gibbs chains. Temperature divides the energy; 0: no chain draws anything,
        each unit takes its likelier state."""
        if z is not None:
            raise ValueError("an RBM's latents are binary and drawn by its Gibbs chains")
        rates = self.base_rates()
        v = categorical(rates.expand(n, -1, -1), rand, temperature)
        for step in range(gibbs_steps):
            v = self._gibbs(v, min(1.0, 2 * (step + 1) / gibbs_steps), rates, rand, temperature)
        return v.view(n, *self.data.shape).to(torch.uint8)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of the visible units given the mean of the hidden ones."""
        share = self._visible(self._hidden(x.flatten(1)).sigmoid()).softmax(2)
        levels = torch.arange(self.data.levels, device=x.device, dtype=share.dtype)
        return (share @ levels).round().view(x.shape).to(torch.uint8)


def _units(data: DataSpec) -> int:
    return data.dimensions * (1 if data.levels == 2 else data.levels)
