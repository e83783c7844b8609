"""Where everything on a page of tiles stands: columns first, then texts that fit them, then rows that fit both.

All lengths are in inches, from the upper left corner of the page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from multicam.errors import MulticamError
from multicam.figures.page import Sheet, Texts

Scale = Literal["shared", "column", "each"]
TILE_ASPECTS = 0.5, 3.0  # the place of a tile is so many times wider than high, at least and at most
BAR_HIGH = 0.09
_PAGE, _EDGE = 8.5, 0.04  # all rows of tiles together, the page's margin
_LEGIBLE, _BAND = 0.75, 0.1  # columns continue below rather than be smaller than this; the space above them
_SIDE, _BAR_LONG = 0.9, 2.4  # the widest label of a row, the longest colour bar
_TEXT_PT, _NOTE_PT = 8.0, 7.0


@dataclass(frozen=True, eq=False)
class Content:
    """What a page has to have room for.

    Attributes:
        title: The line on top.
        columns: The label of each column, or none; equal neighbours share theirs.
        rows: The label of each row, or none.
        captions: The text below each tile.
        aspects: How many times wider than high each tile is.
        scales: Which maps share a colour bar, for each column.
        limits: The value that the colours of a map end with, by its row and column.
        signed: Whether colours are of negative values, too.
        quantity: What the maps show.
        units: The units of their values.
        note: A sentence about the captions, or none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    captions: Sequence[Sequence[str]]
    aspects: Float[np.ndarray, "rows columns"]
    scales: Sequence[Scale]
    limits: Mapping[tuple[int, int], float]
    signed: bool
    quantity: str
    units: str
    note: str = ""

    @property
    def groups(self) -> list[list[int]]:
        """The columns that share a label."""
        alike = [[c for c, _ in group] for _, group in groupby(enumerate(self.columns), key=itemgetter(1))]
        return alike or [[c] for c in range(len(self.scales))]


class Bar(NamedTuple):
    """A colour bar below the tiles of a column: where it starts, how long it is, and the value it ends with."""

    column: int
    start: float
    length: float
    limit: float
    scale: Scale

    def ticks(self, signed: bool) -> tuple[str, str, str]:
        """The marks at the start, the middle and the end; none in the middle of a short one."""
        half, top = ("", "max") if self.scale == "each" else (f"{self.limit / 2:.3g}", f"{self.limit:.3g}")
        low, half = (f"\N{MINUS SIGN}{top}", "0") if signed else ("0", half)
        return low, half if self.length > 1 else "", top


@dataclass(frozen=True, eq=False)
class _Across:
    """Where the columns stand.

    Attributes:
        bands: The columns that stand side by side; each band continues below the one before.
        tall: The height that a tile may have.
        left: Where the first column of each band begins.
        x: Where each column begins.
        wide: How wide it is.
    """

    bands: list[list[int]]
    tall: float
    left: float
    x: Float[np.ndarray, " columns"]
    wide: Float[np.ndarray, " columns"]

    @classmethod
    def of(cls, content: Content, left: float, width: float, tallest: float) -> "_Across":
        """The columns of a page of this width, right of the labels of the rows."""
        shapes = content.aspects.max(0).clip(*TILE_ASPECTS)
        labels = content.columns or [""] * len(shapes)
        gaps = np.array([0.05 if a == b else 0.14 for a, b in pairwise(labels)] + [0.0])
        room = width - left - _EDGE
        bands, tall = _bands(content.groups, gaps, shapes, len(content.aspects), room, tallest)
        if tall < 0.1:
            raise MulticamError(f"{len(shapes)} columns of tiles do not fit into {width} inches: give a larger width")
        wide = shapes * tall
        x = left + np.concatenate([np.cumsum(wide[band] + gaps[band]) - wide[band] - gaps[band] for band in bands])
        return cls(bands, tall, left, x, wide)

    @property
    def right(self) -> float:
        """Where the last column ends."""
        return float((self.x + self.wide).max())

    def span(self, group: Sequence[int]) -> tuple[float, float]:
        """Where neighbouring columns begin and end."""
        return self.x[group[0]], self.x[group[-1]] + self.wide[group[-1]]

    def bars(self, content: Content) -> list[Bar]:
        """One bar in the middle where all maps are on one scale, or each on its own; else one for each column."""
        columns = {c: limit for (_, c), limit in content.limits.items()}
        kinds = {content.scales[c] for c in columns}
        if len(kinds) == 1 and kinds != {"column"}:
            left = self.x.min()
            length = min(self.right - left, _BAR_LONG)
            c, limit = max(columns.items())
            return [Bar(len(self.x) - 1, (left + self.right - length) / 2, length, limit, content.scales[c])]
        return [Bar(c, self.x[c], self.wide[c], limit, content.scales[c]) for c, limit in columns.items()]


