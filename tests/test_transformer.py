"""The transformer is causal, its probabilities sum to one, its cache changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models.data import DataSpec
from models.decoder import Decoder, _draw
from models.transformer import Transformer, TransformerConfig

IMAGES = DataSpec(shape=(2, 4, 6), levels=2, classes=("a", "b"))
TEXT = DataSpec(shape=(12,), levels=256, modality="text")


def randomised(data: DataSpec, **changes: object) -> Transformer:
    """Double precision, evaluation mode, weights large enough for everything to matter."""
    torch.manual_seed(0)
    config = TransformerConfig(width=16, layers=2, heads=2, **changes)  # type: ignore[arg-type]
    model = Transformer(config, data).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(n: int, data: DataSpec) -> Tensor:
    return torch.randint(0, data.levels, (n, *data.shape), dtype=torch.uint8)


def test_no_token_sees_itself_or_a_later_one() -> None:
    torch.manual_seed(0)
    decoder = randomised(DataSpec(shape=(7,), levels=5, modality="text")).decoder
    embedded: list[Tensor] = []
    decoder.embed.register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_()))
    logits = decoder(torch.randint(0, 5, (1, 7)))
    for t in range(7):
        (gradient,) = torch.autograd.grad(
            logits[0, t].square().sum(), embedded[0], retain_graph=True
        )
        reached = gradient[0].abs().sum(1) > 0
        assert reached.tolist() == [j < t for j in range(6)]  # all of those before, no other


def test_the_fast_attention_is_torchs() -> None:
    from models.attention import attend

    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attend(q, k, v), expected)


def test_rotary_positions_are_relative() -> None:
    from models.attention import rotate

    decoder = Decoder(3, context=12, width=8, layers=1, heads=1).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        turned = [
            rotate(x, decoder.cos[at : at + 1].double(), decoder.sin[at : at + 1].double())
            for x, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(score(5, 3), score(11, 9))
    assert not torch.allclose(score(5, 3), score(5, 4))


@pytest.mark.parametrize("patch", [(1, 1), (1, 2), (2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("class_conditional", [False, True])
def test_probabilities_sum_to_one(patch: tuple[int, int], class_conditional: bool) -> None:
    """Over all 3x3 binary images; three of the patches do not divide the sides."""
    data = DataSpec(shape=(1, 3, 3), levels=2, classes=("a", "b", "c"))
    model = randomised(data, patch=patch, class_conditional=class_conditional)
    every = torch.tensor(list(itertools.product(range(2), repeat=9)), dtype=torch.uint8)
    with torch.no_grad():
        log_prob = model.log_prob(every.view(-1, 1, 3, 3))
    assert float(log_prob.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(log_prob.std()) > 0.1


def test_samples_follow_the_probabilities() -> None:
    data = DataSpec(shape=(1, 1, 3), levels=2)
    model = randomised(data, patch=(1, 2))
    every = torch.tensor(list(itertools.product(range(2), repeat=3)), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.log_prob(every.view(-1, 1, 1, 3)).exp()
        drawn = model.sample(20_000).flatten(1).long() @ torch.tensor([4, 2, 1])
    share = torch.bincount(drawn, minlength=8) / 20_000
    assert torch.allclose(share.float(), expected.float(), atol=0.015)


def test_mixture_over_classes() -> None:
    model = randomised(IMAGES, class_conditional=True)
    x = images(4, IMAGES)
    with torch.no_grad():
        parts = [model.decoder.log_prob(model.tokens(x), torch.full((4,), y)) for y in (0, 1)]
        assert not torch.allclose(*parts)
        assert torch.allclose(model.log_prob(x), torch.stack(parts).exp().mean(0).log(), atol=1e-4)


@pytest.mark.parametrize("patch", ["auto", (1, 1), (2, 4), (3, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
def test_patches_are_one_to_one(patch: tuple[int, int], shape: tuple[int, int, int]) -> None:
    data = DataSpec(shape=shape, levels=2)
    model = Transformer(TransformerConfig(patch=patch, width=8, layers=1), data)
    x = images(16, data)
    tokens = model.tokens(x)
    assert tokens.shape == (16, model.decoder.context)
    assert torch.equal(model.levels(tokens), x)


def test_order_of_the_tokens() -> None:
    """Rows, columns, then colours."""
    data = DataSpec(shape=(3, 2, 2), levels=16)
    model = Transformer(TransformerConfig(patch=(1, 1), width=8, layers=1), data)
    x = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert model.tokens(x)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_automatic_patches() -> None:
    for shape, levels, expected in [
        ((1, 28, 28), 2, (2, 4)),
        ((1, 28, 28), 256, (1, 1)),
        ((3, 16, 16), 16, (1, 2)),
        ((1, 9, 13), 2, (3, 1)),
    ]:
        model = Transformer(TransformerConfig(width=8), DataSpec(shape=shape, levels=levels))
        assert model.patch == expected
    with pytest.raises(ValueError, match="patch"):
        Transformer(TransformerConfig(patch=(2, 2)), DataSpec(shape=(1, 8, 8), levels=256))


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.5}], ids=str)
def test_cached_samples_are_the_uncached(asked: dict[str, float]) -> None:
    """Also beyond the context, and after a prompt that is longer than it."""
    for model in (randomised(IMAGES, class_conditional=True), randomised(TEXT)):
        text = model.data.modality == "text"
        prompts = [None, 3, 30] if text else [None]
        for length in prompts:
            prompt = None if length is None else torch.randint(0, 256, (4, length))
            runs = []
            for cache in (True, False):
                torch.manual_seed(1)
                label = None if text else torch.tensor([0, 1, 0, 1])
                steps = 40 if text else model.decoder.context
                options = {"label": label, "prompt": prompt, "cache": cache, **asked}
                with torch.no_grad():
                    runs.append(model.decoder.generate(4, steps, **options))
            assert torch.equal(*runs)
            assert len(runs[0].unique(dim=0)) == 4


def test_the_window_slides() -> None:
    """Beyond the context what is far back is forgotten; what is near is not."""
    model = randomised(TEXT)
    text = torch.randint(0, 256, (1, 20), dtype=torch.uint8)
    far, near = text.clone(), text.clone()
    far[:, :14] = 7
    near[:, 14:] = 7
    with torch.no_grad():
        same, distant, other = (
            model.sample(1, text=t, temperature=0.0, max_tokens=6) for t in (text, far, near)
        )
    assert torch.equal(same, distant)
    assert not torch.equal(same, other)


def test_prompt_is_continued() -> None:
    """Greedy: the continuation of a prompt with its own continuation is the same text."""
    model = randomised(TEXT)
    text = torch.randint(0, 256, (2, 3), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.sample(2, text=text, temperature=0.0, max_tokens=8)
        part = model.sample(2, text=torch.cat([text, whole[:, :4]], 1), temperature=0.0)
        default = model.sample(2)
    assert torch.equal(part[:, :4], whole[:, 4:])
    assert default.shape == (2, 12)


def test_stop_ends_the_text() -> None:
    model = randomised(DataSpec(shape=(16,), levels=256, modality="text"))
    with torch.no_grad():  # an alphabet of three
        model.decoder.forbidden = torch.ones(16, 256, dtype=torch.bool)
        model.decoder.forbidden[:, list(b"abc")] = False
        torch.manual_seed(0)
        free = model.sample(64, max_tokens=30)
        torch.manual_seed(0)
        stopped = model.sample(64, max_tokens=30, stop="ab")
    ends = 0
    for row, cut in zip(free.tolist(), stopped.tolist(), strict=True):
        at = bytes(row).find(b"ab")
        ends += at >= 0
        assert cut == (row if at < 0 else row[: at + 2] + [0] * (28 - at))
    assert ends > 0


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)[:, None]
    u = torch.rand(2000)
    for (top_k, top_p), kept in {
        (0, 1.0): 4,
        (2, 1.0): 2,
        (0, 0.75): 2,
        (0, 0.85): 3,
        (3, 0.1): 1,
    }.items():
        drawn = _draw(logits, u, 1.0, top_k, top_p)
        share = torch.bincount(drawn, minlength=4) / 2000
        expected = torch.tensor([0.5, 0.3, 0.15, 0.05])
        expected[kept:] = 0
        assert torch.allclose(share, expected / expected.sum(), atol=0.05)
        assert (share[kept:] == 0).all()
    assert (_draw(logits, u, 0.0, 0, 1.0) == 0).all()


def test_what_is_asked_wrongly_is_refused() -> None:
    with pytest.raises(ValueError, match="classes"):
        Transformer(TransformerConfig(class_conditional=True), TEXT)
    with pytest.raises(ValueError, match="label"):
        randomised(IMAGES, class_conditional=True).decoder(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="text"):
        randomised(IMAGES).sample(1, stop="x")
    with pytest.raises(ValueError, match="top_p"):
        randomised(TEXT).sample(1, top_p=0.0)
