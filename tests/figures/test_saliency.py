"""Each of the four pictures of an input shows the numbers that it says, on the scale that they allow."""

import numpy as np
import pytest
import torch
from torch import Tensor

from multicam.errors import MulticamError
from multicam.figures.colours import colorize, overlay, signed_rgb, to_rgb
from multicam.figures.saliency import saliency_figure
from multicam.saliency.attributions import Attributions
from tests.helpers.pictures import grey, limits, pixels, said

SHAPES = {"rgb": (2, 3, 8, 6), "depth": (2, 1, 4, 4)}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=g) for name, shape in SHAPES.items()}


def attributed(units: bool, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Attributions:
    """Random numbers; with `units` those of each entry add up to the score."""
    g = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return Attributions(values, torch.zeros(2), weights=dict.fromkeys(values, 1.0) if units else None)


def near(tile: np.ndarray, expected: np.ndarray) -> bool:
    """Alike, but for halves that round either way."""
    return bool(np.abs(tile.astype(int) - expected).max() <= 1)


def test_numbers_in_units_of_the_score_share_one_scale(inputs: dict[str, Tensor]) -> None:
    found = attributed(units=True)
    maps, areas = found.maps(), {"rgb": 48, "depth": 16}
    top = max(m.abs().max().item() for m in maps.values())
    limit = max((areas[name] * values).abs().max().item() for name, values in found.items())
    picture = saliency_figure(inputs, found, clip=1.0)
    tiles = pixels(picture)
    for k, (i, name) in enumerate((i, name) for i in range(2) for name in inputs):
        image, parts, alone, over = tiles[4 * k : 4 * k + 4]
        assert np.array_equal(image, to_rgb(inputs[name][i]))
        assert near(parts, signed_rgb(areas[name] * found[name][i], limit))
        assert near(alone, colorize(maps[name][i] / top, "diverging"))
        assert near(over, overlay(grey(inputs[name][i]), maps[name][i] / top, colormap="diverging"))
    assert limits(picture) == [pytest.approx((-top, top))]
    assert {"sum of channels", "attribution, units of the score", "rgb", "depth"} <= {*said(picture)}


def test_gradients_of_different_inputs_have_each_their_own(inputs: dict[str, Tensor]) -> None:
    found = attributed(units=False)
    picture = saliency_figure(inputs, found, clip=1.0, quantity="gradient")
    tiles = pixels(picture)
    for k, (i, name) in enumerate((i, name) for i in range(2) for name in inputs):
        values = found[name][i]
        assert near(tiles[4 * k + 1], signed_rgb(values, values.abs().max().item()))
        assert near(tiles[4 * k + 2], colorize(values.abs().amax(0) / values.abs().max()))
    words = {*said(picture)}
    assert {"gradient", "largest of channels", "gradient, each map by its own maximum"} <= words


@pytest.mark.parametrize(("channels", "head"), [("norm", "norm of channels"), ("max", "largest of channels")])
def test_channels_are_taken_together_as_asked(inputs: dict[str, Tensor], channels: str, head: str) -> None:
    found = attributed(units=True)
    picture = saliency_figure(inputs, found, channels=channels, clip=1.0)
    map = found.maps(channels)["rgb"][0]
    assert near(pixels(picture)[2], colorize(map / map.max()))
    assert head in said(picture)


def test_the_strongest_places_are_cut() -> None:
    values = torch.ones(1, 1, 10, 10)
    values[0, 0, 0, 0] = 1000.0
    found = Attributions({"x": values}, torch.zeros(1), weights={"x": 1.0})
    cut, whole = (saliency_figure(torch.rand(1, 1, 10, 10), found, clip=clip) for clip in (0.9, 1.0))
    assert [limits(picture)[0][1] for picture in (cut, whole)] == [100.0, 100_000.0]
    assert np.array_equal(pixels(cut)[2], colorize(torch.ones(10, 10)))
    assert "attribution, cut at the 90th percentile, units of the score" in said(cut)


def test_a_clip_is_shown_where_its_attribution_is() -> None:
    clip, values = torch.rand(1, 3, 5, 6, 6), torch.zeros(1, 3, 5, 6, 6)
    values[0, :, 3, 2, 2] = 1.0
    image, parts, alone, _ = pixels(saliency_figure(clip, Attributions({"clip": values}, torch.zeros(1))))
    assert np.array_equal(image, to_rgb(clip[0, :, 3]))
    assert np.array_equal(parts, signed_rgb(values[0, :, 3], 1.0))
    assert np.array_equal(alone, colorize(values[0, 0, 3]))


def test_nothing_is_laid_over_a_spectrum(inputs: dict[str, Tensor]) -> None:
    picture = saliency_figure(inputs, attributed(units=True), spectral=["depth"], rows=["a", "b"])
    assert len(pixels(picture)) == 14
    assert {"a rgb", "a depth", "b rgb", "b depth"} <= {*said(picture)}


def test_no_attribution_anywhere_is_no_colour() -> None:
    found = Attributions({"x": torch.zeros(1, 1, 4, 4)}, torch.zeros(1))
    _, parts, alone, _ = pixels(saliency_figure(torch.rand(1, 1, 4, 4), found))
    assert np.array_equal(parts, colorize(torch.zeros(4, 4), "diverging"))
    assert np.array_equal(alone, colorize(torch.zeros(4, 4)))


ONE = attributed(units=False, shapes={"rgb": (2, 3, 8, 6)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, "clip is a share above 0 and up to 1, not 0"),
        ({"clip": 1.5}, "clip is a share above 0 and up to 1, not 1.5"),
        ({"inputs": torch.rand(2, 3, 8, 6)}, "give each of the inputs by name: 'rgb', 'depth'"),
        ({"inputs": {"rgb": torch.rand(2, 3, 8, 6)}}, "no input 'depth'"),
        ({"inputs": {"rgb": torch.rand(2, 3, 8, 8)}, "attributions": ONE}, r"input 'rgb' \(2, 3, 8, 8\) is not what"),
        ({"spectral": ["dept"]}, "no input 'dept'; did you mean 'depth'"),
        ({"rows": ["one"]}, r"2 samples, but 1 labels: \['one'\]"),
        ({"attributions": attributed(units=False, shapes={"words": (2, 7, 5)})}, "there is no image in Attributions"),
    ],
)
def test_what_does_not_fit_is_named(inputs: dict[str, Tensor], change: dict[str, object], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        saliency_figure(**{"inputs": inputs, "attributions": attributed(units=False), **change})


def test_what_is_neither_an_image_nor_a_clip_is_named() -> None:
    x = torch.rand(2, 2, 3, 4, 6, 6)
    with pytest.raises(MulticamError, match=r"input 'x' \(2, 2, 3, 4, 6, 6\) is neither an image nor a clip"):
        saliency_figure(x, Attributions({"x": x}, torch.zeros(2)))
