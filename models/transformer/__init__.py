"""Decoder-only transformer: Radford et al. 2018/2019 (GPT); for pixels Chen et al. 2020 (ImageGPT).

    text      bytes [B, T], each a token
    points    [B, 2], two tokens of `levels` each
    images    [B, C, H, W] -> tokens [B, rows * columns * C]: patches of `patch` pixels in raster
              order, R then G then B of each; a token is all values of one channel of its patch
    decoder   tokens [B, T] -> logits [B, T, levels ** (pixels of a patch)], causal, start token
    loss      mean negative log-likelihood of a token, nats; exact

A patch is a change of alphabet, one to one, so the likelihood is that of the pixels; it makes the
sequence short where there are few levels (28x28 binary: 98 tokens of 2x4 pixels, not 784). Where
the sides do not divide, rows and columns of zeros are added, and tokens that would put anything
else there have probability 0: the likelihood stays that of the image, and sums to one.

`sample` keeps keys and values, so that each token costs one position's work. Text longer than the
context (the training windows' length) slides the window: its later half is encoded anew as the
start of a sequence, and so is the end of a longer prompt.

Deviations from the papers: far smaller by default; bytes instead of byte pairs; images keep their
own levels and colours, where ImageGPT reduces them to 512 colours (one token a pixel); rotary
positions (Su et al. 2021), with the papers' learned ones added for images and points only; no
biases; input and output embeddings are not tied; a learned start token, moved by the class where
`class_conditional`. `log_prob` is then that of the mixture over equally likely classes; that of
text is of the whole window, its first byte included.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.base import GenerativeModel
from models.config import Config, OptimizerConfig, Positive
from models.data import Batch, DataSpec
from models.decoder import Decoder, Stop
from models.noise import random_labels

VOCABULARY = 4096  # the largest that a patch may make
AUTOMATIC = 256  # and the largest that `auto` makes
MEMORY = 2**26  # values of keys and values that sampling keeps at a time; 256 MiB


class TransformerConfig(Config):
    patch: Literal["auto"] | tuple[Positive, Positive] = (
        "auto"  # (height, width); auto: the largest
    )
    # that divides the image and makes at most 256 tokens, (1, 1) for 8-bit images
    width: Positive = 64
    layers: Positive = 3
    heads: Positive = 2
    dropout: float = Field(0.1, ge=0, lt=1)
    class_conditional: bool = False
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw",
        lr=3e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        warmup_steps=100,
        clip_grad_norm=1.0,
    )


class Transformer(GenerativeModel):
    """GPT over bytes, coordinates, or patches of pixels."""

    Config = TransformerConfig
    paper = "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training"
    modalities = frozenset({"image", "text", "points"})
    likelihood = "exact"
    most_draws = 1
    config: TransformerConfig

    def __init__(self, config: TransformerConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        if config.class_conditional:
            if not data.classes:
                raise ValueError("class_conditional: the data has no classes")
            self.conditions = frozenset({"label"})
        if data.modality == "text":
            self.conditions |= {"text"}  # a prompt, which may be left out
        self.patch, context, allowed = (1, 1), data.dimensions, None
        if data.modality == "image":
            self.patch = _patch(config, data)
            used = self.tokens(torch.full((1, *data.shape), data.levels - 1))[0]  # 0 where padded
            context, allowed = len(used), self._allowed(used)
        self.decoder = Decoder(
            data.levels ** math.prod(self.patch),
            context=context,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            classes=len(data.classes) if config.class_conditional else 0,
            positions=data.modality != "text",
            allowed=allowed,
        )

    # -- pixels and tokens -------------------------------------------------------------------

    def tokens(self, x: Tensor) -> Tensor:
        """Levels `[B, *shape]` to tokens `[B, T]`, int64; the first pixel weighs most."""
        if self.data.modality != "image":
            return x.long()
        _, h, w = self.data.shape
        ph, pw = self.patch
        x = F.pad(x.long(), (0, -w % pw, 0, -h % ph))
        x = x.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [B, C, rows, ph, columns, pw]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(4)  # [B, rows, columns, C, ph * pw]
        return (x * self._weights(x.device)).sum(-1).flatten(1)

    def levels(self, tokens: Tensor) -> Tensor:
        """The inverse: tokens `[B, T]` to levels `[B, *shape]`, uint8."""
        if self.data.modality != "image":
            return tokens.to(torch.uint8)
        c, h, w = self.data.shape
        ph, pw = self.patch
        x = tokens[..., None] // self._weights(tokens.device) % self.data.levels
        x = x.view(len(x), -(-h // ph), -(-w // pw), c, ph, pw)
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return x[:, :, :h, :w].to(torch.uint8)

    def _weights(self, device: torch.device) -> Tensor:
        places = torch.arange(math.prod(self.patch) - 1, -1, -1, device=device)
        return self.data.levels**places

    def _allowed(self, used: Tensor) -> Tensor | None:
        """Tokens that leave the padding 0, `[T, vocabulary]`; `used` are those of a full image."""
        values = torch.arange(self.data.levels ** math.prod(self.patch))
        digits, full = (t[..., None] // self._weights(t.device) for t in (values, used))
        digits, full = digits % self.data.levels, full % self.data.levels
        if bool(full.all()):
            return None
        return ((full[:, None] > 0) | (digits == 0)).all(2)

    # -- likelihood --------------------------------------------------------------------------

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        tokens = self.tokens(batch.x)
        label = batch.label if self.config.class_conditional else None
        nats = -self.decoder.log_prob(tokens, label).mean()
        bits = nats.detach() / (self.data.dimensions * math.log(2))
        return {"loss": nats / tokens.shape[1], "bits_per_dim": bits}

    def log_prob(self, x: Tensor, *, samples: int = 1) -> Tensor:
        """Exact, whatever `samples`."""
        rows = max(1, 2**24 // (self.decoder.context * self.decoder.head.out_features))
        return torch.cat([self._log_prob(self.tokens(part)) for part in x.split(rows)])

    def _log_prob(self, tokens: Tensor) -> Tensor:
        if not self.config.class_conditional:
            return self.decoder.log_prob(tokens)
        total: Tensor | None = None
        for number in range(len(self.data.classes)):
            part = self.decoder.log_prob(tokens, tokens.new_full((len(tokens),), number))
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - math.log(len(self.data.classes))

    # -- sampling ----------------------------------------------------------------------------

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
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str = "",
    ) -> Tensor:
        """Uint8 levels `[n, *shape]`; text: the bytes that follow `text`, `[n, max_tokens]`.

        Args:
            max_tokens: bytes of text to write; 0: as many as the training windows have.
            top_k: draw among the k likeliest tokens only (0: among all).
            top_p: draw among the likeliest tokens that together have this probability.
            stop: text ends with the first occurrence; zeros follow it.
        """
        if z is not None:
            raise ValueError("a transformer has no latents: z cannot be given")
        if self.data.modality != "text" and (text is not None or max_tokens or stop):
            raise ValueError("text, max_tokens and stop are for models of text")
        if max_tokens < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("max_tokens and top_k are 0 or more, top_p is above 0 and at most 1")
        if not self.config.class_conditional:
            label = None
        elif label is None:
            label = random_labels(n, self.data, self.device)
        values = 2 * self.config.layers * self.config.width * self.decoder.context
        rows = max(1, MEMORY // values)
        drawn = [
            self.decoder.generate(
                min(rows, n - first),
                max_tokens or self.decoder.context,
                label=None if label is None else label[first : first + rows],
                prompt=None if text is None else text[first : first + rows],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=_ends_with(stop.encode()) if stop else None,
            )
            for first in range(0, n, rows)
        ]
        return self.levels(torch.cat(drawn))


def _patch(config: TransformerConfig, data: DataSpec) -> tuple[int, int]:
    """The configured patch, or the largest that divides the image: near square, rather wide."""
    if config.patch != "auto":
        if data.levels ** math.prod(config.patch) > VOCABULARY:
            raise ValueError(
                f"patch: {math.prod(config.patch)} pixels of {data.levels} levels make more than "
                f"{VOCABULARY} tokens"
            )
        return config.patch
    _, height, width = data.shape
    fitting = [
        (h, w)
        for h in range(1, 9)
        for w in range(1, 9)
        if height % h == 0 and width % w == 0 and data.levels ** (h * w) <= AUTOMATIC
    ]
    return max(fitting, key=lambda hw: (hw[0] * hw[1], -abs(hw[1] - hw[0]), hw[1]), default=(1, 1))


def _ends_with(pattern: bytes) -> Stop:
    def check(written: Tensor) -> Tensor:
        wanted = torch.tensor(list(pattern), device=written.device)
        if written.shape[1] < len(wanted):
            return torch.zeros(len(written), dtype=torch.bool, device=written.device)
        return (written[:, -len(wanted) :] == wanted).all(1)

    return check
