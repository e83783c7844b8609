"""Feature maps are what a plain hook sees; kernels are what the layer convolves with."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from einops import rearrange
from timm.layers import Conv2dSame, StdConv2d
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from multicam import demo
from multicam.errors import MulticamError
from multicam.inside.features import Kernels, feature_maps, kernels
from multicam.watch.layers import Layer
from multicam.watch.reshape import tokens
from tests.helpers.hygiene import Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Branch, Fusion, Siamese, fusion_inputs, seeded


def hooked(model: nn.Module, path: str, *inputs: Tensor) -> Tensor:
    """What a layer returns, by a hook as people write it."""
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, output: kept.append(output.clone()))
    with torch.no_grad():
        model.eval()(*inputs)
    handle.remove()
    (output,) = kept
    return output


# Feature maps


@pytest.mark.parametrize("path", ["conv1", "layer2.0", "layer4.1.bn2"])
def test_the_maps_are_what_a_hook_sees(path: str) -> None:
    model, x = torchvision.models.resnet18(), torch.rand(2, 3, 64, 48)
    assert torch.equal(feature_maps(model, x, path), hooked(model, path, x))


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_b0", "regnetx_002"])
def test_the_maps_of_a_timm_model(name: str) -> None:
    model, x = timm.create_model(name), torch.rand(1, 3, 64, 64)
    path = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)][5]
    assert torch.equal(feature_maps(model, x, path), hooked(model, path, x))


def test_a_transformers_tokens_are_a_grid() -> None:
    model = VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_heads=2).eval()
    x = torch.rand(2, 3, 32, 48)
    expected = hooked(model, "blocks.1", x)[:, 1:].mT.reshape(2, 16, 4, 6)
    assert torch.equal(feature_maps(model, x, "blocks.1"), expected)


def test_channels_come_second() -> None:
    model = SwinTransformer(img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(feature_maps(model, x, "layers.1"), hooked(model, "layers.1", x).movedim(-1, 1))


def test_what_is_written_behind_a_layer_is_not_in_its_maps() -> None:
    model, x = seeded(Branch, channels=3), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.net[1](model.net[0](x))
    maps = feature_maps(model, x, "net.1")  # a ReLU in place follows
    assert torch.equal(maps, expected) and maps.min() < 0


@pytest.mark.parametrize("call", [0, 1])
def test_each_call_of_a_shared_encoder_has_its_maps(call: int) -> None:
    model, dates = seeded(Siamese), (torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        expected = model.encoder(dates[call])
    assert torch.equal(feature_maps(model, dates, f"encoder#{call}"), expected)


def test_several_layers_have_their_names_and_one_pass() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    attn = Layer("attn", pick=0, reshape=tokens(8, 8))
    layers = {"late": "texture", "rgb": model.rgb, "attn": attn}
    feature_maps(model, inputs, layers)
    passes.clear()  # the first time another pass tells the places
    maps = feature_maps(model, inputs, layers)
    assert {name: tuple(map.shape) for name, map in maps.items()} == {
        "late": (2, 16, 8, 4), "rgb": (2, 16, 8, 8), "attn": (2, 16, 8, 8),
    }  # fmt: skip
    assert [*maps] == ["late", "rgb", "attn"] and len(passes) == 1
    assert torch.equal(maps["rgb"], feature_maps(model, inputs, "rgb"))


def test_the_demo_shows_the_maps_of_all_its_branches() -> None:
    model, y, x = demo.load(), *demo.VIEWS["chelsea"]
    inputs = demo.inputs_of(demo.photo("chelsea")[y : y + demo.SIDE, x : x + demo.SIDE])
    maps = feature_maps(model, inputs, demo.LAYERS)
    assert {tuple(map.shape) for map in maps.values()} == {(1, 48, 16, 16)}
    with torch.no_grad():
        assert torch.equal(maps["frequency"], model.frequency_branch(inputs["frequency"]))


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d, (2, 6, 12)), (nn.Conv2d, (2, 6, 8, 9)), (nn.Conv3d, (2, 6, 4, 5, 6))]
)  # fmt: skip
def test_any_number_of_channels_and_axes(conv: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(conv(6, 5, 3), nn.Flatten()), torch.rand(shape)
    with torch.no_grad():
        assert torch.equal(feature_maps(model, x, "0"), model[0](x))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_maps_and_kernels_are_float32_at_least(dtype: torch.dtype, expected: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(dtype)
    maps = feature_maps(model, torch.rand(2, 3, 8, 8, dtype=dtype), "0")
    assert maps.dtype == expected
    assert torch.equal(kernels(model[0]).weights, model[0].weight.to(expected))


def test_there_is_no_graph() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.rand(2, 3, 8, 8, requires_grad=True)
    assert not feature_maps(model, x, "0").requires_grad
    assert not kernels(model[0]).weights.requires_grad
    with torch.inference_mode():
        maps, weights = feature_maps(model, x, "0"), kernels(model[0]).weights
    assert not maps.is_inference() and not weights.is_inference()


@pytest.mark.parametrize("when", ["normal", "model raises", "interrupted"])
def test_everything_is_left_as_it_was(when: str) -> None:
    model, stops = dirty(), {"model raises": Stop, "interrupted": KeyboardInterrupt}
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    before = state(model, inputs)
    if when == "normal":
        feature_maps(model, inputs, {"rgb": "rgb", "texture": "texture.net.1"})
    else:
        with pytest.raises(stops[when]):
            feature_maps(model, inputs, "rgb")
    assert_unchanged(before, state(model, inputs))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("encoder.net.9", "did you mean 'encoder.net"),
        ("encoder", "called 2 times"),
        ("head", r"returns \(2, 4\): it has no spatial axes"),
        ({}, "no layer to look at"),
        (Layer("encoder", call=0, reshape=lambda x: x[:1]), r"returned \(1, 16, 4, 4\) from \(2, 16, 4, 4\)"),
        (Layer("encoder", call=0, reshape=lambda x: x.flatten(1)), r"must return \(b c \*grid\) with b = 2"),
    ],
    ids=["unknown", "shared", "flat", "none", "batch", "axes"],
)
def test_layers_without_maps(layers: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        feature_maps(seeded(Siamese), (torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)), layers)


# Kernels


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 5),
        nn.Conv2d(3, 8, (3, 5), stride=2, dilation=2, padding=4),
        nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular", groups=2, bias=False),
        nn.Conv2d(5, 8, 3, padding=6, padding_mode="reflect"),
        nn.Conv3d(2, 4, (2, 3, 3), padding_mode="replicate", padding=1),
        Conv2dSame(3, 8, 5, stride=2),
    ],
    ids=["1d", "dilated", "same", "reflect", "3d", "timm"],
)
def test_kernels_are_the_weights(layer: nn.Module) -> None:
    found = kernels(layer)
    assert torch.equal(found.weights, layer.weight) and found.groups == layer.groups
    found.weights.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layer", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_kernel_is_what_one_cell_adds(layer: type[nn.Module], groups: int) -> None:
    layer = layer(4, 8, 3, stride=2, groups=groups, bias=False)
    found = kernels(layer)
    cells = torch.eye(4).view(4, 4, *[1] * (found.weights.ndim - 2))
    with torch.no_grad():
        added = layer(cells)  # (input channel, output channel, *k)
    for o in range(8):
        first = o // (8 // groups) * (4 // groups)
        for i in range(4):
            own = first <= i < first + 4 // groups
            assert torch.allclose(added[i, o], found.weights[o, i - first] if own else torch.zeros(()))


def _standardised() -> nn.Module:
    return StdConv2d(3, 8, 3, padding=0, bias=False)


def _normalised() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, bias=False))
    layer.parametrizations.weight.original0.data *= 3
    return layer


def _spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, bias=False))


def _normalised_by_a_hook() -> nn.Module:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Conv2d(3, 8, 3, bias=False))
    layer.weight_g.data *= 3  # what `layer.weight` holds is stale until the next pass
    return layer


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / 2, self.bias)


def _halved() -> nn.Module:
    return Halved(3, 8, 3, bias=False)


@pytest.mark.parametrize("factory", [_standardised, _normalised, _spectral, _normalised_by_a_hook, _halved])
def test_kernels_are_what_the_layer_does(factory: Callable[[], nn.Module]) -> None:
    layer = factory()
    found = kernels(layer)
    x = torch.zeros(3, 3, 5, 5)
    x[range(3), range(3), 2, 2] = 1  # a convolution answers a single cell with its kernel, turned round
    with torch.no_grad():
        answer = layer.eval()(x)
    assert torch.allclose(rearrange(answer, "i o h w -> o i h w").flip(-1, -2), found.weights, atol=1e-6)


def test_running_the_layer_leaves_no_trace() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)).train()
    layer.bias.requires_grad_(False)
    before = state(layer, {})
    kernels(layer)
    assert_unchanged(before, state(layer, {}))


def test_the_kinds_of_real_convolutions() -> None:
    mobile, resnext = torchvision.models.mobilenet_v3_small(), torchvision.models.resnext50_32x4d()
    found = {
        "stem": kernels(mobile.features[0][0]),
        "depthwise": kernels(mobile.features[1].block[0][0]),
        "squeeze": kernels(mobile.features[1].block[1].fc1),
        "project": kernels(mobile.features[1].block[2][0]),
        "grouped": kernels(resnext.layer1[0].conv2),
        "shortcut": kernels(resnext.layer1[0].downsample[0]),
    }
    assert {name: (k.kind, tuple(k.weights.shape)) for name, k in found.items()} == {
        "stem": ("dense", (16, 3, 3, 3)), "depthwise": ("depthwise", (16, 1, 3, 3)), "squeeze": ("pointwise", (8, 16, 1, 1)),
        "project": ("pointwise", (16, 16, 1, 1)), "grouped": ("grouped", (128, 4, 3, 3)),
        "shortcut": ("pointwise", (256, 64, 1, 1)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 4, 1, groups=4), "depthwise"),
        (nn.Conv2d(4, 4, 1, groups=2), "grouped"),
        (nn.Conv2d(1, 4, 3), "dense"),
        (nn.Conv2d(1, 4, 1), "pointwise"),
        (nn.ConvTranspose2d(4, 4, 2, groups=4), "depthwise"),
        (nn.ConvTranspose2d(4, 2, 1), "pointwise"),
        (nn.Conv2d(4, 4, (1, 3)), "dense"),
    ],
    ids=["multiplier", "scaling", "grouped-1x1", "grey", "grey-1x1", "up", "up-1x1", "1x3"],
)
def test_the_kinds_of_odd_convolutions(layer: nn.Module, kind: str) -> None:
    assert kernels(layer).kind == kind


def test_a_lazy_convolution_has_kernels_once_it_ran() -> None:
    layer = nn.LazyConv2d(4, 3)
    with pytest.raises(MulticamError, match=r"weight has no values yet \(run the model once\)"):
        kernels(layer)
    layer(torch.rand(1, 6, 8, 8))
    assert torch.equal(kernels(layer).weights, layer.weight)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(768, 48), "^kernels are those of a convolution, and Linear is none and has none inside it$"),
        (Branch(3), r"Branch is none. Inside it are 'net.0', 'net.3': take one, .*get_submodule\('net.0'\)"),
        (nn.Sequential(*[nn.Conv2d(3, 3, 1)] * 25), "'19' and 5 more"),
        (Siamese().encoder.net[2], "ReLU is none"),
    ],
    ids=["linear", "branch", "many", "relu"],
)
def test_what_is_no_convolution(layer: nn.Module, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        kernels(layer)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.conv2d(x, self.weight.flip(-1))


class Masked(nn.Conv2d):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Twice(3, 4, 3), "Twice computes 2 convolutions where one is expected"),
        (Masked(3, 4, 3), r"Masked cannot be run alone \(.*mask.*\)"),
        (nn.Conv2d(3, 4, 3, dtype=torch.complex64), "computes . convolutions"),
    ],
    ids=["twice", "masked", "complex"],
)
def test_convolutions_of_their_own_kind(layer: nn.Module, why: str) -> None:
    with pytest.raises(MulticamError, match=why + r".*as Kernels\(weights, groups\)"):
        kernels(layer)


def test_kernels_by_hand() -> None:
    assert repr(Kernels(torch.rand(8, 2, 3, 3), groups=4)) == "Kernels(8 x 2 x 3 x 3, grouped)"
    with pytest.raises(MulticamError, match="8 output channels do not fall into 3 groups"):
        Kernels(torch.rand(8, 2, 3, 3), groups=3)
    with pytest.raises(MulticamError, match="kernels are real numbers"):
        Kernels(torch.rand(8, 2, 0))
