"""From what is seen of a pass to attentions: kernels, graphs and operators of every kind, and what the model writes into them."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from multicam import MulticamError, tokens
from multicam.attending.attend import record_attention
from multicam.attending.attention_call import AttentionCall
from multicam.watch.tokens.fused import Scores
from tests.helpers.hygiene import Stop, raising
from tests.helpers.recorded_net import NAMES, Cross, Own, Scripted, net, own_attention, pair


def test_a_part_that_is_called_directly() -> None:
    model = net()
    with record_attention(model) as att:
        model.fused(torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    assert [call.name for call in att] == ["fused#0"]
    assert att[0].inputs() == ({"x"}, {"y"})


@pytest.mark.parametrize("how", ["script", "trace", "script function", "trace function"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_seen(how: str) -> None:
    x = torch.randn(2, 5, 4)
    compile_ = torch.jit.script if how.startswith("script") else lambda f: torch.jit.trace(f, (x,))
    part = compile_(own_attention if how.endswith("function") else Own())
    model = Scripted(part) if isinstance(part, nn.Module) else Scripted(nn.Identity())
    if not isinstance(part, nn.Module):
        model.forward = lambda x: part(x)
    expected = model(x)
    with record_attention(model) as att:
        out = model(x)
    assert torch.equal(out, expected)
    assert att[0].shape == (2, 1, 5, 5)
    torch.testing.assert_close(att[0].probs[:, 0], (x @ x.mT).softmax(-1))


def test_exported_and_traced_graphs_are_seen() -> None:
    model = net()
    exported = torch.export.export(model, pair()).module()
    symbolic = torch.fx.symbolic_trace(Own())
    with record_attention(exported) as att:
        exported(*pair())
    with record_attention(model) as plain:
        model(*pair())
    for call, other in zip(att, plain, strict=True):
        torch.testing.assert_close(call.probs, other.probs)
    with record_attention(symbolic) as att:
        symbolic(torch.randn(2, 5, 4))
    assert att[0].source == "softmax"


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_an_autograd_function_is_seen_and_has_no_gradient() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(x)

    with record_attention(Model()) as att:
        out = att.model(torch.randn(2, 1, 5, 4, requires_grad=True))
    assert att[0].source == "fused"
    with pytest.raises(MulticamError, match=r"no recorded attention has a gradient: .*an autograd.Function's"):
        att.gradients(out.sum())


class Flex(nn.Module):
    def __init__(self, score_mod: Any = None, block_mask: Any = None, **options: Any) -> None:
        super().__init__()
        self.score_mod, self.block_mask, self.options = score_mod, block_mask, options

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (x, y, z))
        return flex_attention(q, k, v, self.score_mod, self.block_mask, **self.options)


SLOPES = torch.tensor([0.5, 0.1, -0.3, 1.0])


def sloped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + SLOPES[h] * (q - k) + 0.1 * b


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def none_at_first(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q > 1) & (k < 4)


@pytest.mark.parametrize(
    ("mod", "mask", "groups", "keep"),
    [
        (None, None, 2, "lazy"),
        (sloped, causal, 1, "lazy"),
        (sloped, none_at_first, 2, "probs"),
        (None, causal, 1, "probs"),
    ],
    ids=["plain", "changed", "dead rows", "causal"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_seen(mod: Any, mask: Any, groups: int, keep: Any) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n, 16 * heads, generator=g) for heads, n in ((4, 5), (4 // groups, 7), (4 // groups, 7))]
    block_mask = None if mask is None else create_block_mask(mask, None, None, 5, 7, device="cpu")
    model = Flex(mod, block_mask, enable_gqa=groups > 1, scale=0.3)
    expected = model(*inputs)
    with record_attention(model, keep=keep) as att:
        out = model(*inputs)
    assert torch.equal(out, expected)
    (call,) = att
    assert (call.source, call.shape, call.mask, att.blind_spots) == ("flex", (2, 4, 5, 7), "a function", [])
    assert call.inputs() == ({"x"}, {"y"})
    torch.testing.assert_close(call.probs @ call.values.repeat_interleave(groups, 1), out, rtol=0, atol=1e-6)
    if mask is none_at_first:
        assert (call.probs[:, :, :2] == 0).all() and (call.probs[..., 4:] == 0).all()


def test_other_operators_of_higher_order_are_blind_spots() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, own_attention, torch.sin, (x,))

    with (
        torch.no_grad(),
        pytest.raises(MulticamError, match="the operator cond, whose inside cannot be seen"),
        record_attention(model := Model()),
    ):
        model(torch.rand(2, 5, 4))


def test_a_function_keeps_what_it_returns_and_nothing_else() -> None:
    model, refs = net(), []

    def reduce(call: AttentionCall) -> tuple[str, Tensor]:
        assert all(ref() is None for ref in refs[:-3]), "what earlier passes made is gone"
        refs.append(weakref.ref(call.values))
        return call.name, call.probs.mean(1)

    with torch.no_grad(), record_attention(model, keep=reduce) as att:
        for _ in range(4):
            model(*pair())
    assert [name for name, _ in att.kept] == NAMES * 4
    assert all(mean.shape[:2] == (2, 5) for _, mean in att.kept)
    with pytest.raises(
        MulticamError,
        match=r"matrices of attention 'fused#0' are gone: only what keep=… returned was kept, in Attention.kept",
    ):
        _ = att[0].probs
    with pytest.raises(MulticamError, match=r"has no gradient: only what keep=… returned was kept"):
        _ = att[0].grad
    gc.collect()
    assert [ref() for ref in refs] == [None] * 12


def test_a_function_that_raises_is_heard() -> None:
    with pytest.raises(Stop), record_attention(model := net(), keep=raising(Stop)):
        model(*pair())


class Overwriting(nn.Module):
    """Writes into what attention is made of, once it has run."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x * scale).unflatten(-1, (2, 4)).transpose(1, 2) for scale in (1, 2, 3))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            p = (q @ k.mT / 2).softmax(-1)
            out = p @ v
            p[..., 0] = 0
        q[:, 0] += 1
        k.view(k.shape).zero_()
        v.copy_(torch.ones_like(v))
        return out


