"""Attention as people write it out: found, with the model's own probabilities, their gradients and their tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import einops
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multicam import MulticamError
from multicam.attending.attend import record_attention
from multicam.attending.attentions import Attention

Laid = Callable[[Tensor], Tensor]


@dataclass
class Truth:
    """What a spelling computed.

    Attributes:
        out: Its result `(b heads q e)`.
        probs: What its softmax returned.
        lay: From the shape of `probs` to `(b heads q k)`.
        weights: What multiplied the values `(b heads q k)`; None: the probabilities.
        tokens: The sample, the queries and the keys of each row of the batch, where they are not all; -1 for no token.
        q_known: Whether the queries can be followed.
    """

    out: Tensor
    probs: Tensor
    lay: Laid = lambda p: p
    weights: Tensor | None = None
    tokens: list[tuple[int, list[int], list[int]]] | None = None
    q_known: bool = True


Spelling = Callable[["Written", Tensor, Tensor, Tensor], Truth]
SPELLINGS: dict[str, Spelling] = {}


def spelling(function: Spelling) -> Spelling:
    SPELLINGS[function.__name__] = function
    return function


class Written(nn.Module):
    """Cross-attention of x to y in some spelling."""

    truth: Truth

    def __init__(self, spell: Spelling, heads: int = 2, e: int = 3, n: int = 9) -> None:
        super().__init__()
        self.spell, self.heads = spell, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, heads * e) for _ in range(3))
        self.before, self.after = nn.Linear(heads, heads, bias=False), nn.Linear(heads, heads, bias=False)
        self.mixing = nn.Conv2d(heads, heads, 1)
        self.vector = nn.Linear(e, 1, bias=False)
        self.relative = nn.Parameter(torch.randn(n, e))
        self.sinks = nn.Parameter(torch.randn(heads))
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Linear(heads * e, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(z), "b n (h e) -> b h n e", h=self.heads)
            for layer, z in ((self.to_q, x), (self.to_k, y), (self.to_v, y))
        )
        self.truth = self.spell(self, q, k, v)
        return self.out(rearrange(self.truth.out, "b h n e -> b n (h e)"))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


@spelling
def matmul(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    return Truth(p @ v, p)


@spelling
def einsum(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = torch.einsum("bhie,bhje->bhij", q, k).softmax(-1)
    return Truth(torch.einsum("bhij,bhje->bhie", p, v), p)


@spelling
def einsum_with_heads_last(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    q, k, v = (rearrange(x, "b h n e -> b n h e") for x in (q, k, v))
    p = torch.einsum("bqhe,bkhe->bhqk", q, k).softmax(-1)
    return Truth(torch.einsum("bhqk,bkhe->bqhe", p, v).transpose(1, 2), p)


@spelling
def einsum_to_odd_order(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = torch.einsum("bhqe,bhke->bqkh", q, k).softmax(2)
    return Truth(torch.einsum("bqkh,bhke->bhqe", p, v), p, lambda p: rearrange(p, "b q k h -> b h q k"))


@spelling
def einops_folded(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    b, heads = q.shape[:2]
    q, k, v = (rearrange(x, "b h n e -> (b h) n e") for x in (q, k, v))
    p = einops.einsum(q, k, "n i e, n j e -> n i j").softmax(-1)
    out = rearrange(einops.einsum(p, v, "n i j, n j e -> n i e"), "(b h) n e -> b h n e", b=b)
    return Truth(out, p, lambda p: p.unflatten(0, (b, heads)))


@spelling
def einops_einsum(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = einops.einsum(q, k, "b h i e, b h j e -> b h i j").softmax(-1)
    return Truth(einops.einsum(p, v, "b h i j, b h j e -> b h i e"), p)


@spelling
def baddbmm(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    b = len(q)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    empty = torch.empty(len(flat[0]), q.shape[2], k.shape[2])
    p = torch.baddbmm(empty, flat[0], flat[1].mT, beta=0, alpha=0.5).softmax(-1)
    return Truth((p @ flat[2]).unflatten(0, (b, -1)), p, lambda p: p.unflatten(0, (b, -1)))


@spelling
def masked(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    keep = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]
    s = scores(q, k).masked_fill(~keep, -torch.inf) + torch.zeros(q.shape[2], k.shape[2])
    p = torch.where(keep, s, torch.finfo(s.dtype).min).softmax(-1)
    return Truth(p @ v, p)


@spelling
def softmax_in_another_dtype(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = F.softmax(scores(q, k), dim=-1, dtype=torch.float64)
    p32 = p.to(q.dtype)
    return Truth(p32 @ v, p)


@spelling
def dropped(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    w = F.dropout(p, 0.5)
    return Truth(w @ v, p, weights=w)


@spelling
def keys_first(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = (k @ q.mT).softmax(-2)
    return Truth(p.mT @ v, p, lambda p: p.mT)


@spelling
def keys_first_turned(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = (k @ q.mT).mT.softmax(-1)
    return Truth(p @ v, p)


@spelling
def sagan(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Self-attention of SAGAN: values (c n) times the turned map."""
    b = len(q)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    p = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    out = torch.bmm(v.transpose(1, 2).contiguous(), p.transpose(1, 2))
    return Truth(out.mT.unflatten(0, (b, -1)), p, lambda p: p.unflatten(0, (b, -1)))


