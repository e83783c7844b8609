"""The proxy: any structure of inputs, bit for bit the model's own output, and taps that any engine can hook."""

import copy
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.tokenization_utils_base import BatchEncoding

from multicam import HiResCAM, Inputs, Layer, MulticamError, PackedModel, Trace, tokens
from multicam.call.tree import leaves
from tests.helpers.models import Captioned, Fusion, Siamese, fusion_inputs, seeded

RGB, DEPTH, CLIP = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 6, 8), torch.rand(2, 3, 4, 8, 8)
IDS, MASK, TABLE = torch.randint(0, 2**40, (2, 5)), torch.rand(2, 5) > 0.5, torch.rand(2, 7)


class Pair(NamedTuple):
    rgb: Any
    depth: Any


@dataclass
class Sample:
    rgb: Tensor
    ids: Tensor


class NestedTensor:
    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask = tensors, mask


class Echo(nn.Module):
    """Returns all that it was given, unchanged, beside a number made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {
            "args": args,
            "kwargs": kwargs,
            "number": sum(self.number(leaf) for leaf in leaves((args, kwargs)).values()),
        }

    def number(self, leaf: Any) -> Any:
        return leaf.to(torch.complex128).abs().sum() * self.scale if isinstance(leaf, Tensor) else 0


CALLS = {
    "positional": Inputs(RGB, DEPTH),
    "keyword": Inputs(rgb=RGB, depth=DEPTH),
    "list": Inputs([RGB, DEPTH]),
    "tuple": Inputs((RGB, DEPTH)),
    "named tuple": Inputs(Pair(RGB, DEPTH)),
    "list of lists": Inputs([[RGB], [DEPTH, None]]),
    "dict": Inputs({"image": RGB, "depth": DEPTH, "label": 3, "name": "x", "none": None}),
    "ordered dict": Inputs(OrderedDict(b=RGB, a=DEPTH)),
    "user dict": Inputs(UserDict(rgb=RGB, ids=IDS)),
    "batch encoding": Inputs(RGB, BatchEncoding({"input_ids": IDS, "attention_mask": MASK})),
    "dataclass": Inputs(Sample(RGB, IDS)),
    "nested tensor": Inputs(NestedTensor(RGB, MASK)),
    "missing": Inputs(rgb=RGB, depth=None),
    "held": Inputs(RGB, ids=IDS, mask=MASK, table=TABLE, flag=True, scale=0.5, mode="sum"),
    "sizes": Inputs(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 5, 3), torch.rand(2, 1, 1, 9)),
    "5-D": Inputs(CLIP, RGB),
    "6-D": Inputs(torch.rand(2, 2, 3, 4, 8, 8)),
    "uint8 and bool": Inputs((RGB * 255).byte(), DEPTH > 0.5),
    "half": Inputs(RGB.half(), DEPTH.bfloat16()),
    "double": Inputs(RGB.double(), DEPTH),
    "complex": Inputs(torch.fft.fft2(RGB), DEPTH),
    "channels last": Inputs(RGB.to(memory_format=torch.channels_last), CLIP.to(memory_format=torch.channels_last_3d)),
    "non-contiguous": Inputs(RGB.mT, DEPTH[..., ::2], RGB[:, :1].expand(-1, 3, -1, -1)),
    "one sample": Inputs(RGB[:1], DEPTH[:1], IDS[:1]),
    "token mask (b 1 q k)": Inputs(RGB, mask=torch.rand(2, 1, 5, 5) > 0.5),
    "int64 image": Inputs(RGB, labels=torch.randint(0, 2**40, (2, 1, 8, 8))),
}


def hooked(packed: PackedModel) -> list[Tensor]:
    """What an engine's hooks see on the taps of the next passes."""
    kept: list[Tensor] = []
    for tap in packed.target_layers:
        tap.register_forward_hook(lambda m, i, o: kept.append(o))
    return kept


@pytest.mark.parametrize("name", CALLS)
def test_any_structure_arrives_and_returns_bit_for_bit(name: str) -> None:
    inputs = CALLS[name]
    model = Echo()
    expected = inputs.run(model)
    packed = PackedModel(model, inputs)
    with torch.no_grad():
        found = packed(packed.pack(inputs))
    given, arrived = leaves(expected), leaves(found)
    assert list(given) == list(arrived)
    for path, leaf in given.items():
        if not isinstance(leaf, Tensor):
            assert arrived[path] == leaf
            continue
        assert arrived[path].dtype == leaf.dtype, path
        assert torch.equal(arrived[path], leaf), path
    originals = (inputs.args, inputs.kwargs)
    for before, after in zip(originals, (found["args"], found["kwargs"]), strict=True):
        assert [type(value) for value in before] == [type(value) for value in after]


