"""Maps into printable figures: tiles in rows and columns, labels, captions, and what the colours mean.

Tiles take raw maps, not normalised ones: the colour bars need their units.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.inputs import frames_second
from multicam.maps import Maps
from multicam.render import Colormap, colorize, overlay, peaks, to_rgb

if TYPE_CHECKING:
    import matplotlib.figure

Scale = Literal["shared", "column", "each"]

_TILE_IN, _PAGE_IN, _EDGE_IN = 1.6, 8.5, 0.04  # the tallest tile, all rows of tiles together, the page's margin
_BAR_IN = 2.4, 0.09  # the largest colour bar
_TEXT_PT, _NOTE_PT = 8.0, 7.0
_SCREEN_DPI = 150
_WIDE_FONTS = (  # for Chinese labels, in order of preference; the last one draws a box for any character
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei",
    "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Arial Unicode MS", "Droid Sans Fallback",
    "Last Resort High-Efficiency",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a `figure`: an image, a raw map, or the map over the image. `Tile()` leaves its place empty.

    Below a map the image is grey, so that every colour is evidence. Of a clip or volume, the frame with the strongest evidence is shown, without a map of each frame the middle one.

    Attributes:
        image: `(c h w)` or `(c t h w)`, shown as `to_rgb` shows it.
        map: `(h w)` or `(t h w)`, not normalised. Without an image it is shown alone.
        caption: The text below.
        region: A true region `(h w)` of any resolution, drawn as a thin contour.
    """

    image: Tensor | None = None
    map: Tensor | None = None
    caption: str = ""
    region: Bool[Tensor, "h w"] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A finished figure: notebooks show it, `save` writes it, and `figure` is matplotlib's for the last touches."""

    figure: "matplotlib.figure.Figure"

    def save(self, path: str | Path, dpi: int = 300) -> Path:
        """The path written to; its suffix (.png, .pdf, .svg …) says the format.

        Raises:
            MulticamError: The suffix is no format that matplotlib writes.
        """
        path = Path(path)
        formats = self.figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise unknown("picture format", path.suffix, [f".{name}" for name in formats])
        self._write(path, dpi)
        return path

    @property
    def rgb(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, as a notebook shows them."""
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self._repr_png_())).convert("RGB"))

    def _write(self, to: Path | io.BytesIO, dpi: int) -> None:
        import matplotlib

        # Many publishers refuse the Type 3 fonts that matplotlib embeds by default; the rest keeps a user's style
        # from painting over the white page or cutting it.
        with matplotlib.rc_context(
            {"pdf.fonttype": 42, "savefig.facecolor": "auto", "savefig.transparent": False, "savefig.bbox": None}
        ):
            self.figure.savefig(to, dpi=dpi)

    def _repr_png_(self) -> bytes:
        self._write(png := io.BytesIO(), _SCREEN_DPI)
        return png.getvalue()

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        tiles = sum(axes.get_label() == "tile" for axes in self.figure.axes)
        return f"Picture({tiles} tiles, {width:.1f} x {height:.1f} in)"


def figure(
    tiles: Sequence[Sequence[Tile]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    scale: Scale = "shared",
    units: str = "units of the score",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """A printable figure of tiles in rows and columns, with what its colours mean below.

    Args:
        tiles: Rows of equally many tiles.
        columns: A label for each column; equal neighbours share one label and stand closer together.
        rows: A label for each row.
        title: The line on top.
        scale: Which maps share a divisor, and so a colour bar: all (`"shared"`), those of one column (`"column"`: one
            method or one input each), or none (`"each"`: the strongest evidence of every map looks the same).
        units: The units of the maps' values, for the colour bar.
        colormap: See `colorize`; one for the whole figure, diverging when any map has a negative value.
        width: The widest the figure may be, in inches: 7 is a full page of most papers, where the text prints at 8 pt.

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
    for what, labels, count in (("columns", columns, len(tiles[0])), ("rows", rows, len(tiles))):
        if labels and len(labels) != count:
            raise MulticamError(f"{count} {what} of tiles, but {len(labels)} labels: {list(labels)}")
    limits = _limits(tiles, scale)
    signed = any((tile.map < 0).any() for row in tiles for tile in row if tile.map is not None)
    colormap = colormap or ("diverging" if signed else "inferno")
    drawn = [
        [_draw(tile, limits.get((r, c), 1.0), colormap) for c, tile in enumerate(row)] for r, row in enumerate(tiles)
    ]
    sheet = _Sheet()

    # Sizes first, then the page, then places: nothing overlaps, whatever the texts and the shapes of the tiles.
    side = sheet.fit(rows, [0.9] * len(rows), _TEXT_PT)
    left = _EDGE_IN + (side.width + 0.08 if rows else 0)
    gaps = np.array([0.05 if a == b else 0.14 for a, b in pairwise(columns or [""] * len(tiles[0]))] + [0.0])
    aspects = np.array([[1 if rgb is None else rgb.shape[1] / rgb.shape[0] for rgb in row] for row in drawn])
    shapes = aspects.max(0).clip(0.5, 3)
    tall = min(_TILE_IN, _PAGE_IN / len(tiles), (width - left - _EDGE_IN - gaps.sum()) / shapes.sum())
    if tall < 0.1:
        raise MulticamError(f"{len(shapes)} columns of tiles do not fit into {width} inches: give a larger width")
    wide = shapes * tall
    high = np.minimum(tall, wide / aspects)
    deep = np.maximum(high.max(1), [side.part(r, 1).height for r in range(len(tiles))])
    x = left + np.cumsum(wide + gaps) - wide - gaps
    right = x[-1] + wide[-1]
    groups = [[c for c, _ in group] for _, group in groupby(enumerate(columns), key=itemgetter(1))]
    starts, ends = np.array([x[g[0]] for g in groups]), np.array([x[g[-1]] + wide[g[-1]] for g in groups])
    top = sheet.fit([title], [right - left], _TEXT_PT + 1)
    head = sheet.fit([columns[g[0]] for g in groups], ends - starts, _TEXT_PT)
    notes = sheet.fit([tile.caption for row in tiles for tile in row], [*wide] * len(tiles), _NOTE_PT)
    below = [notes.part(r * len(row), len(row)) for r, row in enumerate(tiles)]
    steps = deep + [texts.height for texts in below] + 0.06
    y = 2 * _EDGE_IN + top.height + head.height + np.cumsum(steps) - steps
    end = y[-1] + steps[-1]
    bars = _bars(limits, scale, x, wide)
    marks = [mark for _, _, limit in bars for mark in _ticks(limit, scale, colormap)]
    ticks = sheet.fit(marks, [length / 3.3 for _, length, _ in bars for _ in range(3)], _NOTE_PT)
    meaning = "evidence, each map by its own maximum" if scale == "each" else f"evidence, {units}"
    legend = sheet.fit([meaning if bars else ""], [right - left], _NOTE_PT)
    tick_y = end + _BAR_IN[1] + 0.04
    legend_y = tick_y + ticks.height
    sheet.page.set_size_inches(right + _EDGE_IN, legend_y + legend.height if bars else end)

    sheet.write(top, [(left + right) / 2], _EDGE_IN)
    sheet.write(head, (starts + ends) / 2, y[0] - 0.03, va="bottom")
    for r, row in enumerate(tiles):
        sheet.write(side.part(r, 1), [left - 0.08], y[r] + deep[r] / 2, ha="right", va="center")
        sheet.write(below[r], x + wide / 2, y[r] + deep[r] + 0.03)
        for c, (tile, rgb) in enumerate(zip(row, drawn[r], strict=True)):
            if rgb is not None:
                w, h = high[r, c] * aspects[r, c], high[r, c]
                box = x[c] + (wide[c] - w) / 2, y[r] + (deep[r] - h) / 2, w, h
                sheet.show(rgb, box, "tile", region=tile.region)
    for i, (start, length, limit) in enumerate(bars):
        low = -1 if colormap == "diverging" else 0
        ramp = colorize(torch.linspace(low, 1, 255)[None], colormap)
        sheet.show(ramp, (start, end + 0.02, length, _BAR_IN[1]), "bar", span=(low * limit, limit))
        for j, ha in enumerate(("left", "center", "right")):
            sheet.write(ticks.part(3 * i + j, 1), [start + j * length / 2], tick_y, ha=ha)
    sheet.write(legend, [(left + right) / 2], legend_y)
    return Picture(sheet.page)


def panel(
    inputs: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    *,
    scale: Scale | None = None,
    spectral: Collection[str] = (),
    captions: Mapping[str, Sequence[str]] | None = None,
    regions: Tensor | Mapping[str, Tensor] | None = None,
    rows: Sequence[str] = (),
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """A printable figure with one row for each sample: every input, and beside it the map over that input.

    A map whose name is no input, one that is smaller than its input and one of a spectral input are shown alone.

    Args:
        inputs: Name to images `(b c h w)`, or clips `(b c t h w)` or `(b t c h w)`.
        maps: Name to raw maps `(b h w)`, or `(b t h w)`.
        scale: See `figure`. None means shared, so that an input the model ignored looks ignored; or each, for `Maps`
            whose values are not comparable.
        spectral: The inputs whose axes are frequencies: no place in them is a place in the photo, so no map is laid
            over them.
        captions: Name of a map to one text for each sample. None writes each map's share of the evidence, where maps
            are comparable.
        regions: The true regions as masks `(b h w)` of any resolution, or one such tensor per name; drawn as contours
            (one tensor for all leaves out the spectral inputs).
        rows: A label for each sample.
        title: The line on top.
        colormap: See `colorize`.
        width: See `figure`.

    Raises:
        MulticamError: A name does not exist, or there are not equally many samples of everything.

    Example:
        >>> import torch
        >>> inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
        >>> panel(inputs, {"rgb": torch.rand(2, 8, 8), "depth": torch.rand(2, 4, 4)})  # doctest: +ELLIPSIS
        Picture(8 tiles, ...)
    """
    maps = maps if isinstance(maps, Maps) else Maps(maps)
    frames = {name: map.shape[1] for name, map in maps.items() if map.ndim == 4}
    inputs = {name: frames_second(x, frames.get(name)) if x.ndim == 5 else x for name, x in inputs.items()}
    names = list(dict.fromkeys([*inputs, *maps]))
    if not isinstance(regions, Mapping):
        regions = {} if regions is None else {name: regions for name in names if name not in spectral}
    if captions is None:
        captions = _shares(maps) if maps.comparable and len(maps) > 1 else {}
    for what, given, known in (("input", spectral, inputs), ("map", captions, maps), ("input or map", regions, names)):
        for name in given:
            if name not in known:
                raise unknown(what, name, known)
    for name, image in inputs.items():
        if image.ndim not in (4, 5):
            raise MulticamError(
                f"input {name!r} {tuple(image.shape)} is no image (b c h w) or (b c t h w): leave it out"
            )
    parts = (("input", inputs), ("map", maps), ("region of", regions), ("captions of", captions))
    samples = {f"{what} {name!r}": len(values) for what, group in parts for name, values in group.items()}
    if len({*samples.values()}) != 1:
        raise MulticamError(f"a panel needs equally many samples of everything, not {samples}")

    def tiles(name: str, i: int) -> list[Tile]:
        image = inputs[name][i] if name in inputs else None
        region = regions[name][i] if name in regions else None
        if name not in maps:
            return [Tile(image, region=region)]
        map = maps[name][i]
        alone = image is None or name in spectral or image.shape[-2:] != map.shape[-2:]
        evidence = Tile(None if alone else image, map, captions[name][i] if name in captions else "", region)
        return [evidence] if image is None else [Tile(image), evidence]

    return figure(
        [[tile for name in names for tile in tiles(name, i)] for i in range(max(samples.values()))],
        columns=[name for name in names for _ in tiles(name, 0)],
        rows=rows,
        title=title,
        scale=scale or ("shared" if maps.comparable else "each"),
        units="units of the score" if maps.comparable else "arbitrary units",
        colormap=colormap,
        width=width,
    )


def _shares(maps: Maps) -> dict[str, list[str]]:
    columns = zip(maps, maps.shares().T.tolist(), strict=True)
    return {name: [f"{name} {100 * share:.0f}\N{NO-BREAK SPACE}%" for share in shares] for name, shares in columns}


def _limits(tiles: Sequence[Sequence[Tile]], scale: Scale) -> dict[tuple[int, int], float]:
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
    if scale not in alike:
        raise unknown("scale", scale, alike)
    key = alike[scale]
    return {at: max(top for other, top in tops.items() if key(other) == key(at)) or 1.0 for at in tops}


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


def _bars(
    limits: Mapping[tuple[int, int], float], scale: Scale, x: np.ndarray, wide: np.ndarray
) -> list[tuple[float, float, float]]:
    """Where each colour bar starts, how long it is and the value it ends with."""
    if scale == "column":
        return [(x[c], wide[c], limit) for c, limit in {c: limit for (_, c), limit in limits.items()}.items()]
    right = x[-1] + wide[-1]
    length = min(right - x[0], _BAR_IN[0])
    return [((x[0] + right - length) / 2, length, limit) for limit in [*limits.values()][:1]]


def _ticks(limit: float, scale: Scale, colormap: Colormap) -> list[str]:
    half, top = ("", "max") if scale == "each" else (f"{limit / 2:.3g}", f"{limit:.3g}")
    return [f"\N{MINUS SIGN}{top}", "0", top] if colormap == "diverging" else ["0", half, top]


@dataclass(frozen=True)
class _Texts:
    """Texts wrapped so that at one size, in points, each fits the width it was given."""

    texts: list[str]
    size: float
    width: float

    @property
    def height(self) -> float:
        lines = max((text.count("\n") + 1 for text in self.texts if text), default=0)
        return lines * self.size * 1.2 / 72

    def part(self, start: int, count: int) -> "_Texts":
        return replace(self, texts=self.texts[start : start + count])


class _Sheet:
    """A page measured in inches from its top left corner."""

    def __init__(self) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MulticamError('figures need matplotlib: pip install "multicam-torch[plot]"') from error
        self.page = Figure(dpi=_SCREEN_DPI, facecolor="white")
        self.page.set_layout_engine("none")
        FigureCanvasAgg(self.page)  # the page keeps it, and measures its texts with it

    def fit(self, texts: Sequence[str], widths: Sequence[float] | np.ndarray, size: float) -> _Texts:
        """The texts wrapped at spaces, and the size up to `size` at which all keep to their widths."""

        def measure(line: str) -> float:
            artist = self.page.text(0, 0, line, size=size, family=_families(line))
            length = artist.get_window_extent().width / self.page.dpi
            artist.remove()
            return length

        wrapped = [_wrap(text, width, measure) for text, width in zip(texts, widths, strict=True)]
        lengths = [max(map(measure, text.split("\n"))) for text in wrapped]
        shrink = min((width / max(length, width) for length, width in zip(lengths, widths, strict=True)), default=1.0)
        return _Texts(wrapped, size * shrink, max(lengths, default=0.0) * shrink)

    def write(
        self, texts: _Texts, xs: Sequence[float] | np.ndarray, y: float, ha: str = "center", va: str = "top"
    ) -> None:
        width, height = self.page.get_size_inches()
        for text, x in zip(texts.texts, xs, strict=False):
            place = x / width, 1 - y / height
            self.page.text(*place, text, size=texts.size, family=_families(text), ha=ha, va=va, color="black")

    def show(
        self,
        rgb: UInt8[np.ndarray, "h w 3"],
        box: tuple[float, float, float, float],
        label: str,
        span: tuple[float, float] = (0.0, 1.0),
        region: Tensor | None = None,
    ) -> None:
        width, height = self.page.get_size_inches()
        x, y, w, h = box
        place = x / width, 1 - (y + h) / height, w / width, h / height
        axes = self.page.add_axes(place, label=label, facecolor="white")
        axes.imshow(rgb, extent=(*span, 1, 0), aspect="auto", interpolation="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(linewidth=0.4, color="0.55")
        if region is not None and region.any():
            # A rim of False closes the contour of a region that touches the border.
            mask = np.pad(region.cpu().numpy().astype(np.float32), 1)
            ys, xs = ((np.arange(n) - 0.5) / (n - 2) for n in mask.shape)
            for color, line in (("black", 1.4), ("white", 0.7)):
                axes.contour(xs, ys, mask, levels=[0.5], colors=color, linewidths=line)


def _wrap(text: str, width: float, measure: Callable[[str], float]) -> str:
    """The text with a line break wherever the next word would pass the width."""
    lines = []
    for paragraph in text.split("\n"):
        first, *words = paragraph.split(" ")
        lines.append(first)
        for word in words:
            longer = f"{lines[-1]} {word}"
            if measure(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(lines)


def _families(text: str) -> list[str]:
    """The user's fonts, and for characters they may lack the first installed font that has them."""
    import matplotlib
    from matplotlib import font_manager

    families = list(matplotlib.rcParams["font.family"])
    if not text.isascii():
        installed = {font.name for font in font_manager.fontManager.ttflist}
        families += [name for name in _WIDE_FONTS if name in installed][:1]
    return families
