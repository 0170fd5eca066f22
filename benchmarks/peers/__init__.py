"""Trainings by other libraries, each by its own trainer or by the loop that its documentation has.

A module for each library, and here what they share. A peer gets our networks where it takes
networks, else builds its own of the same sizes. All train in fp32, which is what their
documentation does. Each function makes a training and returns it with the number of parameters;
called with a number of steps it trains so many and returns images/s.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def nearest(build: Callable[[int], nn.Module], widths: Any, parameters: int) -> nn.Module:
    """Of the widths the one whose number of parameters is nearest."""
    return min((build(w) for w in widths), key=lambda net: abs(count(net) - parameters))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their progress bars go into a buffer, where they cost what they cost."""
    logging.disable(logging.INFO)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)
