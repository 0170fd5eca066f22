"""The dataset's own classifier, whose features measure fidelity where Inception's mean little.

With class labels or attributes it learns them; without, it learns by how many quarter turns an
image was rotated (Gidaris et al. 2018), and says so in its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.data import DataSpec, to_signed
from models.nn import pyramid

TURNS = 4
WEIGHTS = "classifier.safetensors"
BATCH = 100  # images at a time when only asked


class Classifier(nn.Module):
    """Small convolutional network: levels `[B, C, H, W]` -> features `[B, F]` -> logits."""

    def __init__(self, spec: DataSpec, *, width: int, features: int) -> None:
        super().__init__()
        self.spec = spec
        self.task = "classes" if len(spec.classes) > 1 else "rotations"
        if spec.attributes:
            self.task = "attributes"
        channels, *side = spec.shape
        if self.task == "rotations":  # a square holds every turn
            side = [max(side)] * 2
        sizes = pyramid((side[0], side[1]), smallest=4)
        layers: list[nn.Module] = []
        outs = width
        for _ in range(max(len(sizes) - 1, 1)):
            layers += [
                nn.Conv2d(channels, outs, 3, stride=2 if sizes[1:] else 1, padding=1),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
                nn.Conv2d(outs, outs, 3, padding=1),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
            ]
            channels, outs = outs, 2 * outs
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * math.prod(sizes[-1]), features), nn.ReLU()
        )
        answers = {"classes": len(spec.classes), "attributes": len(spec.attributes)}
        self.head = nn.Linear(features, answers.get(self.task, TURNS))

    def features(self, x: Tensor) -> Tensor:
        """Levels `[B, C, H, W]` to the last hidden layer, `[B, F]`."""
        y = to_signed(x, self.spec.levels)
        if self.task == "rotations":
            h, w = y.shape[-2:]
            y = F.pad(y, (0, max(h, w) - w, 0, max(h, w) - h), value=-1.0)
        return self.body(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def exercise(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """The images and targets of the task that this classifier learns."""
        if self.task != "rotations":
            assert label is not None
            return x, label
        h, w = x.shape[-2:]
        square = F.pad(x, (0, max(h, w) - w, 0, max(h, w) - h))
        turned = [torch.rot90(square, turn, (-2, -1)) for turn in range(TURNS)]
        return torch.cat(turned), torch.arange(TURNS).repeat_interleave(len(x))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.task == "attributes":
            return F.binary_cross_entropy_with_logits(logits, target.float())
        return F.cross_entropy(logits, target, label_smoothing=0.05)

    def decide(self, logits: Tensor) -> Tensor:
        """The answers, `[B]`, or `[B, A]` of 0 and 1 for attributes."""
        return (logits > 0).long() if self.task == "attributes" else logits.argmax(1)


def fit(
    spec: DataSpec,
    x: Tensor,
    label: Tensor | None,
    *,
    width: int,
    features: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Classifier:
    """Train on levels `[N, C, H, W]`; one-cycle learning rate, AdamW, small random shifts."""
    torch.manual_seed(seed)
    model = Classifier(spec, width=width, features=features).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batch_size = min(batch_size, len(x))
    order = torch.randperm(len(x))
    for step in range(steps):
        start = step * batch_size % max(len(x) - batch_size + 1, 1)
        if step and start < batch_size:
            order = torch.randperm(len(x))
        rows = order[start : start + batch_size]
        images, target = model.exercise(_shifted(x[rows]), None if label is None else label[rows])
        loss = model.loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, float(loss.detach()))
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, x: Tensor, label: Tensor | None) -> float:
    """Share of right answers on the classifier's own task."""
    right = total = 0
    for start in range(0, len(x), 500):
        part = slice(start, start + 500)
        images, target = model.exercise(x[part], None if label is None else label[part])
        right += int((model.decide(model(images)) == target).sum())
        total += target.numel()
    return right / total


def save(directory: Path, model: Classifier, facts: dict[str, object]) -> dict[str, object]:
    """`classifier.safetensors`, and `classifier.json` (task, sizes, accuracies): its content."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return _write(directory, state, model.task, model.spec, facts)


def save_none(directory: Path, spec: DataSpec) -> dict[str, object]:
    """What stands in the place of a classifier where the data are no images: no weights."""
    return _write(directory, {}, "none", spec, {"test_accuracy": None})


def _write(
    directory: Path,
    state: dict[str, Tensor],
    task: str,
    spec: DataSpec,
    facts: dict[str, object],
) -> dict[str, object]:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / WEIGHTS)
    description = {"task": task, "spec": spec.model_dump(mode="json"), **facts}
    (directory / "classifier.json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def load(directory: Path) -> Classifier:
    """The classifier in `directory`, to be asked only: `fused`, which takes a third less time and
    moves features by rounding."""
    facts = json.loads((directory / "classifier.json").read_text())
    spec = DataSpec(**facts["spec"])
    model = Classifier(spec, width=facts["width"], features=facts["features"])
    model.load_state_dict(load_file(directory / WEIGHTS))
    return fused(model)


def fused(model: Classifier) -> Classifier:
    """`model` itself, changed for good: the same function of images but for rounding, in evaluation
    mode, with no batch norm of its own, its weights laid out with channels last (else each
    convolution rearranges the images before and after it), and its activations in place."""
    model = model.eval()
    for i, layer in enumerate(model.body):
        if isinstance(layer, nn.BatchNorm2d):
            convolution = model.body[i - 1]
            assert isinstance(convolution, nn.Conv2d)
            model.body[i - 1] = fuse_conv_bn_eval(convolution, layer)
            model.body[i] = nn.Identity()
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    return model.to(memory_format=torch.channels_last)


def _shifted(x: Tensor) -> Tensor:
    """Each batch shifted by up to one pixel, so that the features are not tied to the grid."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (dy, dx), (-2, -1))


@torch.no_grad()
def logits(model: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The classifier's logits `[N, C]` for levels `[N, C, H, W]`."""
    parts = [
        model(torch.from_numpy(images[start : start + BATCH]))
        for start in range(0, len(images), BATCH)
    ]
    return torch.cat(parts).numpy()


def decide(model: Classifier, found: NDArray[np.float32]) -> NDArray[np.int64]:
    """Its answers to logits: `[N]`, or `[N, A]` for attributes."""
    return model.decide(torch.from_numpy(found)).numpy()


def predict(model: Classifier, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The classifier's answers for levels `[N, C, H, W]`: `[N]`, or `[N, A]` for attributes."""
    return decide(model, logits(model, images))


def shares(answers: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Share of the answers `[N]` for each class."""
    return np.bincount(answers, minlength=classes) / len(answers)
