"""Naive Bayes: Maron 1961, "Automatic indexing: an experimental inquiry", JACM 8(3).

    model     p(x) = sum_y p(y) prod_i p(x_i | y); each p(x_i | y) is a table over the levels
    tables    log_table [classes, D, levels] nats, D = values of one example; share [classes]
    training  one count: p(x_i = v | y) = (N_yiv + alpha) / (N_y + alpha * levels), p(y) = N_y / N
    loss      -log p(x), nats per example, of the train split under the counts just made

The counts are scikit-learn's CategoricalNB. Data with classes make one table for each, and
samples take a label; without classes there is one table, and the values of an example are
independent of each other: the floor under every model that claims to have learnt structure.

Deviations from the paper: it classifies documents by the presence of words; here the same
assumption is used as a density of all discrete values (the generative classifier of Ng & Jordan
2002), so the sum over classes is taken with the shares that the classes have in the train split,
not with equal ones. Additive smoothing is Lidstone's. Yes/no attributes are not used.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel, Phase
from models.config import Config
from models.data import Batch, DataSpec
from models.noise import rand

ROWS = 16_384  # counted at a time, so that memory does not grow with the split
ENTRIES = 2**27  # of the tables: half a gigabyte


class NaiveBayesConfig(Config):
    alpha: float = Field(0.3, gt=0)  # added to every count; 1 is Laplace's rule


class NaiveBayes(GenerativeModel):
    """Independent values given the class."""

    Config = NaiveBayesConfig
    paper = "Maron 1961, doi:10.1145/321075.321084"
    modalities = frozenset({"image", "points"})
    likelihood = "exact"
    most_draws = 1
    config: NaiveBayesConfig
    log_table: Tensor
    share: Tensor
    examples: Tensor

    def __init__(self, config: NaiveBayesConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        groups = max(1, len(data.classes))
        self.conditions = frozenset({"label"} if data.classes else ())
        # random before the count, as a network is: no class may look like another by chance
        start = torch.randn(groups, data.dimensions, data.levels)
        self.register_buffer("log_table", start.log_softmax(2))
        self.register_buffer("share", torch.full((groups,), 1.0 / groups))
        self.register_buffer("examples", torch.zeros((), dtype=torch.long))

    @classmethod
    def unsuited(cls, data: DataSpec) -> str | None:
        entries = max(1, len(data.classes)) * data.dimensions * data.levels
        if entries > ENTRIES and data.modality in cls.modalities:
            return (
                f"its tables would have {entries:,} entries (classes x values x levels), more "
                f"than {ENTRIES:,}; smaller images (dataset.image_size) have fewer"
            )
        return super().unsuited(data)

    def phases(self) -> tuple[Phase, ...]:
        return ()

    def fit(self, data: Batch) -> dict[str, Tensor]:
        import numpy as np
        from sklearn.naive_bayes import CategoricalNB

        groups, _, levels = self.log_table.shape
        x, label = data.x.flatten(1).cpu().numpy(), np.zeros(len(data.x), dtype=np.int64)
        if self.data.classes:
            assert data.label is not None
            label = data.label.cpu().numpy()
        counts = CategoricalNB(alpha=self.config.alpha, min_categories=levels)
        with np.errstate(divide="ignore"):  # a class that the split lacks has the share 0
            for start in range(0, len(x), ROWS):
                rows = slice(start, start + ROWS)
                counts.partial_fit(x[rows], label[rows], classes=np.arange(groups))
        tables = np.stack(counts.feature_log_prob_, 1)
        self.log_table.copy_(torch.from_numpy(tables))
        self.share.copy_(torch.from_numpy(counts.class_count_ / len(x)))
        self.examples.fill_(len(x))
        nats = [-self.log_prob(part).double().sum() for part in data.x.split(ROWS)]
        return {"loss": (torch.stack(nats).sum() / len(x)).float()}

    @property
    def converged(self) -> bool:
        return bool(self.examples > 0)

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        index = x.flatten(1).T.long()
        joint = [table.gather(1, index).sum(0) for table in self.log_table]  # each [B]
        return torch.logsumexp(torch.stack(joint, 1) + self.share.log(), 1)

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
        """Each value drawn from its table of the class; without `label`, classes as often as in
        the train split. Temperature divides the logarithms; 0: the likeliest class and values."""
        if z is not None:
            raise ValueError("naive Bayes has no latents")
        groups, dimensions, _ = self.log_table.shape
        if label is None or not self.data.classes:
            label = _draw(self.share.log().expand(1, -1), n, temperature)[0]
        label = label.to(self.device)
        x = torch.empty(n, dimensions, dtype=torch.long, device=self.device)
        for group in range(groups):
            rows = (label == group).nonzero()[:, 0]
            if len(rows):
                x[rows] = _draw(self.log_table[group], len(rows), temperature).T
        return x.view(n, *self.data.shape).to(torch.uint8)


def _draw(logits: Any, n: int, temperature: float) -> Tensor:
    """`n` categories from each row of log-probabilities `[D, K]`: `[D, n]`."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True).expand(-1, n)
    steps = (logits / temperature).softmax(1).cumsum(1)[:, :-1].contiguous()
    noise = rand((n, len(logits)), logits.device).T.contiguous()
    return torch.searchsorted(steps, noise, right=True)
