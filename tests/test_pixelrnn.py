"""PixelRNN: causal, with the context that the paper draws, normalised, sampled from states."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.data import Batch, DataSpec
from models.pixelrnn import KINDS, PixelRNN, PixelRNNConfig
from models.pixelrnn.lstm import Scan
from models.pixelrnn.sampling import draw

KIND = pytest.mark.parametrize("kind", sorted(KINDS))


def small(kind: str, shape: tuple[int, int, int], levels: int = 3, **changes: Any) -> PixelRNN:
    torch.manual_seed(0)
    config = PixelRNNConfig(layer=kind, **{"layers": 2, "hidden": 6, "head": 6, **changes})
    classes = ("a", "b") if config.class_conditional else ()
    model = PixelRNN(config, DataSpec(shape=shape, levels=levels, classes=classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # away from one half everywhere
    return model.eval()


def seen(model: PixelRNN, value: int) -> Tensor:
    """Which of the values `[H*W, C]`, in the model's order, the logits of number `value` see."""
    model.double()
    model.head[0], model.head[2] = nn.Tanh(), nn.Tanh()  # a ReLU may hide a path
    x = torch.randn(1, *model.data.shape, dtype=torch.float64, requires_grad=True)
    logits = model(x)[:, 0].flatten(0, 1)[value]
    (gradient,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), x)
    return gradient[0].permute(1, 2, 0).flatten(0, 1) != 0


def all_before(model: PixelRNN, value: int) -> Tensor:
    """What the diagonal kind sees, `[H*W, C]`: everything before, but of the row above the last
    pixel only where the first convolution reaches it. That is the paper's design: the map of
    the right direction has, at a pixel, everything but the pixel itself (mask A)."""
    colours, height, width = model.data.shape
    pixels = torch.arange(colours * height * width).view(-1, colours) < value
    row, column = divmod(value // colours, width)
    if row and column + 3 < width - 1:
        pixels[row * width - 1] = False
    return pixels


@KIND
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4)], ids=str)
def test_no_value_sees_itself_or_what_comes_after(kind: str, shape: tuple[int, int, int]) -> None:
    """Row by row, in a pixel R before G before B: and the diagonal kind sees all that is before."""
    model = small(kind, shape)
    colours = shape[0]
    for value in range(colours * shape[1] * shape[2]):
        before = torch.arange(colours * shape[1] * shape[2]) < value
        found = seen(model, value)
        assert not (found.flatten() & ~before).any(), value
        if kind == "diagonal_bilstm":
            assert torch.equal(found, all_before(model, value)), value
    # the last colour knows the others of its own pixel, whatever the layer
    own = seen(model, colours * 6 + colours - 1)[6]
    assert own.tolist() == [True] * (colours - 1) + [False]


def test_one_row_lstm_sees_a_triangle() -> None:
    """A row up, one state more on either side; at the edge of it the first convolution's 7x7, and
    the pixel on the left in the input-to-state convolution."""
    height, width, row, column = 5, 23, 4, 12
    model = small("row_lstm", (1, height, width), layers=1)
    found = seen(model, row * width + column).view(height, width)
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[row, column - 4 : column] = True
    for up in range(1, height):
        expected[row - up, max(0, column - up - 4) : column + up + 3] = True
    assert torch.equal(found, expected)


def test_one_diagonal_layer_sees_everything_before() -> None:
    height, width, row, column = 5, 23, 4, 12
    model = small("diagonal_bilstm", (1, height, width), layers=1)
    value = row * width + column
    found = seen(model, value)
    assert torch.equal(found, all_before(model, value))
    assert int(found.sum()) == value - 1


@KIND
@pytest.mark.parametrize(
    ("shape", "levels"), [((1, 2, 2), 3), ((1, 3, 3), 2), ((3, 1, 3), 2)], ids=str
)
@pytest.mark.parametrize("classes", [False, True])
def test_probabilities_sum_to_one(
    kind: str, shape: tuple[int, int, int], levels: int, classes: bool
) -> None:
    model = small(kind, shape, levels, class_conditional=classes)
    size = model.data.dimensions
    every = torch.tensor(list(itertools.product(range(levels), repeat=size))).view(-1, *shape)
    with torch.no_grad():
        total = model.log_prob(every.to(torch.uint8)).double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