def test_a_layer_list_of_any_kind() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    assert PackedModel(model, inputs).target_layers == []
    for one in ("rgb", model.rgb, Layer("rgb")):
        assert len(PackedModel(model, inputs, one).target_layers) == 1
    assert len(PackedModel(model, inputs, ("rgb", "attn")).target_layers) == 2


@pytest.mark.parametrize("b", [1, 2])
def test_taps_see_what_a_trace_sees(b: int) -> None:
    """Shared and tuple-returning layers, tokens, two taps in a row, in-place operations behind."""
    cases = [
        (seeded(Fusion), fusion_inputs(b), ["rgb.net.1", "rgb", "depth.net.3", "attn"]),
        (seeded(Fusion, batch_first=False), fusion_inputs(b), ["attn"]),
        (seeded(Siamese), {"before": RGB[:b], "after": RGB[:b].flip(-1)}, ["encoder#0", "encoder#1"]),
    ]
    for model, inputs, layers in cases:
        packed = PackedModel(model, inputs, layers)
        kept = hooked(packed)
        out = packed(packed.pack(inputs))
        grads = torch.autograd.grad(out[:, 1].sum(), kept)
        sites = Trace(model, inputs, {layer: layer for layer in layers}, 1).sites
        for tapped, grad, layer in zip(kept, grads, layers, strict=True):
            assert torch.equal(tapped, sites[layer].acts), layer
            assert torch.allclose(grad, sites[layer].grads, rtol=1e-5, atol=1e-7), layer
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(out, model.requires_grad_(False)(**inputs))


def test_a_tap_of_a_half_precision_model_is_float32_and_the_output_the_models_own() -> None:
    model = seeded(Fusion).to(torch.bfloat16)
    inputs = {name: x.bfloat16() for name, x in fusion_inputs().items()}
    packed = PackedModel(model, inputs, ["rgb", "attn"])
    kept = hooked(packed)
    assert torch.equal(packed(packed.pack(inputs)), model.requires_grad_(False)(**inputs))
    assert kept[0].dtype == torch.float32


