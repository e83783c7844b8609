"""Layouts that people write and that are easily taken for others: each is read right, or refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

import multicam
from multicam import Inputs, MulticamError, record_attention
from multicam.attending.attentions import Attention


def attention(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Attention:
    """What is attended to; and a plain pass, which leaves in the model what it keeps, as an explanation puts that back."""
    found = multicam.attention(model, inputs, *args, **kwargs)
    with torch.no_grad():
        Inputs.of(inputs).run(model)
    return found


class Patches(nn.Module):
    """4 x 4 tokens of an image of 32 px; `P` is what a model made of them."""

    P: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.qkv = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24)

    def tokens(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mT


def laid(p: Tensor) -> Tensor:
    return F.interpolate(p.view(1, 1, 4, 4) * 16, (32, 32), mode="bilinear")[0, 0]


def photo(batch: int = 1) -> Tensor:
    return 3 * torch.randn(batch, 3, 32, 32)


class Cached(Patches):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, 20, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.tokens(x)).view(1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        self.cache[:, :, :16] = k
        self.P = (q @ k.mT / 2).softmax(-1)
        return F.scaled_dot_product_attention(q, self.cache[:, :, :16], v)


def test_keys_in_a_cache_are_copied_before_it_changes() -> None:
    model = Cached().eval()
    call = attention(model, photo())[0]
    assert torch.allclose(call.probs, model.P, atol=1e-6)
    with torch.no_grad(), record_attention(model) as att:
        model(photo())
    expected = model.P
    with torch.no_grad():
        model(photo())
    assert torch.allclose(att[0].probs, expected, atol=1e-6)


@pytest.mark.parametrize("write", ["out", "list"])
def test_queries_written_into_by_other_spellings_are_copied_before(write: str) -> None:
    class Writes(Patches):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.tokens(x)).view(1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).clone()
            self.P = (q @ k.mT / 2).softmax(-1)
            y = F.scaled_dot_product_attention(q, k, v)
            if write == "out":
                torch.mul(q, 0, out=q)
            else:
                torch._foreach_mul_([q], 0.0)
            return y

    model = Writes().eval()
    assert torch.allclose(attention(model, photo())[0].probs, model.P, atol=1e-6)


def test_one_head_of_keys_for_all_queries() -> None:
    """Each query comes once for each head: they are averaged."""

    class MultiQuery(Patches):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.tokens(x)
            q = rearrange(self.qkv(tokens)[..., :16], "b n (h e) -> b h n e", h=2)
            k = self.qkv(tokens)[..., 16:]
            self.P = einsum(q, k, "b h i e, b j e -> b h i j").softmax(-1)
            return einsum(self.P, k, "b h i j, b j e -> b h i e")

    model = MultiQuery().eval()
    found = attention(model, photo())[0].heatmap("x", query=5)[0]
    assert torch.allclose(found, laid(model.P[0].mean(0)[5]), atol=1e-5)


def test_two_branches_of_one_image_in_one_sequence_lose_nothing() -> None:
    class Two(Patches):
        def forward(self, x: Tensor) -> Tensor:
            t = torch.cat([self.tokens(x), self.tokens(-x)], 1)
            return (t @ t.mT).softmax(-1) @ t

    assert attention(Two().eval(), photo())[0].heatmap("x").mean().item() == pytest.approx(1, abs=1e-5)


def test_repeated_rows_are_averaged() -> None:
    class Hypotheses(Patches):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.tokens(x).repeat_interleave(3, 0))[:, None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    call = attention(Hypotheses().eval(), photo(2))[0]
    assert torch.allclose(call.heatmap("x").mean((1, 2)), torch.ones(2), atol=1e-5)


def test_samples_that_share_a_row_are_refused() -> None:
    class Packed(Patches):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.tokens(x).reshape(1, -1, 8))[:, None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    call = attention(Packed().eval(), photo(3))[0]
    with pytest.raises(MulticamError, match="has tokens of several samples in one row: explain one sample at a time"):
        call.heatmap("x")


def test_queries_are_counted_as_the_module_has_them() -> None:
    class Masked(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.filler, self.attn = nn.Parameter(torch.randn(8)), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            tokens = self.tokens(x)
            tokens[mask] = self.filler
            y, self.P = self.attn(tokens, tokens, tokens)
            return y

    model = Masked().eval()
    call = attention(model, {"x": photo(), "mask": torch.arange(16)[None] < 3})[0]
    assert call.heatmap("x", query=5).mean().item() == pytest.approx(model.P[0, 5, 3:].sum().item(), abs=1e-5)
    call.heatmap("x", query=14)
    with pytest.raises(MulticamError, match="query 2 of attention 'attn#0' is padding, or a constant"):
        call.heatmap("x", query=2)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_heads_in_front_of_samples(batch: int, fused: bool) -> None:
    class HeadsFirst(Patches):
        num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.tokens(x)).view(len(x), 16, 3, 2, 4).permute(2, 3, 0, 1, 4)
            self.P = (q @ k.mT / 2).softmax(-1)
            return F.scaled_dot_product_attention(q, k, v) if fused else self.P @ v

    model = HeadsFirst().eval()
    call = attention(model, photo(batch))[-1]
    assert call.shape == (batch, 2, 16, 16)
    assert torch.allclose(call.probs, model.P.transpose(0, 1), atol=1e-6)
    for sample, found in enumerate(call.heatmap("x", query=5)):
        assert torch.allclose(found, laid(model.P[:, sample].mean(0)[5]), atol=1e-5)


def test_an_image_with_its_colours_last() -> None:
    class ChannelsLast(nn.Module):
        P: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(192, 8)

        def forward(self, x: Tensor) -> Tensor:
            t = self.embed(rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=8, q=8))
            self.P = (t @ t.mT).softmax(-1)
            return self.P @ t

    model = ChannelsLast().eval()
    call = attention(model, torch.randn(2, 32, 48, 3))[0]
    expected = F.interpolate(model.P[:, 7].view(2, 1, 4, 6) * 24, (32, 48), mode="bilinear")[:, 0]
    assert torch.allclose(call.heatmap("x", query=7), expected, atol=1e-5)
    assert torch.equal(call.heatmap("x", query=7), call.heatmap("x", query=(9, 15)))


def test_one_tensor_for_two_inputs() -> None:
    class Pair(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, live: Tensor, reference: Tensor) -> Tensor:
            reference = self.tokens(reference)
            return self.attn(self.tokens(live), reference, reference)[0]

    model, x = Pair().eval(), photo()
    with torch.no_grad(), record_attention(model) as att:
        found = model(x, x)
    assert att[0].describe() == " -> ".join(["live and reference 4 x 4"] * 2)
    assert torch.equal(att.between("live", "reference")[0].heatmap("reference"), att[0].heatmap("live"))
    with torch.no_grad():
        assert torch.equal(found, model(x, x))


def test_what_a_function_did_not_keep_is_freed() -> None:
    class Wide(Patches):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.tokens(x))[:, None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad(), record_attention(Wide().eval(), keep=lambda call: None) as att:
        att.model(photo())
    assert att[0].values.untyped_storage().nbytes() == 0


def test_probabilities_that_are_overwritten_have_no_gradient_of_their_own() -> None:
    class Overwrites(Patches):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.tokens(x)
            p = (tokens @ tokens.mT).softmax(-1)
            p.mul_(torch.rand(16, 16))
            return (p @ tokens).mean(1)

    model: Any = Overwrites()
    with pytest.raises(MulticamError, match="the model writes into its probabilities"):
        attention(model, photo(), 0)
