"""Hidden Markov model: Rabiner 1989, "A tutorial on hidden Markov models and selected
applications in speech recognition"; trained by Baum et al. 1970.

    sequence  text [B, T] as it is; images in raster order, the channels of a pixel in turn
              [B, H*W*C]. One alphabet: the levels
    state     start [K], transition [K, K] (from, to), emission [K, levels]: rows sum to one
    training  each `fit` is one Baum-Welch iteration of hmmlearn's CategoricalHMM; converged when
              the mean log-likelihood gains less than `tol`
    loss      -log p(x), nats per example, before the iteration's M-step
    log_prob  the forward algorithm, scaled: the belief p(state_t | x_<t) [B, K] moves along

Deviations from the paper: `alpha` pseudo-counts in every row (a Dirichlet prior) keep symbols
that the train split lacks possible. Training starts from a noisy ring of states, near Rabiner's
left-right models: from transitions at random it takes several times as many iterations to find
the columns of an image. A split of more than `fit_values` symbols is not seen whole: iteration t
takes a random part of it and moves the tables by (t + 1)^-0.6 of the way to where its M-step would
put them (stochastic approximation, after Cappé & Moulines 2009, who average the counts where this
averages the probabilities); then `iterations` ends training, not `tol`. Samples are drawn symbol
by symbol from p(x_t | x_<t), which is what drawing states and symbols amounts to; so a prompt is
only a belief to start from, and temperature acts on symbols alone.
"""

from __future__ import annotations

import logging

import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel, Phase
from models.config import Config, Positive
from models.data import Batch, DataSpec
from models.noise import rand

RING = 0.8  # share of the ring in the first transitions


class HMMConfig(Config):
    states: Positive = 48
    alpha: float = Field(0.1, gt=0)  # pseudo-counts of each start, transition and emission
    fit_values: Positive = 200_000  # symbols that one iteration sees; a second or so
    tol: float = Field(1e-3, ge=0)  # nats per example that an iteration must gain
    iterations: Positive = 30  # of Baum-Welch, at most


