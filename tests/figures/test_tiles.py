"""Tiles show what they are given, on the scale that is asked for."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from multicam.errors import MulticamError
from multicam.figures.colours import colorize
from multicam.figures.tiles import Tile, figure
from tests.helpers.pictures import limits, pixels


def test_a_scale_for_each_column() -> None:
    map = torch.rand(4, 4)
    picture = figure([[Tile(map=map), Tile(map=2 * map)], [Tile(map=map / 2), Tile(map=map)]], scale=["column", "each"])
    tiles = pixels(picture)
    assert np.array_equal(tiles[1], tiles[3]) and not np.array_equal(tiles[0], tiles[2])
    with pytest.raises(MulticamError, match="2 columns of tiles, but 1 scales"):
        figure([[Tile(map=map), Tile(map=map)]], scale=["each"])


def test_methods_side_by_side_each_on_the_scale_of_its_column() -> None:
    image, map = torch.rand(3, 8, 8), torch.rand(8, 8)
    top = map.max().item()
    picture = figure(
        [[Tile(image), Tile(image, map), Tile(image, 9 * map)], [Tile(), Tile(map=map / 2), Tile(map=map)]],
        columns=["input", "ours", "theirs"],
        rows=["rgb", "depth"],
        scale="column",
    )
    assert limits(picture) == [(0, pytest.approx(top)), (0, pytest.approx(9 * top))]
    tiles = pixels(picture)
    assert len(tiles) == 5
    assert np.abs(tiles[1].astype(int) - tiles[2]).max() <= 1
    assert np.array_equal(tiles[3], colorize(map / 2 / top))
    assert repr(picture).startswith("Picture(5 tiles, ")


def test_a_signed_map_makes_the_whole_figure_diverging() -> None:
    positive, signed = torch.rand(4, 4), torch.eye(4) * -2
    tiles = pixels(figure([[Tile(map=positive), Tile(map=signed)]]))
    assert np.array_equal(tiles[0], colorize(positive / 2, "diverging"))


def test_no_evidence_anywhere_is_no_colour() -> None:
    picture = figure([[Tile(map=torch.zeros(4, 4))]])
    assert np.array_equal(pixels(picture)[0], colorize(torch.zeros(4, 4)))
    assert limits(picture) == [(0, 1)]


@pytest.mark.parametrize("tiles", [[], [[]], [[Tile()], [Tile(), Tile()]]])
def test_tiles_stand_in_rows_and_columns(tiles: list[list[Tile]]) -> None:
    with pytest.raises(MulticamError, match="rows of equally many tiles"):
        figure(tiles)


def test_unknown_choices_are_named_and_pyplot_is_never_imported() -> None:
    # In a process of its own: here the type checks would object first, and other libraries have imported pyplot.
    code = """
import sys, torch
from multicam.errors import MulticamError
from multicam.figures import Tile, colorize, figure, normalize
assert "matplotlib" not in sys.modules
x = torch.rand(1, 4, 4)
figure([[Tile(x, x[0])]]).rgb
assert "matplotlib.pyplot" not in sys.modules
for call in (
    lambda: normalize(x, "share"),
    lambda: colorize(x, "infernal"),
    lambda: figure([[Tile(map=x[0])]], scale="columns"),
):
    try:
        call()
    except MulticamError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split("?")[0] for line in shown] == [
        "no scale 'share'; did you mean 'shared'",
        "no colour map 'infernal'; did you mean 'inferno'",
        "no scale 'columns'; did you mean 'column'",
    ]