def test_a_tap_may_be_exchanged_between_two_passes() -> None:
    """As AblationCAM does with its ablation layer."""

    class Silence(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    model, inputs = seeded(Fusion), fusion_inputs()
    packed = PackedModel(model, inputs, Layer("attn", reshape=tokens(8, 8)))
    x = packed.pack(inputs)
    before = packed(x)
    packed.taps[0] = Silence()
    assert not torch.allclose(packed(x), before)
    packed.taps[0] = nn.Identity()
    assert torch.equal(packed(x), before)


def test_prefix_tokens_keep_their_gradient_and_their_values() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.block = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            patches = self.patches(x).flatten(2).mT
            mixed = self.block(torch.cat([patches.mean(1, True), patches], 1))
            return mixed[:, 0] * 10 + mixed[:, 1:].mean(1)

    model = seeded(Reader)
    packed = PackedModel(model, RGB, [Layer("patches"), Layer("block", reshape=tokens(4, 4, prefix=1))])
    kept = hooked(packed)
    out = packed(packed.pack(RGB))
    assert torch.equal(out, model.requires_grad_(False)(RGB))
    reference = Trace(model, RGB, {"patches": "patches"}, lambda o: o[:, 1])
    assert torch.allclose(torch.autograd.grad(out[:, 1].sum(), kept[0])[0], reference.sites["patches"].grads, atol=1e-7)


def test_without_taps_the_models_own_layers_can_be_hooked_and_the_input_has_a_gradient() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    packed = PackedModel(model, inputs)
    seen: list[bool] = []
    handle = model.rgb.net[0].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    packed(packed.pack(inputs))
    handle.remove()
    assert seen == [True]
    x = packed.pack(inputs).requires_grad_()
    gradient = torch.autograd.grad(packed(x)[:, 1].sum(), x)[0]
    expected = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    direct = torch.autograd.grad(model(**expected)[:, 1].sum(), list(expected.values()))
    for name, own in zip(expected, direct, strict=True):
        arrived = packed.spec.unpack(gradient, packed.inputs).leaves[name]
        assert torch.allclose(arrived, own, atol=1e-7)


def test_an_image_of_whole_numbers_has_no_gradient_and_says_so() -> None:
    inputs = Inputs((RGB * 255).byte(), DEPTH)
    packed = PackedModel(Echo(), inputs, output="number")
    with pytest.warns(UserWarning, match="input 'args.0' holds whole numbers, through which no gradient flows"):
        number = packed(packed.pack(inputs).requires_grad_())
    assert number.requires_grad  # through the depth


def test_held_leaves_follow_the_batch_of_the_engine_where_that_is_certain() -> None:
    model = seeded(Captioned)
    image, ids = torch.rand(1, 3, 8, 8), torch.randint(0, 50, (1, 7))
    packed = PackedModel(model, (image, ids), output="logits")
    x = packed.pack((image, ids))
    assert torch.equal(packed(x.repeat(5, 1, 1, 1))[3], packed(x.repeat(5, 1, 1, 1))[0])
    assert torch.allclose(packed(x.repeat(5, 1, 1, 1))[3], packed(x)[0], atol=1e-6)
    other = torch.randint(0, 50, (1, 7))
    y = packed.pack((image, other))
    assert torch.allclose(packed(y), model(image, other)["logits"])

    two = (image.repeat(2, 1, 1, 1), torch.cat([ids, other]))
    packed = PackedModel(model, two, output="logits")
    assert torch.allclose(packed(packed.pack(two)), model(*two)["logits"])
    # One photo with two captions: a row that shows it could be either.
    with pytest.raises(
        MulticamError, match=r"with 5 changed rows, but.*2 packed samples differ.*ids=int64.*one sample"
    ):
        packed(packed.pack(two)[:1].repeat(5, 1, 1, 1))
    unlike = (torch.rand(2, 3, 8, 8), two[1])
    packed = PackedModel(model, unlike, output="logits")
    x, expected = packed.pack(unlike), model(*unlike)["logits"]
    assert torch.allclose(packed(x[[1, 0, 1]]), expected[[1, 0, 1]], atol=1e-6)
    with pytest.raises(MulticamError, match="with 2 changed rows"):
        packed(x * 0.5)
    same = Inputs(two[0], ids.repeat(2, 1))
    packed = PackedModel(model, same, output="logits")
    assert packed(packed.pack(same)[:1].repeat(5, 1, 1, 1)).shape == (5, 3)


def test_class_prompts_are_constant() -> None:
    class Matcher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 3)

        def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
            return image.mean((2, 3)) @ self.words(prompts).mean(1).T

    inputs = Inputs(torch.rand(1, 3, 8, 8), torch.randint(0, 50, (4, 6)))
    with pytest.raises(MulticamError, match=r"constant\('prompts'\)"):
        packed = PackedModel(Matcher(), inputs)
        packed(packed.pack(inputs).repeat(3, 1, 1, 1))
    packed = PackedModel(Matcher(), inputs.constant("prompts"))
    assert packed(packed.pack(inputs.constant("prompts")).repeat(3, 1, 1, 1)).shape == (3, 4)


def test_a_map_of_the_canvas_goes_to_each_input() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    packed = PackedModel(model, inputs, ["rgb"])
    canvas = torch.rand(2, 32, 32)
    maps = packed.maps(canvas)
    assert torch.equal(maps["rgb"], canvas)
    # Half the size with half-pixel centres is the mean of two.
    torch.testing.assert_close(maps["depth"], canvas.unflatten(1, (16, 2)).mean(2))
    torch.testing.assert_close(maps["texture"], canvas.unflatten(2, (16, 2)).mean(3))


def test_refusals() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    with pytest.raises(MulticamError, match="no layer in Fusion 'rbg'; did you mean 'rgb'"):
        PackedModel(model, inputs, ["rbg"])
    with pytest.raises(MulticamError, match="cannot be called with"):
        PackedModel(model, {"rgb": RGB})
    with pytest.raises(MulticamError, match="nothing to pack"):
        PackedModel(seeded(Captioned), Inputs(RGB, IDS).hold("image"))
    with pytest.raises(MulticamError, match="differ in batch size"):
        PackedModel(seeded(Siamese), (RGB, RGB[:1]))
    packed = PackedModel(model, inputs)
    with pytest.raises(MulticamError, match=r"has shape \(2, 6, 32, 16\), but its layout is \(b, 6, 32, 32\)"):
        packed(packed.pack(inputs)[..., :16])
    with pytest.raises(MulticamError, match="called 2 times in one forward pass"):
        PackedModel(seeded(Siamese), (RGB, RGB), ["encoder"])


def test_our_own_engine_runs_on_the_proxy_too() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    packed = PackedModel(model, inputs)
    found = HiResCAM(packed, "model.rgb")(packed.pack(inputs), 1, signed=True)
    assert torch.allclose(found, HiResCAM(model, Layer("rgb", onto="rgb"))(inputs, 1, signed=True), atol=1e-6)


