"""The contract of a map, and its warnings."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multicam
from multicam import (
    CAM,
    AblationCAM,
    EigenCAM,
    GradCAM,
    HiResCAM,
    Inputs,
    Layer,
    Maps,
    MulticamError,
    Site,
    Trace,
    XGradCAM,
)
from multicam.cam.catalogue import ONE_PASS
from multicam.cam.weighted import OriginalCAM, ShapleyCAM
from tests.helpers.models import Fusion, fusion_inputs, seeded


def sum_of_products(site: Site) -> Tensor:
    return (site.grads * site.acts).flatten(1).sum(1)


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, XGradCAM], ids=lambda m: m.__name__)
def test_the_mean_of_a_map_is_the_evidence_in_units_of_the_score(method: type[CAM]) -> None:
    """With a pooled linear head the evidence is the logit without its bias, on any grid and by three methods."""
    torch.manual_seed(0)
    head = nn.Linear(6, 5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    for size in (8, 13):
        x = torch.rand(2, 3, size, size)
        grid_map = method(model, {"grid": "1"})(x, 3, signed=True)["grid"]
        assert torch.allclose(grid_map.mean((1, 2)), model(x)[:, 3] - head.bias[3], rtol=1e-4)
        with pytest.raises(AttributeError):
            _ = grid_map.comparable  # a plain tensor


def test_hirescam_sums_to_gradient_times_activation_on_every_branch() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(), {"rgb": "rgb", "depth": "depth", "texture": "texture"}, 1)
    maps = HiResCAM(seeded(Fusion), {"rgb": "rgb"}).maps(trace, signed=True)
    for name, site in trace.sites.items():
        laid = maps[name].mean((1, 2))
        assert torch.allclose(laid, sum_of_products(site), rtol=0.05, atol=0.02 * maps[name].abs().mean())


def test_a_name_that_is_an_input_lays_the_map_on_it() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    layers = {"rgb": "rgb", "depth": "depth", "mixed": "attn", "other": Layer("attn", onto="rgb")}
    maps = EigenCAM(model, layers)(inputs, signed=True)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "rgb": (2, 32, 32), "depth": (2, 16, 32), "mixed": (2, 8, 8), "other": (2, 32, 32),
    }  # fmt: skip
    upsampled = F.interpolate(maps["mixed"][:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(maps["other"], upsampled)
    with pytest.raises(MulticamError, match=r"'texture': its entries stand for 128 of rgb, and none for 'texture'"):
        EigenCAM(model, Layer("attn", onto="texture"))(inputs)
    assert EigenCAM(model, "rgb")(inputs).shape == (2, 8, 8)  # three inputs, and nobody said which
    assert EigenCAM(model, Layer("rgb", onto="rgb"))(inputs).shape == (2, 32, 32)


def test_short_names_and_the_only_image_of_a_dict_model() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.conv(batch["image"]).mean((2, 3))

    batch = Inputs({"image": torch.rand(2, 3, 9, 7), "ids": torch.arange(2)})
    assert HiResCAM(Batched(), {"image": "conv"})(batch, signed=True)["image"].shape == (2, 9, 7)
    assert HiResCAM(Batched(), "conv")(batch, signed=True).shape == (2, 9, 7)
    assert HiResCAM(Batched(), {"grid": "conv"})(batch, signed=True)["grid"].shape == (2, 9, 7)
    with pytest.raises(MulticamError, match=r"layer 'conv' does not see input 'batch\.ids'"):
        HiResCAM(Batched(), {"ids": "conv"})(batch, signed=True)
    with pytest.raises(MulticamError, match="no input 'imgae'"):
        HiResCAM(Batched(), Layer("conv", onto="imgae"))(batch, signed=True)


def laid(grid_map: Tensor, *size: int) -> Tensor:
    """A map on its grid, resized to an input."""
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    return F.interpolate(grid_map[:, None], size, mode=mode, align_corners=False)[:, 0]


@pytest.mark.parametrize("size", [(20,), (8, 12), (4, 8, 12)])
def test_signals_images_and_volumes(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1](3, 4, 3, 2, 1)
    model = nn.Sequential(conv, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(2, 3, *size)
    # Behind a mean over cells each cell's evidence is its channels times the weights of the class.
    expected = torch.einsum("c, b c ... -> b ...", model[4].weight[0], conv(x)).detach()
    torch.testing.assert_close(HiResCAM(model, "0")(x, 0, signed=True), laid(expected, *size))


def test_clips_with_frames_first_get_their_map_on_the_frames() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 3, 2, 1)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.conv(pixel_values.transpose(1, 2)).mean((2, 3, 4))

    model, clip = seeded(Video), torch.rand(1, 8, 3, 12, 14)
    expected = model.conv(clip.transpose(1, 2))[:, 0].detach()
    torch.testing.assert_close(HiResCAM(model, "conv")(clip, 0, signed=True), laid(expected, 8, 12, 14))


def test_axes_are_told_by_what_the_layer_made_of_them() -> None:
    signal, x = nn.Sequential(nn.Conv1d(16, 8, 4, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten()), torch.rand(2, 16, 64)
    found = HiResCAM(signal, "0")(x, 1, signed=True)
    torch.testing.assert_close(found, laid(signal[0](x)[:, 1].detach(), 64))
    contrasts = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    scan = torch.rand(1, 4, 3, 8, 8)
    torch.testing.assert_close(HiResCAM(contrasts, "0")(scan, 1, signed=True), contrasts[0](scan)[:, 1].detach())


def test_negative_evidence_is_cut_unless_signed() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    signed = HiResCAM(model, {"grid": "rgb"})(inputs, 1, signed=True)["grid"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = HiResCAM(model, {"grid": "rgb"})(inputs, 1)["grid"]
    assert signed.min() < 0
    assert torch.equal(cut, signed.relu())


def test_maps_of_several_inputs_compare() -> None:
    """Two branches, one weighted a hundred times less: the masses say so, and per-map scaling could not."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.right.load_state_dict(self.left.state_dict())

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return (self.left(left).relu() + 0.01 * self.right(right).relu()).mean((2, 3))

    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    maps = HiResCAM(Weighted(), {"left": "left", "right": "right"})((x, x), lambda out: out.sum(1))
    assert isinstance(maps, Maps)
    assert maps.comparable
    assert torch.allclose(maps["right"] * 100, maps["left"], rtol=1e-4)
    assert torch.allclose(maps.shares()[:, 1], torch.tensor(1 / 101), rtol=1e-3)
    assert Maps({"a": torch.zeros(1, 2, 2)}).shares().tolist() == [[0.0]]
    assert not EigenCAM(Weighted(), {"left": "left"})((x, x)).comparable
    assert "left: (2, 8, 8) mean" in repr(maps)


