"""A decoder-only transformer over token sequences, for the families that need one.

    tokens [B, T] -> logits [B, T, vocabulary]; logits[:, t] depend on tokens[:, :t] alone

Radford et al. 2018/2019 (GPT), Vaswani et al. 2017: pre-norm blocks of causal self-attention
and a GELU network four times as wide, behind a learned start token, so that the first token has
a probability too. Not as there: positions are rotary (Su et al. 2021), inside the attention, and
learned ones are added to them only where asked for; linear layers and norms have no biases.

    decoder = Decoder(256, context=49, width=128, layers=4, heads=4, positions=True)
    loss = -decoder.log_prob(tokens).mean()                 # nats for each sequence
    tokens = decoder.generate(16, 49, temperature=1.0)      # [16, 49], int64
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Block
from models.nn import Dropout
from models.noise import rand

Stop = Callable[[Tensor], Tensor]  # what was generated [n, t] -> rows that end with it, bool [n]


class Decoder(nn.Module):
    """Causal transformer with a start token, its likelihood and its sampling.

    Args:
        vocabulary: tokens are 0 .. vocabulary - 1.
        context: the longest sequence it is trained on; generation goes on beyond it.
        heads: must divide `width` into heads of even width.
        classes: more than 0: every call needs a `label` `[B]`, which moves the start token.
        positions: adds a learned embedding of the absolute position, for grids of fixed size.
        allowed: bool `[context, vocabulary]`: the tokens that can stand at each position; the
            others have probability 0. None: all can.
    """

    cos: Tensor
    sin: Tensor
    forbidden: Tensor | None

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        classes: int = 0,
        positions: bool = False,
        allowed: Tensor | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width {width} is not {heads} heads of even width")
        self.context, self.classes, self.heads = context, classes, heads
        self.embed = nn.Embedding(vocabulary, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.label = nn.Embedding(classes, width) if classes else None
        self.position = nn.Embedding(context, width) if positions else None
        self.dropout = Dropout(dropout)
        blocks = [Block(width, heads, dropout) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angles = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("forbidden", None if allowed is None else ~allowed, persistent=False)
        self.apply(_initialise)
        nn.init.normal_(self.start, std=0.02)
        for block in blocks:  # so that the sum over the layers starts at the embedding's size
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor, label: Tensor | None = None) -> Tensor:
        """Float32 logits `[B, T, vocabulary]` of each token given those before it (and `label`)."""
        return self._logits(self._begin(tokens[:, :-1], label), 0)

    def log_prob(self, tokens: Tensor, label: Tensor | None = None) -> Tensor:
        """Log-probability of the sequences `[B, T]`, nats, `[B]`."""
        logits = self(tokens, label).transpose(1, 2)
        return -F.cross_entropy(logits, tokens.long(), reduction="none").sum(1)

    def generate(
        self,
        n: int,
        length: int,
        *,
        label: Tensor | None = None,
        prompt: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Stop | None = None,
        cache: bool = True,
    ) -> Tensor:
        """`[n, length]` new tokens, int64, after those of `prompt` `[n, P]`.

        Keys and values of the tokens before are kept, so a token costs one position's work. When
        prompt and new tokens outgrow the context, the window slides: its later half is encoded
        anew behind the start token, as the start of a sequence; a longer prompt is cut alike.

        Args:
            temperature: divides the logits; 0: the likeliest token, always.
            top_k: only the k likeliest tokens (0: all).
            top_p: only the likeliest tokens that together have this probability.
            stop: rows that end; zeros follow in them.
            cache: False computes every step from scratch, with the same noise (for comparison).
        """
        device = self.start.device
        known = torch.zeros(n, 0, dtype=torch.long, device=device)
        if prompt is not None:
            known = prompt.to(device, torch.long)
        before = known.shape[1]
        noise = rand((n, length), device)
        known = torch.cat([known, known.new_zeros(n, length)], 1)
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        memory = self._memory(n) if cache else None
        begin, encoded = 0, 0  # the window's first token; how many of its positions are in memory
        for i in range(before, before + length):
            if i - begin >= self.context:
                begin, encoded = i - self.context // 2, 0
            if memory is None or not encoded:
                x, encoded = self._begin(known[:, begin:i], label), 0
            else:
                x = self._embedded(known[:, i - 1 : i], encoded)
            logits = self._logits(x, encoded, memory, last=True)
            encoded += x.shape[1]
            drawn = _draw(logits, noise[:, i - before], temperature, top_k, top_p)
            known[:, i] = drawn.masked_fill(ended, 0)
            if stop is not None:
                ended = ended | stop(known[:, before : i + 1])
                if bool(ended.all()):
                    break
        return known[:, before:]

    def _begin(self, tokens: Tensor, label: Tensor | None) -> Tensor:
        """The start token before the embedded tokens: `[B, T] -> [B, T + 1, width]`."""
        start = self.start.expand(len(tokens), -1)
        if self.label is not None:
            if label is None:
                raise ValueError("a class-conditional decoder needs a label for every sequence")
            start = start + self.label(label)
        if self.position is not None:
            start = start + self.position.weight[0]
        return torch.cat([start[:, None], self._embedded(tokens, 1)], 1)

    def _embedded(self, tokens: Tensor, position: int) -> Tensor:
        """Tokens `[B, T]` as inputs `[B, T, width]` of the positions from `position` on."""
        x = self.embed(tokens.long())
        if self.position is not None:
            x = x + self.position.weight[position : position + tokens.shape[1]]
        return x

    def _logits(
        self, x: Tensor, position: int, memory: Tensor | None = None, *, last: bool = False
    ) -> Tensor:
        """Through the blocks: inputs `[B, T, width]` to logits `[B, T or 1, vocabulary]`."""
        stop = position + x.shape[1]
        turn = self.cos[position:stop], self.sin[position:stop]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, position, None if memory is None else memory[i])
        if last:
            x, position = x[:, -1:], stop - 1
        logits = self.head(self.norm(x)).float()
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden[position:stop], -math.inf)
        return logits

    def _memory(self, n: int) -> Tensor:
        """Room for keys and values: `[layers, 2, n, heads, context, head width]`."""
        shape = (len(self.blocks), 2, n, self.heads, self.context, 2 * self.cos.shape[1])
        return torch.empty(shape, dtype=self.start.dtype, device=self.start.device)


def _draw(logits: Tensor, u: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Tokens `[n]` from logits `[n, 1, vocabulary]` by the inverse of their distribution at u."""
    logits = logits[:, 0]
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.double() / temperature  # double: u * total stays below the total
    if 0 < top_k < logits.shape[1]:
        worst = logits.topk(top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -math.inf)
    p = logits.softmax(1)
    if top_p < 1:
        ordered, order = p.sort(1, descending=True)
        beyond = ordered.cumsum(1) - ordered >= top_p  # the first is always kept
        beyond[:, 0] = False
        p = p.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    total = p.cumsum(1)
    return torch.searchsorted(total, u.double()[:, None] * total[:, -1:], right=True)[:, 0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