class _Words(NamedTuple):
    """The texts, with line breaks and of a size that make each fit its place.

    Attributes:
        side: The label of each row.
        title: The line on top.
        heads: The label of each group of columns.
        captions: The captions of each row of each band.
        ticks: Three marks for each colour bar.
        legend: What the colours mean.
        note: What the captions mean.
    """

    side: Texts
    title: Texts
    heads: Texts
    captions: list[list[Texts]]
    ticks: Texts
    legend: Texts
    note: Texts

    @classmethod
    def of(cls, sheet: Sheet, content: Content, across: _Across, bars: Sequence[Bar], side: Texts) -> "_Words":
        """The texts of a page whose columns stand."""
        room = across.right - across.left
        labels = [content.columns[group[0]] if content.columns else "" for group in content.groups]
        spans = [across.span(group) for group in content.groups]
        rows, count = range(len(content.captions)), len(across.wide)
        notes = sheet.fit([text for row in content.captions for text in row], [*across.wide] * len(rows), _NOTE_PT)
        marks = [bar.ticks(content.signed) for bar in bars]
        # The three marks of a bar, or the two at its ends, never meet.
        rooms = [bar.length / (3.3 if mark[1] else 2.2) for bar, mark in zip(bars, marks, strict=True) for _ in mark]
        return cls(
            side,
            title=sheet.fit([content.title], [room], _TEXT_PT + 1),
            heads=sheet.fit(labels, [end - start for start, end in spans], _TEXT_PT),
            captions=[[notes.part(r * count + band[0], len(band)) for band in across.bands] for r in rows],
            ticks=sheet.fit([text for mark in marks for text in mark], rooms, _NOTE_PT),
            legend=sheet.fit([_legend(bars, content)], [room], _NOTE_PT),
            note=sheet.fit([content.note], [room], _NOTE_PT),
        )