@KIND
@pytest.mark.parametrize("shape", [(1, 6, 5), (1, 4, 7), (3, 3, 4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_cached_sampling_is_naive_sampling(
    kind: str, shape: tuple[int, int, int], temperature: float
) -> None:
    model = small(kind, shape, levels=4)
    drawn = []
    with torch.no_grad():
        for sample in (model.sample, model.sample_naive):
            torch.manual_seed(5)
            drawn.append(sample(16, temperature=temperature))
    assert torch.equal(*drawn)
    assert temperature == 0 or len(drawn[0].unique()) > 1


@KIND
def test_samples_follow_the_model(kind: str) -> None:
    """Cached samples of a tiny domain against the probabilities that `log_prob` gives."""
    model = small(kind, (1, 2, 2), levels=2)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.log_prob(every.view(-1, 1, 2, 2)).exp()
        torch.manual_seed(0)
        drawn = model.sample(20_000).flatten(1)
    code = (drawn.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    assert torch.allclose(torch.bincount(code, minlength=16) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_draw_follows_its_temperature(temperature: float) -> None:
    """Over an even grid of noise the levels come as often as softmax(logits / T) says."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    noise = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(logits.expand(10_000, -1), noise, temperature)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    expected = torch.tensor(weights) / sum(weights)
    assert torch.allclose(shares, expected, atol=2e-4)
    assert (draw(logits.expand(10_000, -1), noise, 0.0) == 2).all()


@KIND
def test_the_scan_is_the_recurrence_and_its_gradient_is_right(kind: str) -> None:
    """Values against the paper's equations, pixel by pixel; gradients against differences."""
    torch.manual_seed(0)
    height, width, batch, h = 3, 4, 2, 2
    walk = KINDS[kind].walk(height, width)
    directions = 1 if kind == "row_lstm" else 2
    gates = torch.randn(directions, height * width, batch, 4 * h, dtype=torch.float64)
    weight = torch.randn(directions, len(walk.taps), h, 4 * h, dtype=torch.float64)
    found = Scan.apply(gates, weight, walk)
    for d in range(directions):
        state: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        zero = (torch.zeros(batch, h, dtype=torch.float64),) * 2
        ahead = -1 if d == 0 else 1  # of the diagonal kind: where the pixel beside lies
        for r in range(height):
            for c in range(width)[::-ahead]:
                if kind == "row_lstm":
                    sources = [(r - 1, c), (r - 1, c - 1), (r - 1, c + 1)]
                else:
                    sources = [(r, c + ahead), (r - 1, c)]
                total = gates[d, r * width + c]
                for j, source in enumerate(sources):
                    total = total + state.get(source, zero)[0] @ weight[d, j]
                i, f, o, g = total.chunk(4, -1)
                cell = f.sigmoid() * state.get(sources[0], zero)[1] + i.sigmoid() * g.tanh()
                state[r, c] = (o.sigmoid() * cell.tanh(), cell)
                assert torch.allclose(found[d, r * width + c], state[r, c][0], atol=1e-12)
    inputs = (gates.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: Scan.apply(a, b, walk), inputs)


@KIND
def test_classes_matter_and_are_averaged(kind: str) -> None:
    model = small(kind, (1, 4, 4), class_conditional=True)
    assert model.conditions == {"label"}
    x = torch.randint(0, 3, (5, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        each = torch.stack([-model._nats(x, torch.full((5,), y)) for y in (0, 1)])
        assert torch.allclose(model.log_prob(x), torch.log(each.exp().mean(0)))
    assert not torch.allclose(each[0], each[1])
    with pytest.raises(ValueError, match="label"):
        model.losses(Batch(x), "main")
    with pytest.raises(ValueError, match="classes"):
        PixelRNN(PixelRNNConfig(class_conditional=True), DataSpec(shape=(1, 4, 4), levels=3))