def test_a_batch_is_its_samples() -> None:
    model = seeded(Fusion)
    inputs = fusion_inputs(3)
    layers = {"rgb": "rgb", "depth": "depth.net.3", "attn": "attn"}
    for method in (*ONE_PASS, OriginalCAM, ShapleyCAM, AblationCAM):  # those that mask: tests/test_perturb.py
        own = {"attn": "attn"} if method is OriginalCAM else layers  # the only one that the head alone reads
        together = method(model, own)(inputs, [0, 3, 1], signed=True)
        for b, target in enumerate([0, 3, 1]):
            alone = method(model, own)({name: x[b : b + 1] for name, x in inputs.items()}, target, signed=True)
            for name in own:
                assert torch.allclose(
                    alone[name][0], together[name][b], rtol=1e-3, atol=1e-4 * together[name].abs().max()
                )


def test_a_method_without_gradients_runs_no_backward() -> None:
    model = seeded(Fusion)
    model.head.register_full_backward_hook(lambda m, i, o: pytest.fail("backward"))
    assert EigenCAM(model, "rgb")(fusion_inputs()).any()


def test_a_method_of_ones_own_is_a_few_lines() -> None:
    class Energy(CAM):
        """The activations' energy."""

        def saliency(self, site: Site) -> Tensor:
            return site.acts.square().sum(1)

    assert Energy(seeded(Fusion), {"rgb": "rgb"})(fusion_inputs())["rgb"].shape == (2, 32, 32)
    assert repr(Energy(seeded(Fusion), "rgb")) == "Energy(Fusion, Layer('rgb'))"


class Reader(nn.Module):
    """A transformer-like head on a grid, in the ways that make maps empty."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 8, 3), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        tokens = y.flatten(2).mT
        if self.how == "class token":
            return (tokens * 0).sum(1)
        if self.how == "norm":
            return self.norm(tokens).mean(1)
        return -y.square().mean((2, 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("class token", r"map of layer 'conv' for 2 of 2 samples is empty: the gradient is zero on the whole grid"),
        ("norm", r"is meaningless: gradient times activation cancels.*normalisation follows"),
        ("negative", r"is empty: all its evidence is negative; signed=True shows it"),
    ],
)
def test_a_map_that_is_empty_by_construction_says_why(how: str, message: str) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=message):
        HiResCAM(Reader(how), {"conv": "conv"})(torch.rand(2, 3, 8, 8), 1)


def test_overflow_is_an_error_and_not_an_empty_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    infinite = torch.cat([x[:1], x[1:] * torch.inf])
    with pytest.raises(
        MulticamError, match="the score of sample 1 is NaN: input 'input' holds infinite values in sample 1"
    ):
        HiResCAM(model, "0")(infinite, 1)
    huge = 1e30 * x  # whose activations overflow, and are cut to 6 behind the layer
    nn.init.constant_(model[0].weight, 1e10)
    with pytest.raises(MulticamError, match=r"activations of layer '0' are NaN or infinite in sample 0: .* bfloat16"):
        EigenCAM(model, "0")(huge, 1)

    class Infinite(HiResCAM):
        def weighted(self, site: Site) -> Tensor:
            return super().weighted(site) / torch.tensor([1.0, 0.0])[:, None, None, None]

    with pytest.raises(MulticamError, match=r"Infinite of layer '0' is not finite in sample 1: .* bfloat16"):
        Infinite(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())), "0")(x, 1)


@pytest.mark.parametrize("name", [n for n in multicam.__all__ if isinstance(getattr(multicam, n), type)])
def test_everything_public_says_what_it_is(name: str) -> None:
    assert getattr(multicam, name).__repr__ is not object.__repr__