@spelling
def nonlocal_block(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Values times a map with keys first, both in channels-first order."""
    p = (k @ q.mT).softmax(-2)
    return Truth((v.mT @ p).mT, p, lambda p: p.mT)


@spelling
def slots(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = (k @ q.mT).softmax(-1) + 1e-8
    w = p / p.sum(-2, keepdim=True)
    return Truth(w.mT @ v, p, lambda p: p.mT, w.mT)


@spelling
def talking_heads_by_einsum(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = torch.einsum("bhqk,hg->bgqk", scores(q, k), m.before.weight).softmax(-1)
    w = torch.einsum("bhqk,hg->bgqk", p, m.after.weight)
    return Truth(w @ v, p, weights=w)


@spelling
def talking_heads_by_conv(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = m.mixing(scores(q, k)).softmax(-1)
    w = m.mixing(p)
    return Truth(w @ v, p, weights=w)


@spelling
def talking_heads_by_linear(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = m.before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    w = m.after(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return Truth(w @ v, p, weights=w)


@spelling
def talking_heads_before(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = m.mixing(scores(q, k)).softmax(-1)
    return Truth(p @ v, p)


@spelling
def cosine(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.scale.clamp(max=4.6).exp()).softmax(-1)
    return Truth(p @ v, p)


@spelling
def exponentials(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    s = scores(q, k)
    s = (s - s.amax(-1, keepdim=True)).exp()
    p = s / s.sum(-1, keepdim=True)
    return Truth(p @ v, p)


@spelling
def logarithms(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).log_softmax(-1).exp()
    return Truth(p @ v, p)


@spelling
def top_k_masked(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    s = scores(q, k)
    least = s.topk(min(2, s.shape[-1]), dim=-1).values[..., -1:]
    p = s.masked_fill(s < least, -torch.inf).softmax(-1)
    return Truth(p @ v, p)


@spelling
def top_k_scattered(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    s = scores(q, k)
    most, index = s.topk(min(2, s.shape[-1]), dim=-1)
    p = torch.full_like(s, -torch.inf).scatter(-1, index, most).softmax(-1)
    return Truth(p @ v, p)


@spelling
def scores_in_place(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    s = q @ k.mT
    s *= 0.5
    s += torch.zeros_like(s[:1, :1])
    s.masked_fill_(torch.zeros(s.shape[-2:], dtype=torch.bool), -1e9)
    p = s.softmax(-1)
    return Truth(p @ v, p)


@spelling
def softmax_one(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """A score of zero beside the keys: a query may look at nothing."""
    p = F.pad(scores(q, k), (0, 1)).softmax(-1)
    w = p[..., :-1]
    return Truth(w @ v, p, lambda p: p[..., :-1], w)


@spelling
def attention_sinks(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """A learned score beside the keys, one for each head."""
    sinks = repeat(m.sinks, "h -> b h q 1", b=len(q), q=q.shape[2])
    p = torch.cat([scores(q, k), sinks], dim=-1).softmax(-1)
    w = p[..., :-1]
    return Truth(w @ v, p, lambda p: p[..., :-1], w)


@spelling
def relative_bias(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """A second product of the queries, with embeddings of positions."""
    p = (scores(q, k) + q @ m.relative[: k.shape[2]].mT).softmax(-1)
    return Truth(p @ v, p)


@spelling
def relative_bias_first(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = (torch.einsum("bhqe,ke->bhqk", q, m.relative[: k.shape[2]]) + scores(q, k)).softmax(-1)
    return Truth(p @ v, p)


@spelling
def five_axes(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    q, k, v = (x[:, None] for x in (q, k, v))
    p = scores(q, k).softmax(-1)
    return Truth((p @ v)[:, 0], p, lambda p: p[:, 0])


@spelling
def head_by_head(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    out = []
    for i in range(q.shape[1]):
        p = scores(q[:, i], k[:, i]).softmax(-1)
        out.append(p @ v[:, i])
    return Truth(torch.stack(out, 1), p, lambda p: p[:, None])


@spelling
def renormalised(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    w = p * torch.linspace(0.5, 1, k.shape[2])
    w = w / w.sum(-1, keepdim=True)
    return Truth(w @ v, p, weights=w)


@spelling
def normalised_after(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Of a column of ones beside the values comes the sum."""
    p = scores(q, k).softmax(-1)
    out = p @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return Truth(out[..., :-1] / out[..., -1:], p)


@spelling
def probabilities_in_place(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    w = p + 0
    w.mul_(0.5).add_(0.1)
    w[..., 0] = 0
    return Truth(w @ v, p, weights=w)


@spelling
def sinks_with_empty_values(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """The extra column stays, and its value is zero."""
    p = F.pad(scores(q, k), (1, 0)).softmax(-1)
    tokens = [(i, [*range(q.shape[2])], [-1, *range(k.shape[2])]) for i in range(len(q))]
    return Truth(p @ F.pad(v, (0, 0, 1, 0)), p, tokens=tokens)


@spelling
def heads_stacked(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = torch.stack([scores(q[:, i], k[:, i]) for i in range(q.shape[1])], 1).softmax(-1)
    return Truth(p @ v, p, q_known=False)


@spelling
def heads_apart(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """One product for all heads, one with the values for each; the last is looked at."""
    p = scores(q, k).softmax(-1)
    out = torch.stack([p[:, i] @ v[:, i] for i in range(q.shape[1])], 1)
    return Truth(out, p, lambda p: p[:, -1:])


@spelling
def keys_gathered(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Each query has keys of its own, here all of them."""
    k, v = (repeat(x, "b h k e -> b h q k e", q=q.shape[2]) for x in (k, v))
    p = torch.einsum("bhqe,bhqke->bhqk", q, k).softmax(-1)
    tokens = [(i, [j], [*range(k.shape[3])]) for i in range(len(q)) for j in range(q.shape[2])]
    return Truth(
        torch.einsum("bhqk,bhqke->bhqe", p, v), p, lambda p: rearrange(p, "b h q k -> (b q) h 1 k"), tokens=tokens
    )


@spelling
def additive(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = m.vector((q[..., :, None, :] + k[..., None, :, :]).tanh()).squeeze(-1).softmax(-1)
    return Truth(p @ v, p, q_known=False)


@spelling
def queries_in_chunks(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    first, rest = p[:, :, :1], p[:, :, 1:]
    return Truth(
        torch.cat([first @ v, rest @ v], 2),
        p,
        lambda p: p[:, :, 1:],
        tokens=[(i, [*range(1, q.shape[2])], [*range(k.shape[2])]) for i in range(len(q))],
    )


@spelling
def keys_in_chunks(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    p = scores(q, k).softmax(-1)
    out = p[..., :1] @ v[..., :1, :] + p[..., 1:] @ v[..., 1:, :]
    return Truth(
        out, p, lambda p: p[..., 1:], tokens=[(i, [*range(q.shape[2])], [*range(1, k.shape[2])]) for i in range(len(q))]
    )


@spelling
def scores_side_by_side(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Two groups of keys, one softmax."""
    p = torch.cat([scores(q, k[:, :, :2]), scores(q, k[:, :, 2:])], -1).softmax(-1)
    return Truth(p @ v, p)


@spelling
def local_padded(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """Probabilities over some keys only, laid among zeros."""
    p = scores(q, k)[..., 1:-1].softmax(-1)
    w = F.pad(p, (1, 1))
    return Truth(w @ v, p, lambda p: F.pad(p, (1, 1)))


@spelling
def a_query_put_in_front(m: Written, q: Tensor, k: Tensor, v: Tensor) -> Truth:
    """One that looks at nothing, which is cut off again."""
    p = scores(q, k).softmax(-1)
    tokens = [(i, [-1, *range(q.shape[2])], [*range(k.shape[2])]) for i in range(len(q))]
    w = F.pad(p, (0, 0, 1, 0))
    return Truth((w @ v)[:, :, 1:], p, lambda p: F.pad(p, (0, 0, 1, 0)), tokens=tokens)


def recorded(model: nn.Module, *inputs: Tensor) -> tuple[Attention, Tensor]:
    with record_attention(model) as att:
        out = model(*inputs)
    return att, out


def pair(b: int = 2, q: int = 3, k: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b * 100 + q * 10 + k)
    return torch.randn(b, q, 4, generator=g), torch.randn(b, k, 4, generator=g)


def check(model: Written, x: Tensor, y: Tensor) -> None:
    torch.manual_seed(5)
    plain = model(x, y)
    torch.manual_seed(5)
    att, out = recorded(model, x, y)
    truth = model.truth
    assert torch.equal(out, plain), "the model's own kernels run"
    call = att[-1]
    probs = truth.lay(truth.probs)
    weights = probs if truth.weights is None else truth.weights
    torch.testing.assert_close(call.probs, probs, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(call.weights, weights, rtol=0, atol=1e-6, check_dtype=False)
    assert call.shape == tuple(weights.shape)
    score = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
    (gradient,) = torch.autograd.grad(score, truth.probs, retain_graph=True)
    att.gradients(score)
    torch.testing.assert_close(call.grad, truth.lay(gradient), rtol=1e-5, atol=1e-6, check_dtype=False)
    assert call.inputs() == ({"x"} if truth.q_known else set(), {"y"}), call.describe()
    tokens = truth.tokens or [(i, [*range(x.shape[1])], [*range(y.shape[1])]) for i in range(len(x))]
    places = call.forward.places
    for row, column, (sample, queries, keys) in zip(call.rows, call.columns, tokens, strict=True):
        for ids, numbers, n in ((row, queries, x.shape[1]), (column, keys, y.shape[1])):
            if ids is column or truth.q_known:
                first = (places.boxes[ids, 2] * n).round()
                assert first.where(ids > 0, -1).tolist() == numbers, "tokens are counted in order"
            assert places.sample[ids][ids > 0].unique().tolist() == [sample]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_found(name: str) -> None:
    check(Written(SPELLINGS[name]), *pair())


einsums = {"einsum", "einsum_with_heads_last", "einsum_to_odd_order", "einops_folded", "einops_einsum", "keys_gathered"}
turned = {"keys_first", "keys_first_turned", "nonlocal_block", "slots"}
sums = {"exponentials", "logarithms"}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(SPELLINGS)), *[st.integers(1, 4)] * 5)
def test_sizes_may_be_equal_or_one(name: str, b: int, heads: int, q: int, k: int, e: int) -> None:
    """Of sizes of one, einsum makes multiplications, which are no products of matrices; one key has nothing that sums to one."""
    assume((e > 1 and k > 1) or name not in einsums)
    assume(k > 1 or name not in sums)
    assume(q * k > 1 or name not in turned)
    assume(q > 1 or name != "queries_in_chunks")
    assume(k > {"keys_in_chunks": 1, "scores_side_by_side": 2, "local_padded": 2}.get(name, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check(Written(SPELLINGS[name], heads, e), *pair(b, q, k))


class Plain(nn.Module):
    """A function as a module with one linear layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def test_without_heads_and_without_a_batch() -> None:
    def one_head(m: Plain, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    model = Plain(one_head)
    for x, shape in ((torch.randn(2, 5, 4), (2, 1, 5, 5)), (torch.randn(5, 4), (1, 1, 5, 5))):
        att, out = recorded(model, x)
        assert att[0].shape == shape and att[0].has_keys
        z = model.layer(x)
        assert torch.equal(att[0].probs.view(-1, 5, 5), (z @ z.mT).softmax(-1).view(-1, 5, 5))
        att.gradients(out.sum())
        torch.testing.assert_close(
            att[0].grad.view(-1, 5, 5), torch.ones_like(z) @ z.mT if x.ndim == 3 else (torch.ones_like(z) @ z.mT)[None]
        )


def test_probabilities_used_twice_are_two_attentions() -> None:
    def twice(m: Plain, x: Tensor) -> Tensor:
        p = (x @ x.mT).softmax(-1)
        m.p = p
        return p @ (p @ x)

    model = Plain(twice)
    att, out = recorded(model, torch.randn(2, 5, 4))
    assert [call.name for call in att] == ["#0", "#1"]
    assert torch.equal(att[0].probs, att[1].probs)
    att.gradients(out.square().sum())
    (gradient,) = torch.autograd.grad(out.square().sum(), model.p)
    assert torch.equal(att[0].grad[:, 0], gradient)


def test_probabilities_that_are_written_into_are_those_of_the_softmax() -> None:
    def zeroed(m: Plain, x: Tensor) -> Tensor:
        p = (x @ x.mT).softmax(-1)
        m.p = p.clone()
        p[..., 0] = 0
        p.mul_(2)
        return p @ x

    model = Plain(zeroed)
    with torch.no_grad():
        att, _ = recorded(model, torch.randn(2, 5, 4))
    (call,) = att
    assert torch.equal(call.probs[:, 0], model.p)
    assert torch.equal(call.weights[:, 0, :, 1:], 2 * model.p[..., 1:])
    assert (call.weights[..., 0] == 0).all()


def sigmoid_attention(m: Plain, x: Tensor) -> Tensor:
    return (x @ x.mT).sigmoid() @ x


def linear_attention(m: Plain, x: Tensor) -> Tensor:
    features = F.elu(x) + 1
    return features @ (features.mT @ x) / (features @ features.sum(1)[..., None])


def multiplied_and_summed(m: Plain, x: Tensor) -> Tensor:
    return ((x @ x.mT).softmax(-1)[..., None] * x[..., None, :, :]).sum(-2)


def routing(m: Plain, x: Tensor) -> Tensor:
    gates = (x @ m.experts[:, 0].mT).softmax(-1)
    return sum(gates[..., i : i + 1] * (x @ w) for i, w in enumerate(m.experts))


def classifier(m: Plain, x: Tensor) -> Tensor:
    return x.mean(1).softmax(-1)


def soft_codes(m: Plain, x: Tensor) -> Tensor:
    codes = m.experts[0]
    return (x @ codes.mT).softmax(-1) @ codes


def nearest_codes(m: Plain, x: Tensor) -> Tensor:
    codes = m.experts.flatten(0, 1)
    return codes[torch.cdist(x, codes).argmin(-1)]


def gram(m: Plain, x: Tensor) -> Tensor:
    return (x @ x.mT) @ x


def gated(m: Plain, x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True).softmax(-1)


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (sigmoid_attention, r"weights \(2, 5, 5\) that do not sum to one"),
        (linear_attention, ""),
        (multiplied_and_summed, r"softmax \(2, 5, 5\) whose result multiplies no values"),
        (routing, r"softmax \(2, 5, 3\) whose result multiplies no values"),
        (classifier, r"softmax \(2, 4\) whose result multiplies no values"),
        (soft_codes, r"softmax \(2, 5, 4\) whose result multiplies no values"),
        (nearest_codes, ""),
        (gram, ""),
        (gated, r"softmax \(2, 1, 4\) whose result multiplies no values"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_no_attention_is_said_to_be_none(function: Callable[..., Tensor], seen: str) -> None:
    with pytest.raises(MulticamError, match="Plain ran no attention that could be seen") as caught:
        recorded(Plain(function), torch.randn(2, 5, 4))
    assert bool(seen) == ("what looked like it" in str(caught.value))
    caught.match(seen)


def mixture_by_product(m: Plain, x: Tensor) -> Tensor:
    gates = (x @ m.experts[:, 0].mT).softmax(-1)
    return torch.einsum("bne,bned->bnd", gates, torch.stack([x @ w for w in m.experts], 2))


def efficient_attention(m: Plain, x: Tensor) -> Tensor:
    return x.softmax(-1) @ (x.softmax(-2).mT @ x)


def context_pooling(m: Plain, x: Tensor) -> Tensor:
    return x + x[..., :1].softmax(1).mT @ x


@pytest.mark.parametrize("function", [mixture_by_product, efficient_attention, context_pooling])
def test_averages_by_a_softmax_that_had_no_keys_say_so(function: Callable[..., Tensor]) -> None:
    att, _ = recorded(Plain(function), torch.randn(2, 5, 4))
    assert [call.has_keys for call in att] == [False] * len(att)


def test_attention_beside_other_softmaxes() -> None:
    def both(m: Plain, x: Tensor) -> Tensor:
        return classifier(m, (x @ x.mT).softmax(-1) @ x) + gated(m, sigmoid_attention(m, x)).mean(1)

    att, _ = recorded(Plain(both), torch.randn(2, 5, 4))
    assert len(att) == 1
    assert [unseen.what.split(" whose")[0] for unseen in att.skipped] == [
        "softmax (2, 4)",
        "softmax (2, 1, 4)",
        "weights (2, 5, 5) that do not sum to one",
    ]