class Encoded(nn.Module):
    """A photo through an encoder of PyTorch's own, whose fused path calls none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, photo: Tensor, padding: Tensor) -> Tensor:
        tokens = self.encoder(self.patches(photo).flatten(2).mT, src_key_padding_mask=padding)
        return self.head(tokens)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fused_path_is_taken_where_the_model_takes_it_and_no_tap_is_inside() -> None:
    model = seeded(Encoded)
    inputs = Inputs(RGB, torch.arange(16) >= torch.tensor([[9], [12]]))  # the fused path cuts them off
    packed = PackedModel(model, inputs, "patches")
    with torch.no_grad():
        assert torch.equal(packed(packed.pack(inputs)), inputs.run(model))
    unfused = packed(packed.pack(inputs))
    torch.testing.assert_close(unfused, inputs.run(model))
    packed = PackedModel(model, inputs, [Layer("encoder.layers.1", reshape=tokens(4, 4))])
    kept = hooked(packed)
    with torch.no_grad():
        found = packed(packed.pack(inputs))
    torch.testing.assert_close(found, unfused)  # of all tokens
    assert len(kept) == 1
    assert torch.backends.mha.get_fastpath_enabled()


def test_held_leaves_follow_the_packed_tensor_to_another_device() -> None:
    """The meta device stands for a GPU here: it takes no tensor of another."""
    model = seeded(Captioned)
    inputs = Inputs(torch.rand(1, 3, 8, 8), torch.randint(0, 50, (1, 7)), mask=torch.ones(1, 7))
    packed = PackedModel(copy.deepcopy(model), inputs, "image", output="logits")
    x = packed.pack(inputs)
    packed.to("meta")
    assert packed(x.to("meta")).device.type == "meta"
    assert packed(x.to("meta").repeat(3, 1, 1, 1)).shape == (3, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))],
                         ids=["copied", "pickled"])  # fmt: skip
def test_a_copy_is_a_proxy_of_its_own_model(copied: Callable[[PackedModel], PackedModel]) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    packed = PackedModel(model, inputs, ["rgb", "attn"])
    x = packed.pack(inputs)
    expected = packed(x)
    other = copied(packed)
    kept = hooked(other)
    assert torch.equal(other(x), expected)
    assert len(kept) == 2
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(2)
    assert not torch.allclose(other(x), expected)
    assert torch.equal(packed(x), expected)


def test_what_a_tap_shows_and_gets_can_be_detached_in_place() -> None:
    """As pytorch-grad-cam does with what it kept; views cannot."""
    model, inputs = seeded(Fusion), fusion_inputs()
    packed = PackedModel(model, inputs, ["rgb", "attn"])
    kept = hooked(packed)
    scores = packed(packed.pack(inputs))
    for x in (*torch.autograd.grad(scores[:, 1].exp().sum(), kept, create_graph=True), *kept):
        x.detach_()
        assert not x.requires_grad


def test_the_flags_of_the_proxy_are_its_own() -> None:
    model, inputs = seeded(Fusion).train(), fusion_inputs()
    packed = PackedModel(model, inputs, "rgb")
    assert packed.eval() is packed
    assert model.training
    assert not packed.train(False).training
    packed(packed.pack(inputs))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("tool", ["pytorch_grad_cam.activations_and_gradients", "captum.attr", "torchcam.methods"])
def test_a_grid_of_three_axes_is_refused_to_the_tool_that_lays_maps_on_rows_and_columns(tool: str) -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    packed = PackedModel(model, CLIP, "0")

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        pass

    hook.__module__ = tool
    packed.target_layers[0].register_forward_hook(hook)
    if tool.startswith("pytorch_grad_cam"):
        with pytest.raises(MulticamError, match="the grid of layer '0' is 3 x 7 x 7"):
            packed(packed.pack(CLIP))
    else:
        torch.testing.assert_close(packed(packed.pack(CLIP)), model(CLIP))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_model_that_a_backward_pass_would_run_again_is_refused_where_that_changes_it() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.reentrant = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=self.reentrant).mean((2, 3))

    model = seeded(Again)
    packed = PackedModel(model, RGB)
    x = packed.pack(RGB)
    (gradient,) = torch.autograd.grad(packed(x.requires_grad_())[:, 1].sum(), x)
    leaf = RGB.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0])
    for reentrant, training, why in ((False, True, "in training mode"), (True, False, "would get gradients")):
        model.reentrant = reentrant
        packed = PackedModel(model.train(training), RGB)
        with pytest.raises(MulticamError, match=f"parts of Again run once more during the backward pass.*{why}"):
            packed(packed.pack(RGB).requires_grad_())
        with torch.no_grad():
            assert packed(packed.pack(RGB)).shape == (2, 4)
