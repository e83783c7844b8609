"""Maps into printable figures: tiles in rows and columns, labels, captions, and what the colours mean.

Tiles take raw maps, not normalised ones: the colour bars need their units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from math import ceil
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.figures.colours import Colormap, colorize, overlay, peaks, to_rgb
from multicam.figures.page import Picture, Sheet, Texts

Scale = Literal["shared", "column", "each"]
_PAGE_IN, _EDGE_IN = 8.5, 0.04  # all rows of tiles together, the page's margin
_LEGIBLE_IN, _BAND_IN = 0.75, 0.1  # columns continue below rather than be smaller than this; the space above them
_BAR_IN = 2.4, 0.09  # the largest colour bar
_TEXT_PT, _NOTE_PT = 8.0, 7.0
TILE_ASPECTS = 0.5, 3.0  # a place is so many times wider than high, at least and at most
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
    shown = _Shown.of(tiles, columns, rows, scale, colormap)
    sheet = Sheet()
    # Sizes first, then places, then ink: nothing overlaps, whatever the texts and the shapes of the tiles.
    side = sheet.fit(rows, [0.9] * len(rows), _TEXT_PT)
    across = _Across.of(shown, _EDGE_IN + (side.width + 0.08 if rows else 0), width, tallest)
    bars = _bars(shown, across)
    words = _words(sheet, shown, across, bars, side, title, _legend(bars, quantity, units))
    down = _Down.of(shown, across, bars, words)
    end = down.floor[-1] + down.foot[-1]
    sheet.page.set_size_inches(across.right + _EDGE_IN, end + words.legend.height)
    sheet.write(words.title, [across.middle], _EDGE_IN)
    _draw_labels(sheet, shown, across, down, words)
    _draw_tiles(sheet, shown, across, down)
    _draw_bars(sheet, shown.colormap, across, down, bars, words.ticks)
    sheet.write(words.legend, [across.middle], end)
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


@dataclass(frozen=True, eq=False)
class _Shown:
    """What a figure shows, before anything has a size.

    Attributes:
        tiles: Rows of equally many.
        labels: Of each column; "" where it has none.
        groups: The columns that share a label.
        scales: Of each column.
        limits: The divisor of each map, by row and column of its tile.
        colormap: Of all maps.
        pictures: The pixels of each tile; None of an empty one.
    """

    tiles: Sequence[Sequence[Tile]]
    labels: Sequence[str]
    groups: list[list[int]]
    scales: list[Scale]
    limits: dict[tuple[int, int], float]
    colormap: Colormap
    pictures: list[list[UInt8[np.ndarray, "h w 3"] | None]]

    @classmethod
    def of(
        cls,
        tiles: Sequence[Sequence[Tile]],
        columns: Sequence[str],
        rows: Sequence[str],
        scale: Scale | Sequence[Scale],
        colormap: Colormap | None,
    ) -> "_Shown":
        """The arguments of `figure`, if they fit each other."""
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
        pictures = [
            [_drawn(tile, limits.get((r, c), 1.0), colormap) for c, tile in enumerate(row)]
            for r, row in enumerate(tiles)
        ]
        alike = [[c for c, _ in group] for _, group in groupby(enumerate(columns), key=itemgetter(1))]
        return cls(
            tiles, columns or [""] * count, alike or [[c] for c in range(count)], scales, limits, colormap, pictures
        )

    @property
    def aspects(self) -> Float[np.ndarray, "rows columns"]:
        """How many times wider than high each tile is; an empty one is square."""
        return np.array([[1 if rgb is None else rgb.shape[1] / rgb.shape[0] for rgb in row] for row in self.pictures])


@dataclass(frozen=True, eq=False)
class _Across:
    """Where the columns stand, in inches from the left edge of the page.

    Attributes:
        bands: The columns that stand side by side; each band continues below the one before.
        tall: The height that a tile may have.
        left: Where the first column of each band begins.
        x: Where each column begins.
        wide: How wide it is.
        spans: Where each group of columns with one label begins and ends.
    """

    bands: list[list[int]]
    tall: float
    left: float
    x: Float[np.ndarray, " columns"]
    wide: Float[np.ndarray, " columns"]
    spans: Float[np.ndarray, "groups 2"]

    @classmethod
    def of(cls, shown: _Shown, left: float, width: float, tallest: float) -> "_Across":
        """The columns of a page of this width, right of the labels of the rows."""
        shapes = shown.aspects.max(0).clip(*TILE_ASPECTS)
        gaps = np.array([0.05 if a == b else 0.14 for a, b in pairwise(shown.labels)] + [0.0])
        bands, tall = _bands(shown.groups, gaps, shapes, len(shown.tiles), width - left - _EDGE_IN, tallest)
        if tall < 0.1:
            raise MulticamError(f"{len(shapes)} columns of tiles do not fit into {width} inches: give a larger width")
        wide = shapes * tall
        x = left + np.concatenate([np.cumsum(wide[band] + gaps[band]) - wide[band] - gaps[band] for band in bands])
        spans = np.array([[x[group[0]], x[group[-1]] + wide[group[-1]]] for group in shown.groups])
        return cls(bands, tall, left, x, wide, spans)

    @property
    def right(self) -> float:
        """Where the last column ends."""
        return float((self.x + self.wide).max())

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


class _Words(NamedTuple):
    """The texts of a figure, each of a size and with line breaks that make it fit its place.

    Attributes:
        side: The label of each row.
        title: The line on top.
        heads: The label of each group of columns.
        captions: The caption of each tile, by row and band.
        ticks: Three marks for each colour bar.
        legend: What the colours mean.
    """

    side: Texts
    title: Texts
    heads: Texts
    captions: list[list[Texts]]
    ticks: Texts
    legend: Texts


def _words(
    sheet: Sheet, shown: _Shown, across: _Across, bars: Sequence["_Bar"], side: Texts, title: str, legend: str
) -> _Words:
    room = across.right - across.left
    heads = [shown.labels[group[0]] for group in shown.groups]
    count = len(across.wide)
    notes = sheet.fit(
        [tile.caption for row in shown.tiles for tile in row], [*across.wide] * len(shown.tiles), _NOTE_PT
    )
    marks = [_ticks(bar, shown.colormap) for bar in bars]
    # The three marks of a bar, or the two at its ends, never meet.
    rooms = [bar.length / (3.3 if mark[1] else 2.2) for bar, mark in zip(bars, marks, strict=True) for _ in mark]
    return _Words(
        side,
        title=sheet.fit([title], [room], _TEXT_PT + 1),
        heads=sheet.fit(heads, across.spans[:, 1] - across.spans[:, 0], _TEXT_PT),
        captions=[
            [notes.part(r * count + band[0], len(band)) for band in across.bands] for r in range(len(shown.tiles))
        ],
        ticks=sheet.fit([text for mark in marks for text in mark], rooms, _NOTE_PT),
        legend=sheet.fit([legend], [room], _NOTE_PT),
    )


@dataclass(frozen=True, eq=False)
class _Down:
    """Where the rows of each band stand, in inches from the upper edge of the page.

    Attributes:
        high: The height of each tile.
        deep: The height of each row of tiles.
        y: Where it begins.
        floor: Where the captions of a band's last row end.
        foot: The height of the colour bars below it, with their marks.
    """

    high: Float[np.ndarray, "rows columns"]
    deep: Float[np.ndarray, "rows bands"]
    y: Float[np.ndarray, "rows bands"]
    floor: Float[np.ndarray, " bands"]
    foot: Float[np.ndarray, " bands"]

    @classmethod
    def of(cls, shown: _Shown, across: _Across, bars: Sequence["_Bar"], words: _Words) -> "_Down":
        """The rows below the title and above the legend."""
        bands = across.bands
        high = np.minimum(across.tall, across.wide / shown.aspects)
        tallest = np.stack([high[:, band].max(1) for band in bands], 1)
        deep = np.maximum(tallest, [[words.side.part(r, 1).height] for r in range(len(high))])
        steps = deep + [[texts.height for texts in row] for row in words.captions] + 0.06
        heads = [[g for g, group in enumerate(shown.groups) if group[0] in band] for band in bands]
        above = np.array([max(words.heads.part(g, 1).height for g in groups) for groups in heads])
        barred = [any(bar.column in band for bar in bars) for band in bands]
        foot = np.where(barred, _BAR_IN[1] + 0.04 + words.ticks.height, 0)
        blocks = above + steps.sum(0) + foot + _BAND_IN
        starts = 2 * _EDGE_IN + words.title.height + np.cumsum(blocks) - blocks
        y = starts + above + np.cumsum(steps, 0) - steps
        return cls(high, deep, y, y[-1] + steps[-1], foot)


def _draw_labels(sheet: Sheet, shown: _Shown, across: _Across, down: _Down, words: _Words) -> None:
    """Write the labels of columns and rows, and the captions."""
    for k, band in enumerate(across.bands):
        for g, group in enumerate(shown.groups):
            if group[0] in band:
                sheet.write(words.heads.part(g, 1), [across.spans[g].mean()], down.y[0, k] - 0.03, va="bottom")
        for r, (y, deep) in enumerate(zip(down.y[:, k], down.deep[:, k], strict=True)):
            sheet.write(words.side.part(r, 1), [across.left - 0.08], y + deep / 2, ha="right", va="center")
            sheet.write(words.captions[r][k], (across.x + across.wide / 2)[band], y + deep + 0.03)


def _draw_tiles(sheet: Sheet, shown: _Shown, across: _Across, down: _Down) -> None:
    """Put each picture into the middle of its place, and its text into the middle of the picture."""
    columns = [(k, c) for k, band in enumerate(across.bands) for c in band]
    for (r, row), (k, c) in product(enumerate(shown.tiles), columns):
        rgb, high = shown.pictures[r][c], down.high[r, c]
        if rgb is None:
            continue
        wide = high * shown.aspects[r, c]
        x, y = across.x[c] + (across.wide[c] - wide) / 2, down.y[r, k] + (down.deep[r, k] - high) / 2
        sheet.show(rgb, (x, y, wide, high), "tile", region=row[c].region)
        inside = sheet.fit([row[c].text], [0.9 * wide], _TEXT_PT)
        color = "black" if rgb.mean() > _BRIGHT else "white"
        sheet.write(inside, [x + wide / 2], y + (high - inside.height) / 2, color=color)


def _draw_bars(
    sheet: Sheet, colormap: Colormap, across: _Across, down: _Down, bars: Sequence["_Bar"], ticks: Texts
) -> None:
    """Put each colour bar below its column, with its marks."""
    low = -1 if colormap == "diverging" else 0
    ramp = colorize(torch.linspace(low, 1, 255)[None], colormap)
    for i, bar in enumerate(bars):
        end = next(end for band, end in zip(across.bands, down.floor, strict=True) if bar.column in band)
        place = bar.start, end + 0.02, bar.length, _BAR_IN[1]
        sheet.show(ramp, place, "bar", span=(low * bar.limit, bar.limit))
        for j, ha in enumerate(("left", "center", "right")):
            at = bar.start + j * bar.length / 2
            sheet.write(ticks.part(3 * i + j, 1), [at], end + _BAR_IN[1] + 0.04, ha=ha)


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


def _drawn(tile: Tile, limit: float, colormap: Colormap) -> UInt8[np.ndarray, "h w 3"] | None:
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


def _bars(shown: _Shown, across: _Across) -> list[_Bar]:
    """One bar in the middle where all maps are on one scale, or each on its own; else one for each column."""
    columns = {c: limit for (_, c), limit in shown.limits.items()}
    kinds = {shown.scales[c] for c in columns}
    if len(kinds) == 1 and kinds != {"column"}:
        length = min(across.right - across.x.min(), _BAR_IN[0])
        c, limit = max(columns.items())
        start = (across.x.min() + across.right - length) / 2
        return [_Bar(len(across.x) - 1, start, length, limit, shown.scales[c])]
    return [_Bar(c, across.x[c], across.wide[c], limit, shown.scales[c]) for c, limit in columns.items()]


def _legend(bars: Sequence[_Bar], quantity: str, units: str) -> str:
    own = any(bar.scale == "each" for bar in bars)
    said = [units] * any(bar.scale != "each" for bar in bars) + ["each map by its own maximum"] * own
    return f"{quantity}, " + "; max: ".join(said) if bars else ""


def _ticks(bar: _Bar, colormap: Colormap) -> tuple[str, str, str]:
    """The marks at the start, the middle and the end of a bar; none in the middle of a short one."""
    half, top = ("", "max") if bar.scale == "each" else (f"{bar.limit / 2:.3g}", f"{bar.limit:.3g}")
    low, half = (f"\N{MINUS SIGN}{top}", "0") if colormap == "diverging" else ("0", half)
    return low, half if bar.length > 1 else "", top