class HMM(GenerativeModel):
    """Discrete emissions, one chain of hidden states over the whole example."""

    Config = HMMConfig
    paper = "Rabiner 1989, doi:10.1109/5.18626"
    modalities = frozenset({"image", "text"})
    likelihood = "exact"
    most_draws = 1
    config: HMMConfig
    start: Tensor
    transition: Tensor
    emission: Tensor
    iteration: Tensor
    bound: Tensor
    done: Tensor

    def __init__(self, config: HMMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        if data.modality == "text":
            self.conditions = frozenset({"text"})  # a prompt, which may be left out
        k = config.states
        # double precision: hmmlearn's own, so that an iteration resumes where it was
        # a ring: each state leads to the next, so that states tell places of a line apart
        ring = torch.eye(k, dtype=torch.float64).roll(1, 1)
        start = torch.eye(1, k, dtype=torch.float64)
        self.register_buffer("start", _random_rows(1, k).lerp(start, RING)[0])
        self.register_buffer("transition", _random_rows(k, k).lerp(ring, RING))
        self.register_buffer("emission", _random_rows(k, data.levels))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.register_buffer("bound", torch.zeros((), dtype=torch.float64))
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))

    def phases(self) -> tuple[Phase, ...]:
        return ()

    def fit(self, data: Batch) -> dict[str, Tensor]:
        from hmmlearn.hmm import CategoricalHMM

        # it would say each time that one iteration is few, and name parameters it has too many of
        logging.getLogger("hmmlearn").setLevel(logging.ERROR)
        length, t = self.data.dimensions, int(self.iteration)
        take = max(1, self.config.fit_values // length)
        whole = take >= len(data.x)
        part = data.x.cpu()
        if not whole:
            part = part[rand((len(part),), part.device).argsort()[:take]]
        prior = 1 + self.config.alpha
        estimator = CategoricalHMM(
            self.config.states,
            startprob_prior=prior,
            transmat_prior=prior,
            emissionprob_prior=prior,
            n_features=self.data.levels,
            n_iter=1,
            init_params="",
            implementation="scaling",
        )
        estimator.startprob_ = self.start.cpu().numpy().copy()
        estimator.transmat_ = self.transition.cpu().numpy().copy()
        estimator.emissionprob_ = self.emission.cpu().numpy().copy()
        symbols = self._sequences(part).reshape(-1, 1).numpy()
        estimator.fit(symbols, [length] * len(part))
        step = 1.0 if whole else (t + 1) ** -0.6
        names = {"startprob_": self.start, "transmat_": self.transition}
        for name, table in (names | {"emissionprob_": self.emission}).items():
            table.lerp_(torch.from_numpy(getattr(estimator, name)).to(table.device), step)
        bound = float(estimator.monitor_.history[-1]) / len(part)
        stalled = whole and t > 0 and bound - float(self.bound) < self.config.tol
        self.bound.fill_(bound)
        self.iteration += 1
        self.done.fill_(stalled or t + 1 >= self.config.iterations)
        return {"loss": torch.tensor(-bound)}

    @property
    def converged(self) -> bool:
        return bool(self.done)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        return self._filter(self._sequences(x))[0].float()

    def _filter(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the symbols `[B, T]`, nats, `[B]`, and the belief in the state after them."""
        belief = self.start.expand(len(symbols), -1)
        total = torch.zeros(len(symbols), dtype=belief.dtype, device=self.device)
        for symbol in symbols.unbind(1):
            mass, belief = self._advance(belief, symbol)
            total = total + mass.log()
        return total, belief

    def _advance(self, belief: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor]:
        """p(symbol) `[B]` under the belief, and the belief `[B, K]` one symbol later."""
        joint = belief * self.emission.T[symbol]
        mass = joint.sum(1)
        return mass, (joint / mass[:, None]) @ self.transition

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        source: Tensor | None = None,
        text: Tensor | None = None,
        z: Tensor | None = None,
        temperature: float = 1.0,
        max_tokens: int = 0,
        stop: str = "",
    ) -> Tensor:
        """Text: only what follows the prompt, `[n, max_tokens]` (0: as long as an example),
        with zeros behind the first `stop` that comes about. Temperature divides the logarithms of
        p(x_t | x_<t); 0: the likeliest symbol each time."""
        if z is not None:
            raise ValueError("a hidden Markov model draws its latents, states, itself")
        belief, length, end = self.start.expand(n, -1), self.data.dimensions, torch.empty(0)
        if self.data.modality == "text":
            length = max_tokens or length
            end = torch.tensor(list(stop.encode()), dtype=torch.long, device=self.device)
            if text is not None:
                belief = self._filter(text.to(self.device, torch.long))[1]
        ended = torch.zeros(n, dtype=torch.bool, device=self.device)
        symbols = torch.zeros(n, length, dtype=torch.long, device=self.device)
        noise = rand((n, length), self.device).double()
        for t in range(length):
            symbols[:, t] = _draw(belief @ self.emission, noise[:, t], temperature)
            belief = self._advance(belief, symbols[:, t])[1]
            symbols[:, t].masked_fill_(ended, 0)
            if 0 < len(end) <= t + 1:
                ended |= (symbols[:, t + 1 - len(end) : t + 1] == end).all(1)
        return self._examples(symbols)

    def _sequences(self, x: Tensor) -> Tensor:
        """Examples to symbols `[B, T]`, int64; channels vary fastest."""
        return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(1).long()

    def _examples(self, symbols: Tensor) -> Tensor:
        if self.data.modality != "image":
            return symbols.to(torch.uint8)
        c, h, w = self.data.shape
        return symbols.view(-1, h, w, c).permute(0, 3, 1, 2).contiguous().to(torch.uint8)


def _random_rows(rows: int, columns: int) -> Tensor:
    """Uniform draws from the simplex: states that differ much, where Baum-Welch would linger long
    between states that are nearly alike."""
    table = -torch.log1p(-torch.rand(rows, columns, dtype=torch.float64)) + 1e-6
    return table / table.sum(1, keepdim=True)


def _draw(probabilities: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A category from each row `[n, L]`; `noise` `[n]` uniform."""
    if temperature == 0:
        return probabilities.argmax(1)
    steps = (probabilities.log() / temperature).softmax(1).cumsum(1)[:, :-1]
    return (steps <= noise[:, None]).sum(1)
