"""Trainings in plain PyTorch, as its tutorials write them: a DataLoader over torchvision's MNIST, a
loop, losses printed by `.item()`. The networks are ours, except the transformer, which is torch's.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from benchmarks.peers import Clock, Peer, count, endless, loader
from tasks.training.optim import make_optimizer

NORMALIZE = transforms.Normalize((0.5,), (0.5,))


def dcgan(model: Any, root: Path, batch: int) -> Peer:
    """The step of PyTorch's DCGAN tutorial, its two loader processes included."""
    generator, discriminator, criterion = model.generator, model.discriminator, nn.BCELoss()
    settings = model.config
    adam_d = make_optimizer(settings.discriminator_optimizer, list(discriminator.parameters()))
    adam_g = make_optimizer(settings.generator_optimizer, list(generator.parameters()))
    batches = loader(root, batch, NORMALIZE, workers=2)

    def judge(x: Tensor) -> Tensor:
        return torch.sigmoid(discriminator(x)).view(-1)

    def train(steps: int) -> float:
        clock, losses_g, losses_d = Clock(batch), [], []
        for real, _ in itertools.islice(endless(batches), steps):
            discriminator.zero_grad()
            label = torch.full((batch,), 1.0)
            output = judge(real)
            error_real = criterion(output, label)
            error_real.backward()
            output.mean().item()
            fake = generator(torch.randn(batch, settings.latent_dim))
            label.fill_(0.0)
            output = judge(fake.detach())
            error_fake = criterion(output, label)
            error_fake.backward()
            output.mean().item()
            adam_d.step()
            generator.zero_grad()
            label.fill_(1.0)
            output = judge(fake)
            error = criterion(output, label)
            error.backward()
            output.mean().item()
            adam_g.step()
            losses_g.append(error.item())
            losses_d.append((error_real + error_fake).item())
            clock.tick()
        return clock.rate()

    return Peer("plain PyTorch", count(model), train)


def wgan_gp(model: Any, root: Path, batch: int) -> Peer:
    """Gulrajani et al.'s algorithm 1 in the tutorial's manner; the critic's repeats are counted."""
    generator, critic, settings = model.generator, model.critic, model.config
    adam_c = make_optimizer(settings.critic_optimizer, list(critic.parameters()))
    adam_g = make_optimizer(settings.generator_optimizer, list(generator.parameters()))
    batches = loader(root, batch, NORMALIZE, workers=2)

    def penalty(real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(batch, 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_(True)
        output = critic(between)
        ones = torch.ones_like(output)
        slope = torch.autograd.grad(output, between, ones, create_graph=True, retain_graph=True)[0]
        return ((slope.view(batch, -1).norm(2, dim=1) - 1) ** 2).mean()

    def train(steps: int) -> float:
        clock, stream, losses = Clock(batch * settings.n_critic), endless(batches), []
        for _ in range(steps):
            for _ in range(settings.n_critic):
                real, _ = next(stream)
                adam_c.zero_grad()
                fake = generator(torch.randn(batch, settings.latent_dim)).detach()
                error = critic(fake).mean() - critic(real).mean()
                error = error + settings.penalty * penalty(real, fake)
                error.backward()
                adam_c.step()
                losses.append(error.item())
            adam_g.zero_grad()
            error = -critic(generator(torch.randn(batch, settings.latent_dim))).mean()
            error.backward()
            adam_g.step()
            losses.append(error.item())
            clock.tick()
        return clock.rate()

    return Peer("plain PyTorch", count(model), train)


def _to_levels(x: Tensor) -> Tensor:
    return (x > 0.5).float()


def pixelcnn(model: Any, root: Path, batch: int) -> Peer:
    """Our network, whose convolutions are torch's, in a plain loop."""

    def loss(x: Tensor) -> Tensor:
        logits = model.logits(2 * x - 1)  # [B, H, W, C, levels]
        return F.cross_entropy(logits.flatten(0, 3), x.permute(0, 2, 3, 1).reshape(-1).long())

    return _descend(model, model.config.optimizer, loss, root, batch)


class _GPT(nn.Module):
    """torch's own encoder layers behind a causal mask, of our sizes."""

    def __init__(self, vocabulary: int, context: int, settings: Any) -> None:
        super().__init__()
        width = settings.width
        layer = nn.TransformerEncoderLayer(
            width,
            settings.heads,
            4 * width,
            settings.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        self.embed = nn.Embedding(vocabulary + 1, width)  # the last one starts a sequence
        self.position = nn.Embedding(context, width)
        norm = nn.LayerNorm(width, bias=False)
        self.body = nn.TransformerEncoder(layer, settings.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        start = torch.full((len(tokens), 1), self.embed.num_embeddings - 1)
        x = self.embed(torch.cat([start, tokens[:, :-1]], 1)) + self.position.weight
        return self.head(self.body(x, mask=self.mask, is_causal=True))


def transformer(model: Any, root: Path, batch: int) -> Peer:
    """torch's own transformer layers over our tokens, in a plain loop."""
    decoder = model.decoder
    net = _GPT(decoder.head.out_features, decoder.context, model.config)

    def loss(x: Tensor) -> Tensor:
        tokens = model.tokens(x)
        return F.cross_entropy(net(tokens).transpose(1, 2), tokens)

    return _descend(net, model.config.optimizer, loss, root, batch)


def _descend(net: nn.Module, settings: Any, loss_of: Any, root: Path, batch: int) -> Peer:
    optimizer = make_optimizer(settings, list(net.parameters()))
    batches = loader(root, batch, transforms.Lambda(_to_levels), workers=2)

    def train(steps: int) -> float:
        clock, total = Clock(batch), 0.0
        net.train()
        for x, _ in itertools.islice(endless(batches), steps):
            optimizer.zero_grad()
            loss = loss_of(x)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), settings.clip_grad_norm)
            optimizer.step()
            total += loss.item()
            clock.tick()
        return clock.rate()

    return Peer("plain PyTorch", count(net), train)
