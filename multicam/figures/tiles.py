"""Maps into printable figures: tiles in rows and columns, labels, captions, and what the colours mean.

Tiles take raw maps, not normalised ones: the colour bars need their units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.figures.colours import Colormap, colorize, overlay, peaks, to_rgb
from multicam.figures.page import Picture, Sheet
from multicam.figures.plan import BAR_HIGH, Content, Plan, Scale

_TEXT_PT = 8.0  # of the text inside a tile
_BRIGHT = 110  # of 255; text on anything brighter is black


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a `figure`: an image, a raw map, or the map over the image. `Tile()` leaves its place empty.

    Below a map the image is grey, so that every colour is evidence. Of a clip or volume, the frame with the strongest evidence is shown, without a map of each frame the middle one.

    Attributes:
        image: `(c h w)` or `(c t h w)`, shown as `to_rgb` shows it.
        map: `(h w)` or `(t h w)`, not normalised. Without an image it is shown alone.
        caption: The text below.
        region: A true region `(h w)` of any resolution, drawn as a thin contour.
        text: Written in the middle, such as the value of a map with one cell.
    """

    image: Tensor | None = None
    map: Tensor | None = None
    caption: str = ""
    region: Bool[Tensor, "h w"] | None = None
    text: str = ""


def figure(
    tiles: Sequence[Sequence[Tile]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    scale: Scale | Sequence[Scale] = "shared",
    quantity: str = "evidence",
    units: str = "units of the score",
    note: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
    tallest: float = 1.6,
) -> Picture:
    """A printable figure of tiles in rows and columns, with what its colours mean below.

    Columns that would make the tiles too small to read continue in another band of rows below.

    Args:
        tiles: Rows of equally many tiles.
        columns: A label for each column; equal neighbours share one label and stand closer together.
        rows: A label for each row.
        title: The line on top.
        scale: Which maps share a divisor, and so a colour bar: all (`"shared"`), those of one column (`"column"`: one
            method or one input each), or none (`"each"`: the strongest evidence of every map looks the same); or one of
            these words for each column.
        quantity: What the maps show, for the colour bar.
        units: The units of the maps' values, for the colour bar.
        note: A line below all, such as what the captions mean.
        colormap: See `colorize`; one for the whole figure, diverging when any map has a negative value.
        width: The widest the figure may be, in inches: 7 is a full page of most papers, where the text prints at 8 pt.
        tallest: The tallest a tile may be, in inches.

    Raises:
        MulticamError: matplotlib is missing, labels or tiles do not fit each other, or a map is not finite.

    Example:
        >>> import torch
        >>> image, map = torch.rand(3, 8, 8), torch.rand(8, 8)
        >>> figure([[Tile(image), Tile(image, map, caption="ours")]], columns=["input", "map"])  # doctest: +ELLIPSIS
        Picture(2 tiles, ...)
    """
    scales = _scales(tiles, columns, rows, scale)
    limits = _limits(tiles, scales)
    signed = any((tile.map < 0).any() for row in tiles for tile in row if tile.map is not None)
    colormap = colormap or ("diverging" if signed else "inferno")
    pictures = [
        [_picture(tile, limits.get((r, c), 1.0), colormap) for c, tile in enumerate(row)] for r, row in enumerate(tiles)
    ]
    content = Content(
        title,
        columns,
        rows,
        captions=[[tile.caption for tile in row] for row in tiles],
        aspects=np.array([[1 if rgb is None else rgb.shape[1] / rgb.shape[0] for rgb in row] for row in pictures]),
        scales=scales,
        limits=limits,
        signed=colormap == "diverging",
        quantity=quantity,
        units=units,
        note=note,
    )
    sheet = Sheet()
    plan = Plan.of(sheet, content, width, tallest)
    sheet.page.set_size_inches(*plan.size)
    for (r, row), c in product(enumerate(tiles), range(len(scales))):
        rgb = pictures[r][c]
        if rgb is not None:
            _draw(sheet, row[c], rgb, plan.place(r, c))
    plan.write(sheet)
    low = -1 if colormap == "diverging" else 0
    ramp = colorize(torch.linspace(low, 1, 255)[None], colormap)
    for bar in plan.bars:
        place = bar.start, plan.below(bar) + 0.02, bar.length, BAR_HIGH
        sheet.show(ramp, place, "bar", span=(low * bar.limit, bar.limit))
    return Picture(sheet.page)


def strongest_frame(map: Float[Tensor, "t h w"]) -> int:
    """The frame with the largest absolute value, which is the one that pictures of a clip or volume show."""
    return int(map.abs().amax((1, 2)).argmax())


def line_labels(rows: Sequence[str], names: Sequence[str], samples: int) -> list[str]:
    """The label of each line, where there is a line for each input of each sample; empty where none needs one.

    Args:
        rows: A label for each sample, or none.
        names: The inputs, which a label names where there are several.
        samples: How many samples.

    Raises:
        MulticamError: There are not as many labels as samples.

    Example:
        >>> line_labels(["day", "night"], ["rgb", "depth"], 2)
        ['day rgb', 'day depth', 'night rgb', 'night depth']
    """
    if rows and len(rows) != samples:
        raise MulticamError(f"{samples} samples, but {len(rows)} labels: {list(rows)}")
    labels = [" ".join([*rows[i : i + 1], *[name] * (len(names) > 1)]) for i in range(samples) for name in names]
    return labels if any(labels) else []


def _scales(
    tiles: Sequence[Sequence[Tile]], columns: Sequence[str], rows: Sequence[str], scale: Scale | Sequence[Scale]
) -> list[Scale]:
    """The scale of each column, if the arguments of `figure` fit each other."""
    if not tiles or not tiles[0] or len({len(row) for row in tiles}) > 1:
        raise MulticamError(f"a figure needs rows of equally many tiles, not {[len(row) for row in tiles]}")
    count = len(tiles[0])
    scales = [scale] * count if isinstance(scale, str) else list(scale)
    for what, expected, given in (
        ("columns of tiles, but {} labels", count, columns),
        ("rows of tiles, but {} labels", len(tiles), rows),
        ("columns of tiles, but {} scales", count, scales),
    ):
        if given and len(given) != expected:
            raise MulticamError(f"{expected} {what.format(len(given))}: {list(given)}")
    return scales


def _limits(tiles: Sequence[Sequence[Tile]], scales: Sequence[Scale]) -> dict[tuple[int, int], float]:
    """The divisor of each map, by row and column of its tile."""
    tops = {}
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):
            if tile.map is not None:
                what = f"the map in row {r}, column {c}"
                if tile.map.ndim not in (2, 3):
                    raise MulticamError(f"{what} is {tuple(tile.map.shape)}: a tile shows (h w), or a frame of (t h w)")
                tops[r, c] = peaks(tile.map[None].float(), what).item()
    alike: Mapping[Scale, Callable[[tuple[int, int]], object]] = {
        "shared": lambda _: None,
        "column": itemgetter(1),
        "each": lambda at: at,
    }
    for scale in scales:
        if scale not in alike:
            raise unknown("scale", scale, alike)
    keys = {at: alike[scales[at[1]]](at) for at in tops}
    return {at: max(top for other, top in tops.items() if keys[other] == keys[at]) or 1.0 for at in tops}


def _picture(tile: Tile, limit: float, colormap: Colormap) -> UInt8[np.ndarray, "h w 3"] | None:
    image, map = tile.image, tile.map
    if map is None:
        return None if image is None else to_rgb(image[None]).squeeze(0)
    if map.ndim == 3:
        frame = strongest_frame(map)
        if image is not None and image.ndim == 4:
            image = image[:, frame * image.shape[1] // len(map)]
        map = map[frame]
    map = map.float() / limit
    if image is None:
        return colorize(map, colormap)
    grey = to_rgb(image[None]).mean(-1).round().astype(np.uint8)
    return overlay(torch.from_numpy(grey), map, colormap=colormap)


def _draw(sheet: Sheet, tile: Tile, rgb: UInt8[np.ndarray, "h w 3"], place: tuple[float, float, float, float]) -> None:
    """Put a picture into its place, and the tile's text into the middle of it."""
    x, y, wide, high = place
    sheet.show(rgb, place, "tile", region=tile.region)
    inside = sheet.fit([tile.text], [0.9 * wide], _TEXT_PT)
    color = "black" if rgb.mean() > _BRIGHT else "white"
    sheet.write(inside, [x + wide / 2], y + (high - inside.height) / 2, color=color)
