"""Dreams are drawn on the scale of their bounds, with how far they rose; and every step of every image is a point."""

import numpy as np
import pytest
import torch
from torch import Tensor

from multicam.figures.colours import to_rgb
from multicam.figures.dreams import dream_figure, history_figure
from multicam.inside.dream import Dream
from multicam.inside.parameterizations import Bounds
from tests.helpers.pictures import axes, pixels, said


def dream(channels: int = 3, n: int = 2, low: float = -2.0, high: float = 2.0) -> Dream:
    """Images that use less than their bounds."""
    g = torch.Generator().manual_seed(0)
    images = low + (high - low) * (0.25 + 0.5 * torch.rand(n, channels, 6, 8, generator=g))
    start, history = torch.arange(n) / 8, torch.rand(5, n, generator=g)
    ends = [torch.full((channels, 1, 1), end) for end in (low, high)]
    return Dream(images, start + 10, start, history, "rgb", tuple(f"channel {i}" for i in range(n)), Bounds(*ends))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_shown_within_their_bounds(channels: int) -> None:
    found = dream(channels)
    tiles = pixels(dream_figure(found, title="Dreams"))
    for tile, image in zip(tiles, found.images, strict=True):
        assert np.array_equal(tile, to_rgb((image + 2) / 4))  # not stretched: 0.25 of the range stays dark, not black
        assert tile.min() >= 60 and tile.max() <= 195


def test_of_more_channels_the_mean_is_shown_from_black_to_white() -> None:
    found = dream(channels=8)
    for tile, image in zip(pixels(dream_figure(found)), found.images, strict=True):
        mean = image.mean(0, keepdim=True)
        assert np.array_equal(tile, to_rgb((mean - mean.min()) / (mean.max() - mean.min())))


def test_captions_say_how_far_each_rose() -> None:
    assert said(dream_figure(dream(), title="Dreams"))[:3] == ["Dreams", "channel 0 0 to 10", "channel 1 0.125 to 10.1"]


@pytest.mark.parametrize(("n", "rows"), [(1, [1]), (4, [4]), (5, [3, 2]), (8, [4, 4]), (9, [5, 4])])
def test_rows_are_of_equal_length_as_far_as_images_go(n: int, rows: list[int]) -> None:
    tops = [round(a.get_window_extent().y0) for a in axes(dream_figure(dream(n=n)), "tile")]
    assert [tops.count(top) for top in sorted({*tops}, reverse=True)] == rows


@pytest.mark.parametrize(("n", "legend"), [(3, True), (11, False)])
def test_every_image_has_a_line_through_its_history(n: int, legend: bool) -> None:
    found = dream(n=n)
    (plot,) = history_figure(found, title="History").figure.axes
    assert plot.get_title() == "History" and (plot.get_legend() is not None) == legend
    drawn: Tensor = torch.tensor(np.array([line.get_ydata() for line in plot.lines])).T
    assert torch.equal(drawn, found.history)
    assert all([*line.get_xdata()] == [1, 2, 3, 4, 5] for line in plot.lines)
    assert [line.get_label() for line in plot.lines] == [*found.labels]
