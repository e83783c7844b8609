"""The attention of real architectures, with small random weights, against the model's own.

The truth is what the models compute themselves when their kernels are unfused: every softmax that they take, what
`nn.MultiheadAttention` returns with `need_weights=True`, and what transformers return with `output_attentions=True`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GatedMlp
from timm.models import mlp_mixer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multicam import Inputs, MulticamError
from multicam.attending.attend import attention, record_attention
from multicam.attending.attentions import Attention
from multicam.call.tree import leaves
from multicam.watch.tokens.fused import shared
from tests.helpers.attention_models import ATTENDING, Attending

EVERY = pytest.mark.parametrize("name", ATTENDING)


SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a sum of products and of a softmax
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)


class Returned(TorchFunctionMode):
    """What every call of some functions returned, in order."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self.functions = functions
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if func in self.functions:
            self.found.append(returned)
        return returned


def written_out(
    attn: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """What `nn.MultiheadAttention` computes for a self- or cross-attention of one width."""
    if not attn.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    projections = zip((q, k, v), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(*each).unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for each in projections)
    assert key_padding_mask is None
    assert attn_mask is None
    probs = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    out = attn.out_proj((probs @ v).transpose(1, 2).flatten(2))
    return out if attn.batch_first else out.transpose(0, 1), None


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """The same model, whose attention is written out."""
    with ExitStack() as stack:

        def exchange(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for module in model.modules():
            if getattr(module, "fused_attn", False):
                exchange(module, "fused_attn", False)
            if getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa":
                exchange(module.config, "_attn_implementation_internal", "eager")
            if isinstance(module, nn.MultiheadAttention):
                exchange(module, "forward", partial(written_out, module))
        yield


def ran(case: Attending) -> Any:
    with torch.random.fork_rng():  # ViLT draws the order of its patches
        torch.manual_seed(1)
        return case.inputs.bind(case.model).run(case.model)


def recorded(case: Attending) -> tuple[Attention, Any]:
    with torch.no_grad(), record_attention(case.model) as att:
        output = ran(case)
    return att, output


@dataclass(frozen=True)
class Observed:
    """Two passes of a model, with its kernels and with its attention written out, and what it computed itself."""

    fused: Attention
    output: Any
    kernels: list[Tensor]
    eager: Attention
    softmaxes: list[Tensor]
    products: list[Tensor]


@cache
def observed(name: str) -> Observed:
    case = ATTENDING[name]()
    with Returned(F.scaled_dot_product_attention) as kernels:
        fused, output = recorded(case)
    with unfused(case.model), Returned(*SOFTMAXES) as softmaxes, Returned(*PRODUCTS) as products:
        eager, _ = recorded(case)
    lists = [seen.found for seen in (kernels, softmaxes, products)]
    return Observed(fused, output, lists[0], eager, *lists[1:])


def own(case: Attending) -> tuple[list[Tensor], Any]:
    """The matrices of a pass in order, as the model made them, and its output."""
    with unfused(case.model), Returned(*SOFTMAXES) as softmaxes:
        output = ran(case)
    return softmaxes.found, output


def numbers(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor)]


def scores(output: Any) -> Tensor:
    """One score for each sample, on which everything that the model returns has an influence of its own."""
    generator = torch.Generator().manual_seed(0)
    parts = [x.flatten(1) for x in numbers(output) if x.is_floating_point() and x.ndim > 1 and len(x) == 2]
    return sum((x * torch.randn(x.shape, generator=generator)).sum(1) for x in parts)


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(True)
    yield
    model.requires_grad_(False)


@pytest.fixture
def without_fast_path() -> Iterator[None]:
    """The fused path of `nn.MultiheadAttention` in evaluation mode, which has other last bits, is off while recording."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@EVERY
def test_a_pass_runs_the_calls_that_the_architecture_says_and_returns_what_it_returns(
    name: str, without_fast_path: None
) -> None:
    case, seen = ATTENDING[name](), observed(name)
    with torch.no_grad():
        usual = numbers(ran(case))
    assert len(seen.fused) == len(seen.eager) == case.calls
    assert not seen.fused.skipped
    assert not seen.fused.blind_spots
    assert all(torch.equal(a, b) for a, b in zip(usual, numbers(seen.output), strict=True))


@EVERY
def test_probabilities_are_the_models_own(name: str) -> None:
    case, seen = ATTENDING[name](), observed(name)
    triples = zip(seen.fused, seen.eager, seen.softmaxes, strict=True)
    for before, (call, same, softmax) in enumerate(triples):
        expected = case.lay(softmax)
        assert call.shape == same.shape == expected.shape
        # The kernels of the attentions before it round otherwise, and what they return comes here through layers in between.
        assert (call.probs - expected).abs().max() <= ROUNDING * (before + 1)
        assert torch.equal(same.probs, expected)


FOLLOWED = {
    "timm_deit": ("blocks.1.attn", "2 own + x 4 x 4 -> 2 own + x 4 x 4"),
    "timm_crossvit": ("blocks.0.fusion.1.attn", "1 own -> 1 own + x 6 x 6"),
    "timm_pvt_v2": ("stages.1.blocks.0.attn", "x 8 x 8 -> x 2 x 2"),
    "timm_levit": ("stages.1.downsample.attn_downsample", "x 4 of 4 x 4 -> x 4 x 4"),  # every other row and column
    "timm_xcit": ("cls_attn_blocks.1.attn", "1 own -> 1 own + x 4 x 4"),  # behind attention of channels to channels
    "timm_davit": ("stages.1.blocks.0.0.attn", "x 4 x 4 -> x 4 x 4"),
    "hf_blip": ("text_encoder.encoder.layer.1.crossattention.self", "input_ids 6 -> 1 own + pixel_values 4 x 4"),
    "hf_detr": ("model.decoder.layers.0.encoder_attn", "5 own -> pixel_values and pixel_mask 4 x 4"),
    "hf_flava": (
        "multimodal_model.encoder.layer.0.attention.attention",
        "2 own + pixel_values 4 x 4 + input_ids 6 -> 2 own + pixel_values 4 x 4 + input_ids 6",
    ),
    "hf_perceiver": (
        "perceiver.decoder.decoder.decoding_cross_attention.attention.self",
        "inputs 16 x 16 -> 6 own",
    ),
    "hf_sam": (
        "mask_decoder.transformer.final_attn_token_to_image",
        "6 own + input_points 2 -> pixel_values 4 x 4",
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_tokens_are_followed_to_the_last_layers(name: str) -> None:
    path, described = FOLLOWED[name]
    assert observed(name).fused[path].describe() == described


DIFFERENTIATED = [
    "timm_vit", "timm_siglip", "timm_swin", "timm_crossvit", "timm_maxvit", "timm_pvt_v2", "timm_cait", "timm_xcit", "timm_twins",
    "timm_nest", "timm_hiera", "timm_botnet", "timm_halonet", "timm_coat", "timm_volo", "timm_mobilevit", "torchvision_vit",
    "torchvision_swin", "torchvision_maxvit", "hf_vit", "hf_swin", "hf_perceiver", "hf_clip", "hf_siglip", "hf_blip2_qformer",
    "hf_lxmert", "hf_detr", "hf_trocr", "hf_sam", "hf_llama", "hf_t5", "hf_bert",
]  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_autograd_on_explicit_probabilities(name: str) -> None:
    case = ATTENDING[name]()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        att = attention(case.model, case.inputs, scores)  # the model is frozen
    with trainable(case.model):
        truth, output = own(case)
        gradients = torch.autograd.grad(scores(output).sum(), truth, allow_unused=True)
    for call, gradient in zip(att, gradients, strict=True):
        if gradient is None:  # the output does not depend on it
            assert not call.grad.any()
        else:
            expected = case.lay(gradient)
            assert (call.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


@EVERY
def test_weights_times_values_are_what_the_model_computed(name: str) -> None:
    seen = observed(name)
    products = [product.flatten().sort().values for product in seen.products]
    for call in seen.eager:
        attended = (call.weights @ call.values).flatten().sort().values
        same = [x for x in products if x.shape == attended.shape and torch.allclose(x, attended, rtol=1e-5, atol=1e-6)]
        assert same, call  # the same numbers, however the model lays its heads and windows
    fused = [call for call in seen.fused if call.source == "fused"]
    if len(fused) == len(seen.kernels):  # those of nn.MultiheadAttention are inside of another function
        for call, attended in zip(fused, seen.kernels, strict=True):
            own = attended.reshape(len(call.rows), call.heads, *attended.shape[-2:])
            assert torch.allclose(call.probs @ shared(call.values, call.heads), own, rtol=1e-5, atol=1e-6)


# The fewest that transformers list, and newer releases list more: Swin only the last block of each stage, BLIP and LXMERT
# nothing of cross-attention or of one tower, LLaVA the photo's own attentions since 5.24.
LISTED = {
    "hf_vit": 2, "hf_dinov2_registers": 2, "hf_beit": 2, "hf_swin": 2, "hf_segformer": 4, "hf_perceiver": 3,
    "hf_clip": 4, "hf_siglip": 4, "hf_vilt": 2, "hf_blip": 2, "hf_blip2_qformer": 2, "hf_flava": 4,
    "hf_lxmert": 6, "hf_detr": 3, "hf_bridgetower": 4, "hf_trocr": 6, "hf_llava": 2, "hf_llama": 2, "hf_t5": 6,
    "hf_bert": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_probabilities_are_those_that_transformers_returns(name: str) -> None:
    case = ATTENDING[name]()
    asked = replace(case, inputs=Inputs(*case.inputs.args, **case.inputs.kwargs, output_attentions=True))
    with unfused(case.model):
        eager, output = recorded(asked)
    listed = [x for path, x in leaves(output).items() if "attentions" in path and isinstance(x, Tensor)]
    assert len(listed) >= LISTED[name]
    found = [[call.name for call in eager if call.shape == x.shape and torch.equal(call.probs, x)] for x in listed]
    assert all(found)
    assert len({tuple(names) for names in found}) == len(listed)  # no two are the same call


def test_the_module_that_lxmert_shares_between_its_streams_is_called_twice_in_a_layer() -> None:
    att = observed("hf_lxmert").fused
    for layer in range(2):
        to_image, to_text = att.find(f"lxmert.encoder.x_layers.{layer}.visual_attention.att")
        assert (to_image.name[-2:], to_image.shape[2:]) == ("#0", (6, 5))
        assert (to_text.name[-2:], to_text.shape[2:]) == ("#1", (5, 6))
        assert not to_text.probs[1, ..., 4:].any()  # masked words
        assert to_text.probs[0].all()


def test_queries_that_see_no_key_have_what_the_kernel_gives_them() -> None:
    """Left padding: attention that is written out spreads such a query over all keys, the fused kernel returns zeros."""
    case = ATTENDING["hf_llama"]()
    padded = torch.tensor([[0] * 2 + [1] * 4, [1] * 6])
    case = replace(case, inputs=Inputs(case.inputs.args[0], attention_mask=padded, use_cache=False))
    with Returned(F.scaled_dot_product_attention) as kernels:
        fused, _ = recorded(case)
    with unfused(case.model):
        eager, _ = recorded(case)
    for call, written, attended in zip(fused, eager, kernels.found, strict=True):
        assert torch.allclose(call.probs @ shared(call.values, 4), attended, atol=1e-5)
        assert not call.probs[0, :, :2].any()
        assert torch.allclose(written.probs[0, :, :2], torch.tensor(1 / 6))
        assert (call.probs - written.probs)[0, :, 2:].abs().max() <= 1e-6
        assert not call.probs.triu(1).any()

    def last(output: Any) -> Tensor:
        return output.logits[:, -1, 3]

    fused = attention(case.model, case.inputs, last)
    with trainable(case.model), unfused(case.model), Returned(*SOFTMAXES) as softmaxes:
        gradients = torch.autograd.grad(last(ran(case)).sum(), softmaxes.found)
    for call, probs, gradient in zip(fused, softmaxes.found, gradients, strict=True):
        expected = gradient * probs  # only what is seen counts: values of padding differ
        difference = call.grad * call.probs - expected
        difference[0, :, :2] = 0
        assert difference.abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "torchvision_vit", "hf_llama"])
def test_gradients_of_a_frozen_and_of_a_trainable_model_agree(name: str) -> None:
    case = ATTENDING[name]()
    frozen = attention(case.model, case.inputs, scores)
    with trainable(case.model), record_attention(case.model) as att:
        output = ran(case)
        att.gradients(scores(output))
        assert all(parameter.grad is None for parameter in case.model.parameters())
    for a, b in zip(frozen, att, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-5 * float(b.grad.abs().max()))


@pytest.mark.parametrize("name", ["timm_vit", "timm_crossvit", "timm_swin", "torchvision_vit"])
def test_a_batch_of_three_is_three_single_samples(name: str) -> None:
    case = ATTENDING[name]()
    images = torch.rand(3, *case.inputs.args[0].shape[1:], generator=torch.Generator().manual_seed(0))

    def top(output: Any) -> Tensor:
        return numbers(output)[0][:, 1]

    together = attention(case.model, Inputs(images), top)
    for sample in range(3):
        alone = attention(case.model, Inputs(images[sample : sample + 1]), top)
        for a, b in zip(together, alone, strict=True):
            rows = slice(sample * len(b.rows), (sample + 1) * len(b.rows))
            assert (a.probs[rows] - b.probs).abs().max() <= 1e-6
            assert (a.grad[rows] - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()
            for key in ("probs", "grad"):
                dense, single = a.dense(getattr(a, key), sample), b.dense(getattr(b, key))
                assert torch.allclose(dense.matrix, single.matrix, atol=1e-5 * float(single.matrix.abs().max()))


# Windows


def thirds(attn: nn.Module, x: Tensor) -> Tensor:
    """Values `(… heads e)`, where queries, keys and values follow one another."""
    return attn.qkv(x).chunk(3, -1)[2].unflatten(-1, (attn.num_heads, -1))


def in_each_head(attn: nn.Module, x: Tensor) -> Tensor:
    """Values `(… heads e)`, where each head has its queries, keys and values together."""
    return attn.qkv(x).unflatten(-1, (attn.num_heads, 3, -1))[..., 2, :]


Values = Callable[[nn.Module, Tensor], Tensor]
WINDOWED: dict[str, tuple[str, str, str, Callable[[nn.Module, Tensor], Tensor], Values]] = {
    # what has them, its norm in front, the attention inside of it, what it computes over the whole grid, its values
    "torchvision_swin": ("features.{stage}.{block}", "norm1", "attn", lambda block, x: block.attn(x), thirds),
    "timm_swin": ("layers.{stage}.blocks.{block}", "norm1", "attn", lambda block, x: block._attn(x), thirds),
    "timm_maxvit": ("stages.{stage}.blocks.0.{block}", "norm1", "attn", lambda block, x: block._partition_attn(x), in_each_head),
}  # fmt: skip
BLOCKS = [
    (name, stage, block)
    for name, stages, blocks in [
        ("torchvision_swin", (1, 3), (0, 1)),
        ("timm_swin", (0, 1), (0, 1)),
        ("timm_maxvit", (0, 1), ("attn_block", "attn_grid")),
    ]
    for stage in stages
    for block in blocks
]


@pytest.mark.parametrize(("name", "stage", "block"), BLOCKS)
def test_windows_on_the_full_grid_reproduce_what_the_module_returns(name: str, stage: int, block: int | str) -> None:
    case = ATTENDING[name]()
    pattern, norm, inner, compute, values_of = WINDOWED[name]
    module = case.model.get_submodule(pattern.format(stage=stage, block=block))
    attn = module.get_submodule(inner)
    bias = attn.qkv.bias.clone()
    seen: list[Tensor] = []
    hook = module.get_submodule(norm).register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        attn.qkv.bias.data.zero_()  # so that padding has no value
        att, _ = recorded(case)
        x = seen[0]
        with torch.no_grad():
            expected, values = compute(module, x), values_of(attn, x).flatten(1, 2)
    finally:
        hook.remove()
        attn.qkv.bias.data.copy_(bias)
    (call,) = att.find(pattern.format(stage=stage, block=block))
    assert len(call.rows) > len(x) or stage in (1, 3)
    for sample in range(len(x)):
        dense = call.dense(call.probs, sample)
        grid, rows = call.forward.places.cells(dense.queries, "x")
        _, columns = call.forward.places.cells(dense.keys, "x")
        assert grid == x.shape[1:3]
        assert sorted(rows.tolist()) == sorted(columns.tolist()) == list(range(grid[0] * grid[1]))
        attended = torch.einsum("hqk,khe->qhe", dense.matrix, values[sample, columns]).flatten(1)
        laid = torch.empty_like(attended).index_copy_(0, rows, attended).unflatten(0, grid)
        assert (attn.proj(laid) - expected[sample]).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


# PyTorch's own modules


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory().eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "padded keys": ({}, {"key_padding_mask": PADDING}),
    "bool mask": ({}, {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(2)}),
    "float mask": ({}, {"attn_mask": random(4, 5)}),
    "mask of each head": ({}, {"attn_mask": random(4, 4, 5)}),
    "mask and padding": ({}, {"attn_mask": random(4, 5), "key_padding_mask": torch.zeros(2, 5).masked_fill(PADDING, -torch.inf)}),
    "bias of keys and values": ({"add_bias_kv": True}, {}),
    "a zero key": ({"add_zero_attn": True}, {"key_padding_mask": PADDING}),
    "no bias": ({"bias": False}, {}),
    "other widths": ({"kdim": 6, "vdim": 10}, {}),
}  # fmt: skip


@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_multihead_attention_in_all_its_spellings(spelling: str, batch_first: bool, unbatched: bool) -> None:
    options, masks = SPELLINGS[spelling]
    attn = made(lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first, **options))
    q, k, v = random(2, 4, 8), random(2, 5, options.get("kdim", 8)), random(2, 5, options.get("vdim", 8))
    if unbatched:
        masks = {
            name: m[:1].squeeze(0) if name == "key_padding_mask" else m[:2] if m.ndim == 3 else m
            for name, m in masks.items()
        }
        q, k, v = q[0], k[0], v[0]
    elif not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    _, truth = attn(q, k, v, average_attn_weights=False, **masks)
    truth = truth.view(-1, *truth.shape[-3:])
    for need_weights, average, gradients in [
        (False, True, False),
        (False, True, True),
        (True, True, False),
        (True, False, True),
    ]:
        how = {"need_weights": need_weights, "average_attn_weights": average}
        with torch.set_grad_enabled(gradients):
            usual = attn(q, k, v, **how, **masks)
            with record_attention(attn) as att:
                output = attn(q, k, v, **how, **masks)
        (call,) = att
        assert call.shape == truth.shape
        assert (call.probs - truth).abs().max() <= 1e-6
        assert torch.equal(output[0], usual[0])
        if need_weights:
            assert torch.equal(output[1], usual[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_encoder_layers_is_off_while_recording_and_on_again_afterwards() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = made(lambda: nn.TransformerEncoder(layer, 3))
    x = random(2, 5, 8)
    with torch.no_grad():
        for masks in ({}, {"src_key_padding_mask": PADDING}, {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}):
            usual = model(x, **masks)
            with record_attention(model) as att:
                output = model(x, **masks)
            assert [call.path for call in att] == [f"layers.{i}.self_attn" for i in range(3)]
            seen = ~PADDING if "src_key_padding_mask" in masks else torch.ones(2, 5, dtype=torch.bool)
            # The fast path returns zeros for padded words, the layers do not.
            assert torch.allclose(output[seen], usual[seen], atol=1e-6)
            assert torch.equal(model(x, **masks), usual)


def test_a_decoder_runs_self_and_cross_attention() -> None:
    model = made(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2))
    words, memory = random(2, 4, 8), random(2, 5, 8) + 1
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad(), record_attention(model) as att:
        model(words, memory, tgt_mask=mask, memory_key_padding_mask=PADDING, tgt_is_causal=True)
    assert [call.name for call in att] == [
        f"layers.{i}.{name}#0" for i in range(2) for name in ("self_attn", "multihead_attn")
    ]
    assert [call.shape for call in att] == [(2, 2, 4, 4), (2, 2, 4, 5)] * 2
    assert not att[0].probs.triu(1).any()
    assert not att[1].probs[1, ..., 3:].any()


def test_gradients_of_transformer_layers_are_those_of_autograd() -> None:
    model = made(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2))
    case = Attending(model, Inputs(random(2, 4, 8), random(2, 5, 8)), 4)
    att = attention(model, case.inputs, scores)
    with trainable(model):
        truth, output = own(case)
        gradients = torch.autograd.grad(scores(output).sum(), truth)
    for call, expected in zip(att, gradients, strict=True):
        assert (call.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


# No attention

PERCEPTRON = {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 16, "num_classes": 4}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "mixer": lambda: mlp_mixer.MlpMixer(**PERCEPTRON),
    "resmlp": lambda: mlp_mixer.MlpMixer(
        **PERCEPTRON, mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine
    ),
    "gmlp": lambda: mlp_mixer.MlpMixer(
        **PERCEPTRON, mlp_ratio=6, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp
    ),
    "convnext": lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4),
    "poolformer": lambda: timm.models.MetaFormer(depths=(1, 1), dims=(8, 16), num_classes=4),
    **{
        name: partial(timm.create_model, name, num_classes=4)
        for name in ("resnet18", "efficientnet_b0", "mobilenetv3_small_050", "skresnet18", "resnest14d")
    },
}
SELECTING = ("skresnet18", "resnest14d")  # a softmax over branches


@pytest.mark.parametrize("name", PLAIN)
def test_convolutions_and_perceptrons_run_no_attention(name: str) -> None:
    model = made(PLAIN[name])
    selects = name in SELECTING
    said = "what looked like it:\n.*softmax" if selects else "ran no attention that could be seen$"
    with torch.no_grad(), pytest.raises(MulticamError, match=said), record_attention(model) as att:
        model(random(2, 3, 64, 64))
    assert bool(att.skipped) == selects
    assert not att