@pytest.mark.parametrize("keep", ["lazy", "probs"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_that_writes_into_what_was_kept(fused: bool, keep: Any, mode: Any) -> None:
    x = torch.randn(2, 3, 8)
    model = Overwriting(fused)
    with mode(), record_attention(model, keep=keep) as att:
        for _ in range(2):
            model(x)
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    for call in att:
        torch.testing.assert_close(call.probs, (heads @ heads.mT).softmax(-1))
        torch.testing.assert_close(call.weights, call.probs)
        assert torch.equal(call.values, heads * 3)


def test_a_native_kernel_is_a_blind_spot() -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            own, out = self.mha, self.mha.out_proj
            given = own.in_proj_weight, own.in_proj_bias, out.weight, out.bias
            return own_attention(torch._native_multi_head_attention(x, x, x, 8, 2, *given)[0])

    with torch.no_grad(), record_attention(Native().eval()) as att:
        att.model(torch.randn(2, 5, 8))
    assert len(att) == 1
    assert [unseen.what for unseen in att.blind_spots] == [
        "the kernel aten::_native_multi_head_attention, whose inside cannot be seen"
    ]


def test_a_kernel_that_drops_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of CUDA do; on the CPU none does."""
    of = Scores.of
    monkeypatch.setattr(Scores, "of", lambda *args: replace(of(*args), dropout=0.5))
    with record_attention(net(Cross, fused=True)) as att:
        out = att.model(torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    with pytest.raises(MulticamError, match=r"has a gradient: the kernel dropped.*\(dropout\); call model\.eval\(\)"):
        att.gradients(out.sum())


def test_attention_under_an_inner_transform_is_seen() -> None:
    class Ensemble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return own_attention(torch.vmap(own_attention)(x))

    x = torch.randn(2, 5, 4)
    with record_attention(Ensemble()) as att:
        out = att.model(x)
    assert torch.equal(out, att.model(x))
    assert [call.shape for call in att] == [(2, 1, 5, 5)] * 2
    torch.testing.assert_close(att[0].probs[:, 0], (x @ x.mT).softmax(-1))


def test_a_layer_that_takes_the_sequence_first_has_no_places() -> None:
    """Its first axis would pass for samples."""
    with torch.no_grad(), record_attention(nn.MultiheadAttention(8, 2)) as att:
        att.model(*[torch.rand(5, 3, 8)] * 3, need_weights=False)
    (call,) = att
    assert call.shape == (3, 2, 5, 5)
    with pytest.raises(MulticamError, match="could not be followed which tokens its queries are"):
        call.dense(call.probs)


class Patched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, batch_first=True)

    def forward(self, photo: Tensor) -> Tensor:
        out: Tensor = self.block(self.patch(photo).flatten(2).mT)
        return out


def test_a_layout_waits_for_the_pass_that_has_its_input() -> None:
    """A part that is called by itself has other inputs than the model, and is not refused what is said of those."""
    model, photo = Patched(), torch.rand(1, 3, 8, 8)
    with record_attention(model, layouts={"photo": tokens(2, 2)}) as att:
        model.block(torch.rand(1, 4, 8))
        model(photo)
    assert [forward.index for forward in att.forwards] == [0, 1]
    with (
        pytest.raises(MulticamError, match="no input in layouts 'foto'; did you mean 'photo'"),
        record_attention(model, layouts={"foto": tokens(2, 2)}),
    ):
        model(photo)
