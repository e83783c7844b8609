"""Maps into printable figures: tiles in rows and columns, labels, captions, and what the colours mean.

Tiles take raw maps, not normalised ones: the colour bars need their units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.figures.colours import Colormap, colorize, overlay, peaks, to_rgb
from multicam.figures.page import Picture, Sheet

Scale = Literal["shared", "column", "each"]
_PAGE_IN, _EDGE_IN = 8.5, 0.04  # all rows of tiles together, the page's margin
_LEGIBLE_IN, _BAND_IN = 0.75, 0.1  # columns continue below rather than be smaller than this; the space above them
_BAR_IN = 2.4, 0.09  # the largest colour bar
_TEXT_PT, _NOTE_PT = 8.0, 7.0
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
    limits = _limits(tiles, scales)
    signed = any((tile.map < 0).any() for row in tiles for tile in row if tile.map is not None)
    colormap = colormap or ("diverging" if signed else "inferno")
    drawn = [
        [_draw(tile, limits.get((r, c), 1.0), colormap) for c, tile in enumerate(row)] for r, row in enumerate(tiles)
    ]
    sheet = Sheet()

    # Sizes first, then the page, then places: nothing overlaps, whatever the texts and the shapes of the tiles.
    side = sheet.fit(rows, [0.9] * len(rows), _TEXT_PT)
    left = _EDGE_IN + (side.width + 0.08 if rows else 0)
    groups = [[c for c, _ in group] for _, group in groupby(enumerate(columns), key=itemgetter(1))]
    gaps = np.array([0.05 if a == b else 0.14 for a, b in pairwise(columns or [""] * count)] + [0.0])
    aspects = np.array([[1 if rgb is None else rgb.shape[1] / rgb.shape[0] for rgb in row] for row in drawn])
    shapes = aspects.max(0).clip(0.5, 3)
    bands, tall = _bands(
        groups or [[c] for c in range(count)], gaps, shapes, len(tiles), width - left - _EDGE_IN, tallest
    )
    if tall < 0.1:
        raise MulticamError(f"{count} columns of tiles do not fit into {width} inches: give a larger width")
    wide = shapes * tall
    x = left + np.concatenate([np.cumsum(wide[band] + gaps[band]) - wide[band] - gaps[band] for band in bands])
    right = (x + wide).max()
    high = np.minimum(tall, wide / aspects)
    deep = np.maximum(
        np.stack([high[:, band].max(1) for band in bands], 1), [[side.part(r, 1).height] for r in range(len(tiles))]
    )
    starts, ends = np.array([x[g[0]] for g in groups]), np.array([x[g[-1]] + wide[g[-1]] for g in groups])
    top = sheet.fit([title], [right - left], _TEXT_PT + 1)
    head = sheet.fit([columns[g[0]] for g in groups], ends - starts, _TEXT_PT)
    heads = [[g for g, group in enumerate(groups) if group[0] in band] for band in bands]
    notes = sheet.fit([tile.caption for row in tiles for tile in row], [*wide] * len(tiles), _NOTE_PT)
    below = [[notes.part(r * count + band[0], len(band)) for band in bands] for r in range(len(tiles))]
    steps = deep + [[texts.height for texts in row] for row in below] + 0.06
    bars = _bars(limits, scales, x, wide)
    marks = [_ticks(bar, colormap) for bar in bars]
    # The three marks of a bar, or the two at its ends, never meet.
    rooms = [bar.length / (3.3 if mark[1] else 2.2) for bar, mark in zip(bars, marks, strict=True) for _ in mark]
    ticks = sheet.fit([text for mark in marks for text in mark], rooms, _NOTE_PT)
    own = any(bar.scale == "each" for bar in bars)
    said = [units] * any(bar.scale != "each" for bar in bars) + ["each map by its own maximum"] * own
    legend = sheet.fit([f"{quantity}, " + "; max: ".join(said) if bars else ""], [right - left], _NOTE_PT)
    foot = np.array(
        [_BAR_IN[1] + 0.04 + ticks.height if any(bar.column in band for bar in bars) else 0 for band in bands]
    )
    above = np.array([max((head.part(g, 1).height for g in named), default=0) for named in heads])
    blocks = above + steps.sum(0) + foot + _BAND_IN
    y = 2 * _EDGE_IN + top.height + np.cumsum(blocks) - blocks + above + np.cumsum(steps, 0) - steps
    floor = y[-1] + steps[-1]
    sheet.page.set_size_inches(right + _EDGE_IN, floor[-1] + foot[-1] + legend.height)

    sheet.write(top, [(left + right) / 2], _EDGE_IN)
    for k, band in enumerate(bands):
        for g in heads[k]:
            sheet.write(head.part(g, 1), [(starts[g] + ends[g]) / 2], y[0, k] - 0.03, va="bottom")
        for r, row in enumerate(tiles):
            sheet.write(side.part(r, 1), [left - 0.08], y[r, k] + deep[r, k] / 2, ha="right", va="center")
            sheet.write(below[r][k], x[band] + wide[band] / 2, y[r, k] + deep[r, k] + 0.03)
            for c in band:
                rgb = drawn[r][c]
                if rgb is not None:
                    w, h = high[r, c] * aspects[r, c], high[r, c]
                    box = x[c] + (wide[c] - w) / 2, y[r, k] + (deep[r, k] - h) / 2, w, h
                    sheet.show(rgb, box, "tile", region=row[c].region)
                    inside = sheet.fit([row[c].text], [0.9 * w], _TEXT_PT)
                    middle = box[1] + (h - inside.height) / 2
                    sheet.write(inside, [box[0] + w / 2], middle, color="black" if rgb.mean() > _BRIGHT else "white")
    low = -1 if colormap == "diverging" else 0
    ramp = colorize(torch.linspace(low, 1, 255)[None], colormap)
    for i, bar in enumerate(bars):
        end = next(end for band, end in zip(bands, floor, strict=True) if bar.column in band)
        place = bar.start, end + 0.02, bar.length, _BAR_IN[1]
        sheet.show(ramp, place, "bar", span=(low * bar.limit, bar.limit))
        for j, ha in enumerate(("left", "center", "right")):
            at = bar.start + j * bar.length / 2
            sheet.write(ticks.part(3 * i + j, 1), [at], end + _BAR_IN[1] + 0.04, ha=ha)
    sheet.write(legend, [(left + right) / 2], floor[-1] + foot[-1])
    return Picture(sheet.page)


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


def _draw(tile: Tile, limit: float, colormap: Colormap) -> UInt8[np.ndarray, "h w 3"] | None:
    image, map = tile.image, tile.map
    if map is None:
        return None if image is None else to_rgb(image[None]).squeeze(0)
    if map.ndim == 3:
        frame = int(map.abs().amax((1, 2)).argmax())
        if image is not None and image.ndim == 4:
            image = image[:, frame * image.shape[1] // len(map)]
        map = map[frame]
    map = map.float() / limit
    if image is None:
        return colorize(map, colormap)
    grey = to_rgb(image[None]).mean(-1).round().astype(np.uint8)
    return overlay(torch.from_numpy(grey), map, colormap=colormap)


def _bands(
    groups: Sequence[list[int]], gaps: np.ndarray, shapes: np.ndarray, rows: int, room: float, tallest: float
) -> tuple[list[list[int]], float]:
    """The columns of each band, with groups kept together, and the height of a tile.

    As few bands as make tiles legible, or else those with the largest tiles.
    """
    found = []
    for count in range(1, len(groups) + 1):
        bands: list[list[int]] = [[]]
        for group in groups:
            if bands[-1] and len(bands[-1]) + len(group) > ceil(len(shapes) / count):
                bands.append([])
            bands[-1] += group
        wide = (float((room - gaps[band[:-1]].sum()) / shapes[band].sum()) for band in bands)
        found.append((bands, min(tallest, _PAGE_IN / (rows * len(bands)), *wide)))
        if found[-1][1] >= min(_LEGIBLE_IN, 0.7 * tallest):
            break
    return max(found, key=itemgetter(1))


class _Bar(NamedTuple):
    """A colour bar below the tiles of a column: where it starts, how long it is, and the value it ends with."""

    column: int
    start: float
    length: float
    limit: float
    scale: Scale


def _bars(
    limits: Mapping[tuple[int, int], float], scales: Sequence[Scale], x: np.ndarray, wide: np.ndarray
) -> list[_Bar]:
    columns = {c: limit for (_, c), limit in limits.items()}
    if {scales[c] for c in columns} - {"column"} and len({scales[c] for c in columns}) == 1:
        left, right = x.min(), (x + wide).max()
        length = min(right - left, _BAR_IN[0])
        c, limit = max(columns.items())
        return [_Bar(len(x) - 1, (left + right - length) / 2, length, limit, scales[c])]
    return [_Bar(c, x[c], wide[c], limit, scales[c]) for c, limit in columns.items()]


def _ticks(bar: _Bar, colormap: Colormap) -> tuple[str, str, str]:
    """The marks at the start, the middle and the end of a bar; none in the middle of a short one."""
    half, top = ("", "max") if bar.scale == "each" else (f"{bar.limit / 2:.3g}", f"{bar.limit:.3g}")
    low, half = (f"\N{MINUS SIGN}{top}", "0") if colormap == "diverging" else ("0", half)
    return low, half if bar.length > 1 else "", top
