"""Probabilities of fused kernels: with the values they make what the kernel returned."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from multicam.attending.attend import record_attention
from multicam.attending.attentions import Attention
from multicam.watch.tokens.fused import Scores, shared


class Sdpa(nn.Module):
    """One call of scaled_dot_product_attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(
    *lead: int,
    q: int = 5,
    k: int = 7,
    e: int = 8,
    ev: int = 8,
    kv: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(q + 10 * k)
    shapes = ((*lead, q, e), (*(kv or lead), k, e), (*(kv or lead), k, ev))
    return tuple((2 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for shape in shapes)


def recorded(x: tuple[Tensor, ...], heads: int = 0, **options: Any) -> tuple[Attention, Tensor]:
    model = Sdpa(**options)
    if heads:
        model.num_heads = heads
    with record_attention(model) as att:
        out = model(*x)
    assert torch.equal(out, model(*x)) or options.get("dropout_p"), "the model's own kernel runs"
    return att, out


def explicit(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """`softmax(scale q k^T + mask)` in float64, with rows of zeros where no key is seen."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.ndim == 4 and q.shape[1] != k.shape[1] else k
    s = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        s = s.where(torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None], -torch.inf)
    if mask is not None:
        s = s.where(mask, -torch.inf) if mask.dtype == torch.bool else s + mask.double()
    return s.softmax(-1).nan_to_num()


KEPT = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
DEAD = KEPT.clone().index_fill(0, torch.tensor([1, 3]), False)
BIAS = torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(1))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": KEPT},
    "bool mask of keys": {"attn_mask": KEPT[:1]},
    "bool mask of samples": {"attn_mask": KEPT[None, None].expand(2, 1, -1, -1)},
    "dead rows": {"attn_mask": DEAD},
    "float mask": {"attn_mask": BIAS},
    "float mask of heads": {"attn_mask": BIAS[:1].expand(1, 4, -1, -1)},
    "infinite mask": {"attn_mask": torch.zeros(5, 7).masked_fill(~KEPT, -torch.inf)},
    "infinite dead rows": {"attn_mask": torch.zeros(5, 7).masked_fill(~DEAD, -torch.inf)},
    "least number": {"attn_mask": torch.zeros(5, 7).masked_fill(~KEPT, torch.finfo(torch.float32).min)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "scale and mask": {"scale": 1.5, "attn_mask": BIAS},
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_probabilities_times_values_are_the_output(name: str, dtype: torch.dtype) -> None:
    options = dict(OPTIONS[name])
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        least = torch.finfo(dtype).min
        options["attn_mask"] = mask = mask.double().clamp(min=least).where(mask > -torch.inf, mask).to(dtype)
    q, k, v = qkv(2, 4, dtype=dtype)
    att, out = recorded((q, k, v), **options)
    (call,) = att
    assert call.shape == (2, 4, 5, 7)
    assert call.has_keys and call.softmax_over == "keys"
    expected = explicit(q, k, mask, options.get("is_causal", False), options.get("scale"))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(call.probs.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(call.probs.to(v.dtype) @ v, out, rtol=0, atol=4 * tolerance)
    assert torch.equal(call.weights, call.probs)
    g = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    att.gradients((out * g).sum())
    torch.testing.assert_close(call.grad.double(), g.double() @ v.double().mT, rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=lambda b: b.name)
def test_every_kernel_of_this_device(backend: SDPBackend, name: str) -> None:
    q, k, v = qkv(2, 4)
    with sdpa_kernel(backend):
        att, out = recorded((q, k, v), **OPTIONS[name])
    assert att[0].source == ("softmax" if backend == SDPBackend.MATH else "fused")
    torch.testing.assert_close(att[0].probs @ v, out, rtol=0, atol=1e-5)
    att.gradients(out.sum())
    expected = torch.ones_like(out) @ v.mT
    torch.testing.assert_close(att[0].grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "options", "source", "shape"),
    [
        (qkv(2, 4, q=7, k=5), {"is_causal": True}, "fused", (2, 4, 7, 5)),
        (qkv(2, 4, q=3, k=9), {"is_causal": True}, "fused", (2, 4, 3, 9)),
        (qkv(2, 6, kv=(2, 2)), {"enable_gqa": True}, "fused", (2, 6, 5, 7)),
        (qkv(2, 6, kv=(2, 1)), {"enable_gqa": True, "is_causal": True}, "fused", (2, 6, 5, 7)),
        (qkv(2, 4, ev=3), {}, "softmax", (2, 4, 5, 7)),
        (qkv(2), {}, "fused", (2, 1, 5, 7)),
        (qkv(), {}, "softmax", (1, 1, 5, 7)),
        (qkv(2, 3, 4), {}, "softmax", (6, 4, 5, 7)),
        (qkv(2, 4, kv=(1, 1)), {}, "softmax", (2, 4, 5, 7)),
        (qkv(1, 1, q=1, k=1, e=1, ev=1), {}, "fused", (1, 1, 1, 1)),
        (qkv(3, 2, q=1), {}, "fused", (3, 2, 1, 7)),
    ],
    ids=["causal long", "causal short", "grouped", "one key head", "wide values", "3-D", "2-D", "5-D", "broadcast", "ones", "one query"],
)  # fmt: skip
def test_other_shapes(x: tuple[Tensor, ...], options: dict[str, Any], source: str, shape: tuple[int, ...]) -> None:
    att, out = recorded(x, shape[1], **options)
    (call,) = att
    q, k, v = x
    assert call.source == source
    assert call.shape == shape
    expected = explicit(q, k, None, options.get("is_causal", False), None)
    torch.testing.assert_close(call.probs.double().view(expected.shape), expected, rtol=0, atol=3e-6)
    att.gradients(out.sum())
    wide = v.repeat_interleave(shape[1] // v.shape[1], 1) if options.get("enable_gqa") else v
    torch.testing.assert_close(call.grad.view(expected.shape), torch.ones_like(out) @ wide.mT, rtol=0, atol=1e-5)


class Folded(nn.Module):
    """Self-attention with the heads folded into the batch, which the kernel takes for heads."""

    num_heads = 2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return out.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_where_the_kernel_has_heads(masked: bool) -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.randn(6, 5, 5) if masked else None
    model = Folded()
    with record_attention(model) as att:
        out = model(x, mask) + x
    (call,) = att
    assert (call.source, call.shape) == ("fused", (3, 2, 5, 5))
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    expected = explicit(q, q, None if mask is None else mask.view(3, 2, 5, 5), False, None)
    torch.testing.assert_close(call.probs.double(), expected, rtol=0, atol=1e-6)
    assert call.samples().tolist() == [[i] * 5 for i in range(3)]
    assert call.inputs() == ({"x"}, {"x"})
    att.gradients(out.sum())
    torch.testing.assert_close(call.grad, torch.ones_like(q) @ q.mT)


@settings(deadline=None, max_examples=60)
@given(*[st.integers(1, 5)] * 6, st.booleans(), st.sampled_from(["none", "bool", "float"]))
def test_scores_of_any_size(b: int, groups: int, kv: int, q: int, k: int, e: int, causal: bool, mask: str) -> None:
    x = qkv(b, groups * kv, q=q, k=k, e=e, ev=e, kv=(b, kv))
    bias = None if mask == "none" or causal else torch.randn(q, k)
    bias = bias > 0 if mask == "bool" and bias is not None else bias
    att, out = recorded(x, enable_gqa=True, is_causal=causal, attn_mask=bias)
    torch.testing.assert_close(att[0].probs @ shared(x[2], groups * kv), out, rtol=0, atol=1e-5)
    assert att[0].shape == (b, groups * kv, q, k)


def test_dropout_keeps_the_softmax_and_has_no_gradient_in_a_fused_kernel() -> None:
    q, k, v = qkv(2, 4)
    torch.manual_seed(3)
    plain = Sdpa(dropout_p=0.5)(q, k, v)
    torch.manual_seed(3)
    att, out = recorded((q, k, v), dropout_p=0.5)
    assert torch.equal(out, plain)
    (call,) = att
    assert call.source == "softmax", "on the CPU dropout is done in the open"
    torch.testing.assert_close(call.probs.double(), explicit(q, k, None, False, None), rtol=0, atol=1e-6)
    torch.testing.assert_close(call.weights @ v, out)
    assert 0.2 < (call.weights == 0).float().mean() < 0.8


def test_arguments_of_every_kernel_are_read_by_name() -> None:
    q, k, v = (x.detach() for x in qkv(2, 4))
    bias = BIAS.expand(2, 4, 5, 7)
    aten = torch.ops.aten
    for func, args, kwargs, expected in (
        (
            aten._scaled_dot_product_flash_attention_for_cpu,
            (q, k, v, 0.0, True),
            {"scale": 0.5},
            (None, True, 0.5, 0.0),
        ),
        (aten._scaled_dot_product_flash_attention_for_cpu, (q, k, v), {"attn_mask": bias}, (bias, False, None, 0.0)),
        (aten._scaled_dot_product_flash_attention, (q, k, v, 0.1, True), {}, (None, True, None, 0.1)),
        (aten._scaled_dot_product_efficient_attention, (q, k, v, bias, False), {"scale": 2.0}, (bias, False, 2.0, 0.0)),
        (aten._scaled_dot_product_cudnn_attention, (q, k, v, bias, False, 0.2, True), {}, (bias, True, None, 0.2)),
        (aten._scaled_dot_product_fused_attention_overrideable, (q, k, v, bias, 0.3), {}, (bias, False, None, 0.3)),
    ):
        scores = Scores.of(func.default, args, kwargs)
        mask, causal, scale, dropout = expected
        assert (scores.causal, scores.scale, scores.dropout) == (causal, scale, dropout)
        assert scores.mask is None if mask is None else torch.equal(scores.mask, mask)
        torch.testing.assert_close(scores.probs().double(), explicit(q, k, mask, causal, scale), rtol=0, atol=3e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", list(SDPBackend.__members__.values())[1:5], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_of_cuda(backend: SDPBackend, dtype: torch.dtype) -> None:
    q, k, v = (x.detach().cuda().requires_grad_() for x in qkv(2, 4, dtype=dtype))
    with sdpa_kernel(backend):
        att, out = recorded((q, k, v))
    assert att[0].source == ("softmax" if backend == SDPBackend.MATH else "fused")
    torch.testing.assert_close(att[0].probs.to(dtype) @ v, out, rtol=0, atol=4 * TOLERANCES[dtype])
    att.gradients(out.sum())
    torch.testing.assert_close(att[0].grad.to(dtype), torch.ones_like(out) @ v.mT, rtol=0, atol=20 * TOLERANCES[dtype])


def test_shared_heads() -> None:
    x = torch.arange(6.0).view(1, 3, 2, 1)
    assert shared(x, 3) is x
    assert shared(x, 6)[0, :, 0, 0].tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, "none"),
        ({"is_causal": True}, "causal"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, "(5, 7)"),
        ({"attn_mask": torch.zeros(2, 1, 5, 7)}, "(2, 1, 5, 7)"),
    ],
    ids=["none", "causal", "bool", "float"],
)
def test_the_mask_is_said_in_words(options: dict[str, Any], mask: str) -> None:
    att, _ = recorded(qkv(2, 3), **options)
    assert att[0].mask == mask
    assert att[0].dropout == 0
