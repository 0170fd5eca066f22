"""What a training step costs on N workers: a model to be fitted, checked, and then extrapolated.

    step(N) = compute(N) + waiting(N) + exchange(gradients, N) + small collectives(N)

Nothing is subtracted for overlap: gradients are exchanged after the backward pass. Who is early
waits for the last: where a step's time varies, its longest of N is longer than its mean. Around the
steps stand what does not shrink with N (Amdahl's part): the start of the workers, and the
checkpoints, which the first worker writes while the others wait.

Seconds, bytes and bytes a second throughout. Two kinds of exchange:

- `Loopback`: gloo on one machine, a ring (`gloo/allreduce.cc`): 2(N-1) messages one after the
  other, each of a share 1/N of the bytes.
- `Nccl`: the formulas and the latencies of NCCL's own tuner (`src/graph/tuning.cc` of
  github.com/NVIDIA/nccl at 01afd20, `ncclTopoTuneModel`), which chooses, as NCCL does, the
  quickest of ring and tree and of the protocols LL, LL128 and Simple. The latencies there are of
  Ampere and before; its corrections for medium sizes are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MICRO = 1e-6


class Exchange(Protocol):
    def seconds(self, size: float, workers: int) -> float:
        """Of one all-reduce of so many bytes."""


def ring(size: float, workers: int, latency: float, bandwidth: float) -> float:
    """Reduce-scatter and all-gather along a ring: 2(N-1) steps, each with 1/N of the bytes."""
    steps = 2 * (workers - 1)
    return steps * latency + steps / workers * size / bandwidth


@dataclass(frozen=True)
class Loopback:
    """Workers of one machine."""

    latency: float
    bandwidth: float

    def seconds(self, size: float, workers: int) -> float:
        return ring(size, workers, self.latency, self.bandwidth)


def crowding(workers: int, cores: int) -> float:
    """How many workers share a core, at least one."""
    return max(1.0, workers / cores)


def longest(workers: int) -> float:
    """The mean of the largest of so many draws of N(0, 1)."""
    x = np.linspace(-8, 8, 4001)
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(x * workers * density * below ** (workers - 1)) * (x[1] - x[0]))


def fit(measured: Iterable[tuple[float, int, float]]) -> Loopback:
    """The loopback that is nearest to `(bytes, workers, seconds)`, by least squares of the
    relative errors (the sizes span decades).

    Raises:
        ValueError: latency or bandwidth would come out negative.
    """
    rows = [(2 * (n - 1) / t, 2 * (n - 1) / n * size / t) for size, n, t in measured]
    (latency, inverse), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    if latency <= 0 or inverse <= 0:
        raise ValueError(f"no ring: latency {latency} s, {inverse} s a byte")
    return Loopback(float(latency), float(1 / inverse))


def fit_spread(measured: Iterable[tuple[float, int, float]]) -> float:
    """The deviation of a step's time, as a share of it, that explains the waiting in
    `(compute, workers, waiting)`; least squares of the shares."""
    rows = [(longest(n), waited / compute) for compute, n, waited in measured]
    return max(0.0, sum(e * share for e, share in rows) / sum(e * e for e, _ in rows))


# of NCCL's tuner, microseconds: base, a step within a node, a step between nodes; and the share
# of the bandwidth that the protocol leaves
PROTOCOLS = {
    ("tree", "LL"): (4.4, 0.52, 5.0, 1 / 3.8),
    ("tree", "LL128"): (4.4, 1.2, 8.5, 0.915),
    ("tree", "Simple"): (0.0, 28.0, 50.0, 1.0),
    ("ring", "LL"): (3.6, 0.47, 2.7, 1 / 4),
    ("ring", "LL128"): (10.0, 1.9, 4.0, 0.92),
    ("ring", "Simple"): (8.4, 3.4, 9.6, 1.0),
}


@dataclass(frozen=True)
class Nccl:
    """Nodes of GPUs.

    Attributes:
        inside: bytes a second that a GPU sends within its node, at the same time as it receives.
        between: the same of a whole node to the others, all its adapters together.
        reached: the share of these that a collective gets.
    """

    inside: float
    between: float
    per_node: int = 8
    reached: float = 0.8

    def choices(self, size: float, workers: int) -> dict[tuple[str, str], float]:
        """Seconds by algorithm and protocol."""
        nodes = math.ceil(workers / self.per_node)
        local = min(workers, self.per_node)
        peak = self.reached * (self.inside if nodes == 1 else min(self.inside, self.between))
        found = {}
        for (algorithm, protocol), (base, inside, between, share) in PROTOCOLS.items():
            extra = 1.8 if nodes > 1 and protocol == "LL" else 1.0
            if algorithm == "ring":
                hops = 2 * (workers - 1), 2 * (nodes - 1)
                latency = base + (hops[0] - hops[1]) * inside * extra + hops[1] * between
                rate = peak * workers / (2 * (workers - 1))
            else:
                latency = base + 2 * ((local - 1) * inside * extra + math.log2(nodes) * between)
                rate = peak * 0.9 / 2
            found[algorithm, protocol] = latency * MICRO + size / (rate * share)
        return found

    def seconds(self, size: float, workers: int) -> float:
        return min(self.choices(size, workers).values()) if workers > 1 else 0.0


@dataclass(frozen=True)
class Job:
    """A family's step, whatever it runs on.

    Attributes:
        gradients: bytes of each exchange of gradients in a step, one for each phase and bucket.
        small: other collectives of a step (batch statistics), of some hundred bytes each.
        log_every: steps between records; each costs three small collectives.
        state: bytes of a checkpoint.
        packing: seconds for copying the gradients into the buckets and back.
    """

    gradients: tuple[float, ...]
    small: float = 0
    log_every: int = 20
    state: float = 0
    packing: float = 0


def exchanged(job: Job, workers: int, exchange: Exchange) -> float:
    """Seconds of a step that go into collectives, and into packing what they send."""
    if workers == 1:
        return 0.0
    small = (job.small + 3 / job.log_every) * exchange.seconds(256, workers)
    return job.packing + small + sum(exchange.seconds(size, workers) for size in job.gradients)


@dataclass(frozen=True)
class Around:
    """What a run costs besides its steps; seconds, bytes a second."""

    start: float
    disk: float
    checkpoint_every: int = 250

    def share(self, job: Job, step: float, steps: int) -> float:
        """Of such a run's time, what its steps take."""
        writing = steps / self.checkpoint_every * job.state / self.disk
        return steps * step / (steps * step + self.start + writing)


def efficiency(compute: float, job: Job, workers: int, exchange: Exchange) -> float:
    """Weak scaling: N workers' images a second over N times one worker's."""
    return compute / (compute + exchanged(job, workers, exchange))


def limit(compute: float, job: Job, exchange: Exchange, floor: float = 0.8) -> int | None:
    """The first power of two of workers at which weak scaling is below `floor`, up to 2**14."""
    counts = (2**k for k in range(1, 15))
    return next((n for n in counts if efficiency(compute, job, n, exchange) < floor), None)
