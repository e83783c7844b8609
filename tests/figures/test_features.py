"""Sheets of kernels and feature maps: every tile shows the weights or the map that its label claims, and the rest is said."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from multicam import demo
from multicam.errors import MulticamError
from multicam.figures.colours import colorize, to_rgb
from multicam.figures.features import feature_sheet, kernel_sheet
from multicam.figures.page import Picture
from multicam.inside.features import Kernels, feature_maps, kernels
from tests.helpers.models import Branch, seeded
from tests.helpers.pictures import axes, limits, pixels, said


def captions(picture: Picture) -> list[int]:
    """The channel numbers below the tiles; the marks of the colour bar come after them."""
    found = said(picture)
    numbers = [int(text) for text in found if text.isdigit()]
    return numbers[: len(pixels(picture)) - found.count("input")]


def signed(x: Tensor, limit: float | Tensor) -> np.ndarray:
    return colorize(x / limit, "diverging")


def alike(tiles: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(tiles) == len(expected) and all(map(np.array_equal, tiles, expected))


def columns(picture: Picture) -> int:
    return len({round(a.get_position().x0, 3) for a in axes(picture, "tile")})


# Kernels


def test_kernels_of_three_channels_are_colours_on_one_scale_around_grey() -> None:
    layer = torchvision.models.resnet18().conv1
    layer.weight.data[5] = 0
    layer.weight.data[6] *= 0.01
    picture, weights = kernel_sheet(kernels(layer)), layer.weight.detach()
    limit = weights.abs().max()
    expected = ((0.5 + weights / (2 * limit)) * 255).round().movedim(1, -1).numpy()
    tiles = pixels(picture)
    assert len(tiles) == 64 and columns(picture) == 8
    assert np.abs(np.stack(tiles) - expected).max() <= 1  # halves are rounded either way
    assert (tiles[5] == 128).all() and np.ptp(tiles[6]) <= 3  # dead filters look dead
    assert captions(picture) == [*range(64)]
    assert f"black is \N{MINUS SIGN}{limit:.3g}, grey 0, white {limit:.3g}" in said(picture)


@pytest.mark.parametrize("inward", [2, 4, 6])
def test_kernels_of_other_channels_are_a_table_of_signed_maps(inward: int) -> None:
    weights = torch.randn(5, inward, 3, 3)
    picture = kernel_sheet(Kernels(weights), title="first layer")
    limit = weights.abs().max().item()
    assert alike(pixels(picture), [signed(map, limit) for row in weights for map in row])
    assert limits(picture) == [pytest.approx((-limit, limit))]
    assert [text for text in said(picture) if text[:3] in ("in ", "out")] == [
        *(f"in {i}" for i in range(inward)), *(f"out {o}" for o in range(5))
    ]  # fmt: skip
    assert "first layer" in said(picture) and not any(" of " in text for text in said(picture))


def test_a_table_shows_the_strongest_and_says_so() -> None:
    layer = demo.load().rgb_branch[1][0]
    picture, weights = kernel_sheet(kernels(layer), most=10), layer.weight.detach()
    outs = sorted(weights.abs().mean((1, 2, 3)).topk(3).indices.tolist())
    ins = sorted(weights.abs().mean((0, 2, 3)).topk(3).indices.tolist())
    shown = weights[outs][:, ins]
    assert alike(pixels(picture), [signed(map, shown.abs().max()) for row in shown for map in row])
    assert {*(f"out {o}" for o in outs), *(f"in {i}" for i in ins)} <= {*said(picture)}
    assert "the 3 strongest of 32 output channels the 3 strongest of 24 input channels" in said(picture)


@pytest.mark.parametrize(
    "chosen",
    [[np.int64(7), np.int64(2)], np.array([7, 2]), torch.tensor([7, 2]), (7, 2), (i for i in (7, 2))],
    ids=["np.int64", "ndarray", "tensor", "tuple", "generator"],
)
def test_chosen_channels_come_in_the_order_given(chosen: Any) -> None:
    weights = torch.randn(8, 6, 3, 3)
    picture = kernel_sheet(Kernels(weights), channels=chosen, in_channels=[4, 0, 1], most=1)
    shown = weights[[7, 2]][:, [4, 0, 1]]
    assert alike(pixels(picture), [signed(map, shown.abs().max()) for row in shown for map in row])
    assert "2 of 8 output channels 3 of 6 input channels" in said(picture)
    assert [text for text in said(picture) if text[:3] == "out"] == ["out 7", "out 2"]


def test_three_channels_that_are_no_colours() -> None:
    weights = torch.randn(4, 3, 3, 3)
    picture = kernel_sheet(Kernels(weights), in_channels=range(3))
    assert alike(pixels(picture), [signed(map, weights.abs().max()) for map in weights.flatten(0, 1)])
    one = kernel_sheet(Kernels(weights), in_channels=[2])
    assert alike(pixels(one), [signed(map, weights[:, 2].abs().max()) for map in weights[:, 2]])
    assert captions(one) == [0, 1, 2, 3]


def test_depthwise_kernels_are_a_sheet() -> None:
    layer = torchvision.models.mobilenet_v3_small().features[4].block[1][0]
    picture, weights = kernel_sheet(kernels(layer)), layer.weight.detach()
    outs = sorted(weights.abs().mean((1, 2, 3)).topk(64).indices.tolist())
    assert len(weights) == 96 and captions(picture) == outs
    assert alike(pixels(picture), [signed(weights[o, 0], weights[outs].abs().max()) for o in outs])
    assert "the 64 strongest of 96 output channels" in said(picture)


def test_grouped_kernels_name_what_they_read() -> None:
    layer = torchvision.models.resnext50_32x4d().layer1[0].conv2
    picture, weights = kernel_sheet(kernels(layer), channels=[0, 5, 127]), layer.weight.detach()[[0, 5, 127]]
    assert alike(pixels(picture), [signed(map, weights.abs().max()) for row in weights for map in row])
    names = [text for text in said(picture) if text.startswith("in ")]
    assert names == [f"in {i}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 124, 125, 126, 127)]


def test_pointwise_kernels_are_one_whole_matrix() -> None:
    layer = demo.load().frequency_branch[0][0]
    picture, weights = kernel_sheet(kernels(layer), most=4), layer.weight.detach()[:, :, 0, 0]
    assert alike(pixels(picture), [signed(weights, weights.abs().max())])
    assert {"input channels 0 to 63", "output channels 0 to 47"} <= {*said(picture)}
    part = kernel_sheet(kernels(layer), channels=[3, 9], in_channels=[8, 7, 6, 5])
    shown = weights[[3, 9]][:, [8, 7, 6, 5]]
    assert alike(pixels(part), [signed(shown, shown.abs().max())])
    assert {"input channels 8, 7, 6, 5", "output channels 3, 9"} <= {*said(part)}


def test_a_slim_matrix_is_wide_enough_to_be_seen() -> None:
    weights = torch.randn(64, 2, 1, 1)
    (tile,) = pixels(kernel_sheet(Kernels(weights)))
    repeats = tile.shape[1] // 2
    assert tile.shape[:2] == (64, 2 * repeats) and tile.shape[0] <= 3 * tile.shape[1]
    assert np.array_equal(tile[:, ::repeats], signed(weights[:, :, 0, 0], weights.abs().max()))


def test_kernels_of_signals_are_channels_by_time() -> None:
    weights = torch.randn(6, 4, 5)
    picture = kernel_sheet(Kernels(weights))
    assert alike(pixels(picture), [signed(map, weights.abs().max()) for map in weights])
    assert "input channels down, places across" in said(picture)
    (first, *_) = pixels(kernel_sheet(Kernels(torch.randn(6, 1, 40))))
    assert first.shape[1] == 40 and first.shape[0] >= 13  # a line would not be seen


def test_kernels_of_volumes_are_rows_of_slices() -> None:
    colours = torch.randn(4, 3, 2, 5, 5)
    picture = kernel_sheet(Kernels(colours))
    expected = ((0.5 + colours / (2 * colours.abs().max())) * 255).permute(0, 2, 3, 4, 1).flatten(0, 1)
    assert np.abs(np.stack(pixels(picture)) - expected.numpy()).max() <= 0.51
    assert {"slice 0", "slice 1", "out 3"} <= {*said(picture)}
    dense, own = torch.randn(4, 2, 3, 5, 5), torch.randn(4, 1, 3, 5, 5)
    picture = kernel_sheet(Kernels(dense))
    assert alike(pixels(picture), [signed(map, dense.abs().max()) for map in dense.flatten(0, 2)])
    assert [text for text in said(picture) if text[:3] == "in "] == ["in 0", "in 1"]
    assert alike(pixels(kernel_sheet(Kernels(own, groups=4))), [signed(m, own.abs().max()) for m in own.flatten(0, 2)])


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 2, 3, 3), (4, 2, 1, 1), (4, 2, 3)], ids=str)
def test_dead_layers_are_drawn(shape: tuple[int, ...]) -> None:
    tiles = pixels(kernel_sheet(Kernels(torch.zeros(shape))))
    assert {tuple(colour) for tile in tiles for colour in np.unique(tile.reshape(-1, 3), axis=0)} == {
        (128, 128, 128) if shape[1] == 3 else tuple(signed(torch.zeros(1, 1), 1)[0, 0])
    }


# Feature maps


def test_the_strongest_channels_come_first() -> None:
    model, x = seeded(Branch, channels=6), torch.rand(2, 6, 64, 64)  # more channels than imshow takes
    maps = feature_maps(model, x, "net.1")
    picture = feature_sheet(maps, most=5, sample=1, image=x[1])
    order = maps[1].abs().mean((1, 2)).argsort(descending=True)[:5].tolist()
    first, *tiles = pixels(picture)
    assert maps.min() < 0 and captions(picture) == order
    assert np.array_equal(first, to_rgb(x[1])) and "input" in said(picture)
    assert alike(tiles, [signed(maps[1, c], maps[1, order].abs().max()) for c in order])
    assert "the 5 strongest of 8 channels" in said(picture)


def test_maps_without_negative_values_are_not_signed() -> None:
    maps = torch.rand(1, 4, 8, 8)
    picture = feature_sheet(maps, channels=range(4))
    assert alike(pixels(picture), [colorize(map / maps.max(), "inferno") for map in maps[0]])
    assert limits(picture) == [pytest.approx((0, maps.max().item()))]
    assert not any(" of " in text for text in said(picture))  # nothing is left out


def test_each_map_may_have_its_own_scale() -> None:
    maps = torch.rand(1, 4, 8, 8) * torch.tensor([1.0, 100, 0.01, 0])[:, None, None]
    picture = feature_sheet(maps, scale="each")
    assert captions(picture) == [1, 0, 2, 3]
    assert alike(
        pixels(picture), [colorize(maps[0, c] / (maps[0, c].max() or 1), "inferno") for c in captions(picture)]
    )
    assert "activation, each map by its own maximum" in said(picture)


@pytest.mark.parametrize("chosen", [[np.int64(5), 0], np.array([5, 0]), torch.tensor([5, 0])], ids=["list", "ndarray", "tensor"])  # fmt: skip
def test_chosen_maps_come_in_the_order_given(chosen: Any) -> None:
    maps = torch.rand(1, 6, 8, 8)
    picture = feature_sheet(maps, channels=chosen, most=1, title="stem", colormap="viridis")
    limit = maps[0, [5, 0]].max()
    assert alike(pixels(picture), [colorize(maps[0, c] / limit, "viridis") for c in (5, 0)])
    assert captions(picture) == [5, 0] and "stem 2 of 6 channels" in said(picture)


def test_maps_of_signals_are_bands_and_of_clips_the_strongest_frame() -> None:
    signals = torch.rand(1, 3, 60)
    picture = feature_sheet(signals)
    for tile, channel in zip(pixels(picture), captions(picture), strict=True):
        assert tile.shape == (20, 60, 3)
        assert (tile == colorize(signals[0, channel][None] / signals.max(), "inferno")).all()
    clips = torch.rand(1, 3, 4, 8, 8)
    clips[0, 1, 2, 3, 3] = 7
    picture = feature_sheet(clips, channels=[1], image=torch.rand(3, 4, 16, 16))
    assert np.array_equal(pixels(picture)[1], colorize(clips[0, 1, 2] / 7, "inferno"))
    assert "1, frame 2" in said(picture)


@pytest.mark.parametrize(("count", "shape", "expected"), [(32, (8, 8), 8), (64, (8, 8), 8), (12, (8, 8), 4), (8, (8, 80), 2), (1, (8, 8), 1)])  # fmt: skip
def test_sheets_fill_the_width(count: int, shape: tuple[int, int], expected: int) -> None:
    picture = feature_sheet(torch.rand(1, count, *shape), most=64)
    assert columns(picture) == expected and len(pixels(picture)) == count
    assert picture.figure.get_size_inches()[0] <= 7.0


def test_half_precision_is_drawn() -> None:
    maps = torch.rand(1, 2, 8, 8)
    assert alike(pixels(feature_sheet(maps.double())), pixels(feature_sheet(maps)))
    assert len(pixels(feature_sheet(maps.bfloat16().requires_grad_()))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [6]}, "channels are 0 to 5, not 6"),
        ({"channels": [0, -1]}, "channels are 0 to 5, not -1"),
        ({"channels": []}, "channels are 0 to 5, not none"),
        ({"channels": torch.tensor([0.5])}, "channels are chosen by their numbers"),
        ({"most": 0}, "most must be a whole number of at least 1, not 0"),
        ({"sample": 1}, "samples are 0 to 0, not 1"),
    ],
    ids=["beyond", "negative", "none", "float", "most", "sample"],
)
def test_what_does_not_exist_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        feature_sheet(torch.rand(1, 6, 8, 8), **options)
    if "sample" not in options:
        with pytest.raises(MulticamError, match=message):
            kernel_sheet(Kernels(torch.rand(6, 1, 3, 3)), **options)


def test_a_batch_is_no_image() -> None:
    with pytest.raises(MulticamError, match=r"is \(c h w\).*not \(1, 3, 8, 8\): of a batch give image\[sample\]"):
        feature_sheet(torch.rand(1, 6, 8, 8), image=torch.rand(1, 3, 8, 8))


def test_input_channels_that_do_not_exist() -> None:
    with pytest.raises(MulticamError, match="input channels are 0 to 3, not 4"):
        kernel_sheet(Kernels(torch.rand(8, 4, 3, 3), groups=2), in_channels=[4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    maps, weights = torch.rand(1, 40, 8, 8), torch.rand(4, 3, 3, 3)
    maps[0, 33, 0, 0] = bad
    weights[1, 0, 0, 0] = bad
    with pytest.raises(MulticamError, match="NaN or infinite"):
        feature_sheet(maps, most=4)
    with pytest.raises(MulticamError, match="NaN or infinite"):
        kernel_sheet(Kernels(weights))


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 2, 2, 2, 2)], ids=str)
def test_what_has_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(MulticamError, match="one to three dimensions"):
        feature_sheet(torch.rand(shape))
