"""Maps of one attention: whose queries, which heads, which value, laid on which input; and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multicam import MulticamError, tokens
from multicam.attending.attend import attention, record_attention
from multicam.attending.attentions import Attention
from multicam.attending.between import flow_matrix
from multicam.attending.flow import legrad, relevance, rollout


class Joint(nn.Module):
    """Self-attention over a class token, 4 x 4 patches of rgb and 3 x 2 of frequency; then rgb attends to frequency."""

    probs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.frequency = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(1, 8, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.attn, self.cross = Heads(), Heads()
        self.head = nn.Linear(8, 3)

    def forward(self, rgb: Tensor, frequency: Tensor) -> Tensor:
        r, f = (
            rearrange(conv(x), "b c h w -> b (h w) c") for conv, x in ((self.rgb, rgb), (self.frequency, frequency))
        )
        x = torch.cat([self.cls.expand(len(r), -1, -1), r, f], 1)
        x = x + self.attn(x, x)
        return self.head((x[:, 1:17] + self.cross(x[:, 1:17], x[:, 17:])).mean(1))


class Heads(nn.Module):
    num_heads = 2
    probs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h e) -> b h n e", h=2) for t in (self.to_q(x), self.to_k(y), y))
        self.probs = (3 * q @ k.mT).softmax(-1)
        return rearrange(self.probs @ v, "b h n e -> b n (h e)")


@pytest.fixture(scope="module")
def att() -> Attention:
    torch.manual_seed(0)
    with record_attention(model := Joint()) as record:
        record.output = model(torch.randn(2, 3, 8, 8), torch.randn(2, 1, 6, 4))
    return record


def truth(att: Attention) -> Tensor:
    return att.model.attn.probs.detach()


def laid(line: Tensor, h: int, w: int) -> Tensor:
    """Shares `(b h*w)` as a density on an input of patches 2 x 2."""
    return F.interpolate(line.view(-1, 1, h, w) * h * w, scale_factor=2, mode="bilinear")[:, 0]


def test_a_map_is_the_mean_attention_of_the_queries(att: Attention) -> None:
    p = truth(att).mean(1)
    call = att["attn"]
    torch.testing.assert_close(call.heatmap("rgb"), laid(p[:, :, 1:17].mean(1), 4, 4))
    torch.testing.assert_close(call.heatmap("frequency"), laid(p[:, :, 17:].mean(1), 3, 2))
    torch.testing.assert_close(call.heatmap("frequency", of="rgb"), laid(p[:, 1:17, 17:].mean(1), 3, 2))
    torch.testing.assert_close(call.heatmap("rgb", of="frequency"), laid(p[:, 17:, 1:17].mean(1), 4, 4))


def test_the_mean_of_a_map_is_the_share_of_the_input(att: Attention) -> None:
    call, p = att["attn"], truth(att).mean((1, 2))
    shares = {name: call.heatmap(name).mean((1, 2)) for name in ("rgb", "frequency")}
    torch.testing.assert_close(shares["rgb"], p[:, 1:17].sum(1))
    torch.testing.assert_close(shares["rgb"] + shares["frequency"] + p[:, 0], torch.ones(2))
    torch.testing.assert_close(att["cross"].heatmap().mean((1, 2)), torch.ones(2))


@pytest.mark.parametrize(
    ("query", "of", "row"),
    [
        ("cls", None, 0),
        (0, None, 0),
        (5, None, 5),
        (-1, None, 22),
        ((0, 0), "rgb", 1),
        ((3, 5), "rgb", 1 + 4 + 2),
        ((7, 7), "rgb", 16),
        ((7.9, 0.5), "rgb", 13),
        ((0, 0), "frequency", 17),
        ((5, 1), "frequency", 21),
    ],
)
def test_one_query(att: Attention, query: Any, of: str | None, row: int) -> None:
    p = truth(att).mean(1)
    found = att["attn"].heatmap("frequency", query, of=of)
    torch.testing.assert_close(found, laid(p[:, row, 17:], 3, 2))


def test_the_pixel_is_of_the_queries_input_where_there_is_one(att: Attention) -> None:
    p = att.model.cross.probs.detach().mean(1)
    assert att["cross"].inputs()[1] >= {"frequency"}
    torch.testing.assert_close(att["cross"].heatmap("frequency", (2, 6), of="rgb"), laid(p[:, 7], 3, 2))


def test_heads(att: Attention) -> None:
    call, p = att["attn"], truth(att)[:, :, 0, 1:17]
    for heads, expected in ((0, p[:, 0]), (1, p[:, 1]), ([1], p[:, 1]), ([0, 1], p.mean(1)), ("mean", p.mean(1))):
        torch.testing.assert_close(call.heatmap("rgb", "cls", heads=heads), laid(expected, 4, 4))


def test_values(att: Attention) -> None:
    call = att["attn"]
    torch.testing.assert_close(call.heatmap("rgb", value="probs"), call.heatmap("rgb"))
    score = att.output[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, att.model.attn.probs, retain_graph=True)
    att.gradients(score)
    relevance = (gradient * truth(att)).clamp(min=0).mean(1)
    torch.testing.assert_close(call.heatmap("frequency", "cls", value="grad*weights"), laid(relevance[:, 0, 17:], 3, 2))
    torch.testing.assert_close(call.heatmap("rgb", value="grad*weights"), laid(relevance[..., 1:17].mean(1), 4, 4))


def test_what_the_user_says_about_the_tokens() -> None:
    class Shuffled(nn.Module):
        """Takes the patches in an order that it looks up by their values."""

        def __init__(self) -> None:
            super().__init__()
            self.attn = Heads()

        def forward(self, image: Tensor) -> Tensor:
            x = F.unfold(image, 2, stride=2).mT.repeat(1, 1, 2)
            x = torch.fft.fft(torch.cat([x[:, :1], x], 1), dim=1).real
            return self.attn(x, x)

    image = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), record_attention(Shuffled()) as att:
        att.model(image)
    with pytest.raises(
        MulticamError, match=r"no key of attention 'attn#0' stands for input 'image'.*layouts=\{'image': tokens"
    ):
        att[0].heatmap("image")
    with torch.no_grad(), record_attention(att.model, layouts={"image": tokens(4, 4, prefix=1)}) as said:
        att.model(image)
    p = att.model.attn.probs.mean(1)
    torch.testing.assert_close(said[0].heatmap("image"), laid(p[:, :, 1:].mean(1), 4, 4))
    torch.testing.assert_close(said[0].heatmap("image", 3), laid(p[:, 3, 1:], 4, 4))
    with pytest.raises(MulticamError, match=r"with layouts= a query is a number or \"mean\", not 'cls'"):
        said[0].heatmap("image", "cls")
    message = r"no input in layouts 'imag'; did you mean 'image'\?"
    with pytest.raises(MulticamError, match=message), record_attention(att.model, layouts={"imag": tokens(4, 4)}):
        att.model(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"the keys of attention 'attn#0' stand for \['frequency', 'rgb'\]: say which with onto="),
        ({"onto": "rbg"}, r"no input 'rbg'; did you mean 'rgb'\?"),
        ({"onto": "rgb", "of": "depth"}, "no input 'depth'"),
        ({"onto": "rgb", "query": 23}, "attention 'attn#0' has queries 0 to 22, not 23"),
        ({"onto": "rgb", "query": "class"}, r"a query is \"mean\", \"cls\", a number or a pixel \(y, x\), not 'class'"),
        (
            {"onto": "rgb", "query": (1, 1)},
            r"the queries of attention 'attn#0' stand for \['frequency', 'rgb'\]: say whose pixel with of=",
        ),
        ({"onto": "rgb", "query": (8, 0), "of": "rgb"}, r"pixel \(8, 0\) lies outside of input 'rgb' of 8 x 8"),
        ({"onto": "rgb", "query": (0, 4), "of": "frequency"}, r"lies outside of input 'frequency' of 6 x 4"),
        ({"onto": "rgb", "heads": 2}, r"heads is \"mean\", or of 0 to 1, not 2"),
        ({"onto": "rgb", "heads": [0, 5]}, r"or of 0 to 1, not \[0, 5\]"),
        ({"onto": "rgb", "heads": []}, r"or of 0 to 1, not \[\]"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_is_refused(att: Attention, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        att["attn"].heatmap(**arguments)


def test_what_an_attention_does_not_have(att: Attention) -> None:
    cross = att["cross"]
    with pytest.raises(
        MulticamError, match="no query of attention 'cross#0' is the model's own, such as a class token"
    ):
        cross.heatmap("frequency", "cls")
    with pytest.raises(MulticamError, match="attention 'attn#0' has no row of sample 2: its samples are \\[0, 1\\]"):
        att["attn"].dense(att["attn"].probs, 2)
    with pytest.raises(MulticamError, match=r"no attention of 'frequency' to 'depth'|no input 'depth'"):
        att.between("frequency", "depth")
    with record_attention(model := Joint()) as fresh:
        model(torch.randn(1, 3, 8, 8), torch.randn(1, 1, 6, 4))
    with pytest.raises(
        MulticamError, match=r"no gradient of attention 'attn#0' yet: call \.gradients\(score\) of the recording"
    ):
        fresh["attn"].heatmap("rgb", value="grad*weights")


def test_gradients_are_refused_where_there_are_none(att: Attention) -> None:
    model = Joint().requires_grad_(False)
    inputs = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 6, 4)
    with record_attention(model) as frozen:
        out = model(*inputs)
    with pytest.raises(
        MulticamError, match=r"where its parameters are frozen, record with record_attention\(model, gradients=True\)"
    ):
        frozen.gradients(out.sum())
    with pytest.raises(MulticamError, match=r"'attn#0' has no gradient: nothing in front of it requires a gradient"):
        _ = frozen[0].grad
    with record_attention(model, gradients=True) as open_:
        out = model(*inputs)
    open_.gradients(out.sum())
    assert all(call.grad.any() for call in open_)
    assert not any(p.requires_grad for p in model.parameters())


def test_in_words(att: Attention) -> None:
    assert repr(att["attn"]) == (
        "AttentionCall(attn#0, softmax, b heads q k = 2 x 2 x 23 x 23, "
        "1 own + rgb 4 x 4 + frequency 3 x 2 -> 1 own + rgb 4 x 4 + frequency 3 x 2)"
    )
    assert [call.name for call in att.between("rgb", "frequency")] == ["attn#0", "cross#0"]
    table = repr(att).splitlines()
    assert table[0].split() == ["attention", "source", "b", "heads", "q", "k", "queries", "->", "keys"]
    assert len(table) == 3


class Gated(nn.Module):
    """Attention, written out or of a kernel, to the places that are seen; where a query sees none, what comes of it is left out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 2)

    def forward(self, image: Tensor, seen: Tensor) -> Tensor:
        x = self.conv(image).flatten(2).mT
        if self.fused:
            found = F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=seen[:, None])[:, 0]
        else:
            found = (x @ x.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ x
        return self.head((x + found.where(seen.any(2, keepdim=True), 0)).mean(1))


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_queries_that_see_no_key_are_zero_however_attention_is_written(image: Tensor) -> None:
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    seen[0, 1], seen[1, 2:] = False, False
    kernel, written = (attention(Gated(fused).eval(), (image, seen), 0) for fused in (True, False))
    assert not written[0].probs[0, 0, 1].any() and not written[0].weights[1, 0, 2:].any()
    for ask in (
        lambda att: att[0].probs,
        lambda att: att[0].heatmap(value="grad*weights"),
        lambda att: att[0].heatmap(query="mean"),
        lambda att: relevance(att).matrix(1),
        lambda att: rollout(att).matrix(0),
        lambda att: legrad(att)["image"],
        lambda att: flow_matrix(att).shares,
    ):
        found = ask(written)
        assert found.isfinite().all() and found.any()
        torch.testing.assert_close(found, ask(kernel), rtol=1e-4, atol=1e-6)


def test_a_sample_of_which_no_query_sees_a_key_is_refused(image: Tensor) -> None:
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    seen[1] = False
    att = attention(Gated(False).eval(), (image, seen), 0)
    for ask in (
        lambda: att[0].probs,
        lambda: att[0].heatmap(),
        lambda: rollout(att),
        lambda: relevance(att),
        lambda: flow_matrix(att),
    ):
        with pytest.raises(
            MulticamError, match=r"attention '#0' is NaN or infinite in sample 1: .* leave that attention out"
        ):
            ask()


def test_attention_to_what_is_nan_is_refused(image: Tensor) -> None:
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    broken = image.clone()
    broken[1, 0, 0, 0] = torch.nan
    for fused in (True, False):
        att = attention(Gated(fused).eval(), (broken, seen))
        with pytest.raises(MulticamError, match="attention '#0' is NaN or infinite in sample 1"):
            rollout(att)
        with pytest.raises(MulticamError, match="the score of sample 1 is NaN: input 'image' holds NaN in sample 1"):
            attention(Gated(fused).eval(), (broken, seen), 0)
    with record_attention(Gated(False), gradients=True) as recorded:
        scores = recorded.model(image, seen)
    with pytest.raises(MulticamError, match="the score is NaN, so nothing tells what it depends on"):
        recorded.gradients(scores[:, 0] * torch.tensor([1.0, torch.nan]))


def test_a_gradient_of_attention_that_is_not_finite_is_refused(image: Tensor) -> None:
    att = attention(Gated(False).eval(), (image, torch.ones(2, 4, 4, dtype=torch.bool)), Root())
    with pytest.raises(MulticamError, match="the gradient of the score by the probabilities of attention '#0' is"):
        relevance(att)


class Root:
    """A score that is zero, and has no finite slope there."""

    def __call__(self, output: Tensor) -> Tensor:
        return (output[:, 0] - output[:, 0].detach()).abs().sqrt()