@dataclass(frozen=True, eq=False)
class _Down:
    """Where the rows of each band stand.

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
    def of(cls, content: Content, across: _Across, bars: Sequence[Bar], words: _Words) -> "_Down":
        """The rows of a page whose columns and texts are known."""
        bands = across.bands
        high = np.minimum(across.tall, across.wide / content.aspects)
        tallest = np.stack([high[:, band].max(1) for band in bands], 1)
        deep = np.maximum(tallest, [[words.side.part(r, 1).height] for r in range(len(high))])
        steps = deep + [[texts.height for texts in row] for row in words.captions] + 0.06
        heads = [[g for g, group in enumerate(content.groups) if group[0] in band] for band in bands]
        above = np.array([max(words.heads.part(g, 1).height for g in groups) for groups in heads])
        barred = [any(bar.column in band for bar in bars) for band in bands]
        foot = np.where(barred, BAR_HIGH + 0.04 + words.ticks.height, 0)
        blocks = above + steps.sum(0) + foot + _BAND
        starts = 2 * _EDGE + words.title.height + np.cumsum(blocks) - blocks
        y = starts + above + np.cumsum(steps, 0) - steps
        return cls(high, deep, y, y[-1] + steps[-1], foot)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where everything on a page stands; nothing overlaps, whatever the texts and the shapes of the tiles."""

    content: Content
    bars: list[Bar]
    _across: _Across
    _words: _Words
    _down: _Down

    @classmethod
    def of(cls, sheet: Sheet, content: Content, width: float, tallest: float) -> "Plan":
        """The plan of a sheet, which measures the texts.

        Args:
            sheet: It.
            content: What it has to have room for.
            width: The widest the page may be.
            tallest: The tallest a tile may be.

        Raises:
            MulticamError: There are too many columns for the width.
        """
        side = sheet.fit(content.rows, [_SIDE] * len(content.rows), _TEXT_PT)
        left = _EDGE + (side.width + 0.08 if content.rows else 0)
        across = _Across.of(content, left, width, tallest)
        bars = across.bars(content)
        words = _Words.of(sheet, content, across, bars, side)
        return cls(content, bars, across, words, _Down.of(content, across, bars, words))

    @property
    def size(self) -> tuple[float, float]:
        """The width and the height of the page."""
        down, words = self._down, self._words
        return self._across.right + _EDGE, down.floor[-1] + down.foot[-1] + words.legend.height + words.note.height

    def place(self, row: int, column: int) -> tuple[float, float, float, float]:
        """A tile's `(x, y, width, height)`, in the middle of its column and its row."""
        k = next(k for k, band in enumerate(self._across.bands) if column in band)
        high = self._down.high[row, column]
        wide = high * self.content.aspects[row, column]
        x = self._across.x[column] + (self._across.wide[column] - wide) / 2
        return x, self._down.y[row, k] + (self._down.deep[row, k] - high) / 2, wide, high

    def below(self, bar: Bar) -> float:
        """The y of the lowest caption above a colour bar."""
        bands = zip(self._across.bands, self._down.floor, strict=True)
        return float(next(floor for band, floor in bands if bar.column in band))

    def write(self, sheet: Sheet) -> None:
        """Write all texts around tiles and bars."""
        across, words, down = self._across, self._words, self._down
        middle = (across.left + across.right) / 2
        sheet.write(words.title, [middle], _EDGE)
        for k, band in enumerate(across.bands):
            for g, group in enumerate(self.content.groups):
                if group[0] in band:
                    sheet.write(words.heads.part(g, 1), [sum(across.span(group)) / 2], down.y[0, k] - 0.03, va="bottom")
            for r, (y, deep) in enumerate(zip(down.y[:, k], down.deep[:, k], strict=True)):
                sheet.write(words.side.part(r, 1), [across.left - 0.08], y + deep / 2, ha="right", va="center")
                sheet.write(words.captions[r][k], (across.x + across.wide / 2)[band], y + deep + 0.03)
        for i, bar in enumerate(self.bars):
            for j, ha in enumerate(("left", "center", "right")):
                at = bar.start + j * bar.length / 2
                sheet.write(words.ticks.part(3 * i + j, 1), [at], self.below(bar) + BAR_HIGH + 0.04, ha=ha)
        low = down.floor[-1] + down.foot[-1]
        sheet.write(words.note, [middle], low + words.legend.height)
        sheet.write(words.legend, [middle], low)


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
        found.append((bands, min(tallest, _PAGE / (rows * len(bands)), *wide)))
        if found[-1][1] >= min(_LEGIBLE, 0.7 * tallest):
            break
    return max(found, key=itemgetter(1))


def _legend(bars: Sequence[Bar], content: Content) -> str:
    own = any(bar.scale == "each" for bar in bars)
    said = [content.units] * any(bar.scale != "each" for bar in bars) + ["each map by its own maximum"] * own
    return f"{content.quantity}, " + "; max: ".join(said) if bars else ""
