"""Figures of what the inside of a model looks like: sheets of kernels, and of the maps of a layer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, isqrt, sqrt
from operator import index
from typing import Literal, NamedTuple, SupportsIndex

from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError, at_least_one
from multicam.figures.colours import Colormap, peaks
from multicam.figures.page import Picture
from multicam.figures.plan import TILE_ASPECTS
from multicam.figures.tiles import Tile, figure, strongest_frame
from multicam.inside.features import Kernels

Channels = Iterable[SupportsIndex]
_SHEET_IN, _GAP_IN = 3.0, 0.05  # all rows of a sheet without labels together, about; between its tiles
_TALLEST_IN, _CELL_IN, _MATRIX_IN = 1.6, 0.7, 3.5  # the tallest tile of a sheet, of a table, of a single matrix
_SLIMMEST = 3.0  # what is no picture is drawn at most so many times longer than wide


def kernel_sheet(
    kernels: Kernels,
    *,
    channels: Channels | None = None,
    in_channels: Channels | None = None,
    most: int = 64,
    title: str = "",
    width: float = 7.0,
) -> Picture:
    """A sheet of a convolution's kernels, all on one scale, that says which ones it leaves out.

    - Dense kernels of three channels: a small colour picture for each output channel, in which grey is zero.
    - Other dense kernels, and grouped ones: a row for each output channel, a column for each input channel it reads.
    - Depthwise kernels, and dense ones of one channel: a map for each output channel.
    - Pointwise kernels: one matrix of output by input channels.

    In one dimension each output channel is one map, input channels down and places across; in three dimensions every
    kernel is a row of slices.

    Args:
        kernels: What `kernels(layer)` returns.
        channels: The output channels shown. None: where `most` is too small for all, those with the largest mean absolute
            weight.
        in_channels: The input channels shown, also three of them as a map each; counted within the group where kernels
            are grouped. None: as for `channels`.
        most: How many kernels are shown where nobody chose; of a table its square root in rows and in columns. A
            pointwise matrix is shown whole.
        title: The line on top.
        width: See `figure`.

    Raises:
        MulticamError: There are no such channels.

    Example:
        >>> import torch
        >>> kernel_sheet(Kernels(torch.randn(16, 3, 5, 5)))  # doctest: +ELLIPSIS
        Picture(16 tiles, ...)
    """
    weights = _drawable(kernels)
    (outward, inward), axes = weights.shape[:2], weights.ndim - 2
    matrix = kernels.kind == "pointwise"
    colours = kernels.kind == "dense" and inward == 3 and axes > 1 and in_channels is None
    side = isqrt(at_least_one("most", most))
    strength = reduce(weights.abs(), "o i ... -> i", "mean")
    ins, left_in = _chosen(in_channels, strength, inward if matrix or colours else side, "input channels")
    single = axes == 1 or (axes == 2 and (colours or len(ins) == 1))
    strength = reduce(weights.abs(), "o i ... -> o", "mean")
    outs, left_out = _chosen(channels, strength, outward if matrix else most if single else side, "output channels")
    ins, outs = (sorted(found) if asked is None else found for asked, found in ((in_channels, ins), (channels, outs)))
    shown = weights[outs][:, ins]
    limit = peaks(shown[None], "the weight tensor").item() or 1.0
    if matrix:
        layout = _matrix(shown, outs, ins)
    else:
        tiles = [_colours(kernel, limit) if colours else _signed(kernel) for kernel in shown]
        captioned = [replace(row[0], caption=str(o)) for o, row in zip(outs, tiles, strict=True)]
        layout = _sheet(captioned, width) if single else _table(kernels, tiles, outs, [] if colours else ins)
    legend = ""
    if colours:
        legend = f"black is \N{MINUS SIGN}{limit:.3g}, grey 0, white {limit:.3g}"
    elif axes == 1 and not matrix and len(ins) > 1:
        legend = "input channels down, places across"
    return figure(
        layout.tiles,
        columns=layout.columns,
        rows=layout.rows,
        title=_lines(title, left_out, left_in, legend),
        quantity="weight",
        units="as the layer uses it",
        colormap="diverging",
        width=width,
        tallest=layout.tallest,
    )


def feature_sheet(
    maps: Float[Tensor, "b c *grid"],
    *,
    channels: Channels | None = None,
    most: int = 32,
    sample: int = 0,
    image: Tensor | None = None,
    scale: Literal["shared", "each"] = "shared",
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """A sheet of the maps of one layer, with the number of its channel below each.

    Of a clip or volume, the frame with the strongest activation is shown.

    Args:
        maps: What `feature_maps` returns for a layer.
        channels: The channels shown, in this order. None: those with the largest mean absolute activation, strongest first.
        most: How many are shown where nobody chose.
        sample: Which sample.
        image: The input of this sample, `(c h w)` or `(c t h w)`, to be shown in front.
        scale: Whether all maps share a divisor, so that a channel that does nothing looks so, or each has its own; see
            `figure`.
        title, width: As for `kernel_sheet`.
        colormap: See `colorize`; diverging where any map has a negative value.

    Raises:
        MulticamError: There is no such sample or channel, or a map is not finite.

    Example:
        >>> import torch
        >>> feature_sheet(torch.rand(2, 64, 14, 14), channels=[3, 0, 17])  # doctest: +ELLIPSIS
        Picture(3 tiles, ...)
    """
    own = _of_sample(maps, sample, image)
    chosen, left = _chosen(channels, reduce(own.abs(), "c ... -> c", "mean"), at_least_one("most", most), "channels")
    images = [Tile(image, caption="input")] * (image is not None)
    layout = _sheet([*images, *(_activation(own[channel], channel) for channel in chosen)], width)
    return figure(
        layout.tiles,
        title=_lines(title, left),
        scale=scale,
        quantity="activation",
        units="as the layer returns it",
        colormap=colormap,
        width=width,
        tallest=layout.tallest,
    )


class _Layout(NamedTuple):
    """Tiles in rows, the height of the tallest in inches, and the labels around them; see `figure`."""

    tiles: list[list[Tile]]
    tallest: float
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


def _drawable(kernels: Kernels) -> Float[Tensor, "o i *k"]:
    if not isinstance(kernels, Kernels):  # callers without a type checker
        raise MulticamError(f"a sheet shows what kernels(layer) returns, not a {type(kernels).__name__}")
    if kernels.weights.ndim > 5:
        raise MulticamError(f"kernels of one to three dimensions can be drawn, not {kernels!r}")
    return kernels.weights.detach().float().cpu()


def _of_sample(maps: Float[Tensor, "b c *grid"], sample: int, image: Tensor | None) -> Float[Tensor, "c *grid"]:
    if not isinstance(maps, Tensor):  # callers without a type checker
        raise MulticamError(f"a sheet shows the maps of one layer (b c *grid), not a {type(maps).__name__}")
    axes = maps.ndim - 2
    if not 1 <= axes <= 3:
        raise MulticamError(f"a sheet shows maps (b c *grid) of one to three dimensions, not {tuple(maps.shape)}")
    if not 0 <= sample < len(maps):
        raise MulticamError(f"samples are 0 to {len(maps) - 1}, not {sample!r}")
    if image is not None and image.ndim != 3 and (image.ndim, axes) != (4, 3):
        raise MulticamError(
            f"the image of one sample is (c h w), or (c t h w) with maps of a clip, not {tuple(image.shape)}: "
            "of a batch give image[sample]"
        )
    return maps[sample].detach().float().cpu()


def _activation(map: Float[Tensor, "*grid"], channel: int) -> Tile:
    """The tile of a channel's map; of a clip or volume its strongest frame."""
    if map.ndim == 1:
        return Tile(map=_stretched(map[None]), caption=str(channel))
    if map.ndim == 2:
        return Tile(map=map, caption=str(channel))
    frame = strongest_frame(map)
    return Tile(map=map[frame], caption=f"{channel}, frame\N{NO-BREAK SPACE}{frame}")


def _sheet(tiles: Sequence[Tile], width: float) -> _Layout:
    """The tiles in rows that fill the width and leave few places empty."""
    aspect = max(_aspect(tile) for tile in tiles)
    tall = min(_TALLEST_IN, sqrt(width * _SHEET_IN / (aspect * len(tiles))))
    widest = min(len(tiles), max(1, int(width / (aspect * tall + _GAP_IN))))
    count = min(range(widest, ceil(0.7 * widest) - 1, -1), key=lambda columns: -len(tiles) % columns)
    padded = [*tiles, *[Tile()] * (-len(tiles) % count)]
    return _Layout([padded[i : i + count] for i in range(0, len(padded), count)], tall)


def _table(kernels: Kernels, tiles: list[list[Tile]], outs: Sequence[int], ins: Sequence[int]) -> _Layout:
    """A row for each output channel. Columns are slices where there is one input channel, or all are in one (`ins` empty)."""
    rows = [_label("out", o) for o in outs]
    if len(ins) <= 1:
        return _Layout(tiles, _CELL_IN, [_label("slice", t) for t in range(len(tiles[0]))], rows)
    outward, inward = kernels.weights.shape[:2]
    slices = len(tiles[0]) // len(ins)

    def read(out: int) -> list[str]:
        first = out // (outward // kernels.groups) * inward
        return [_label("in", first + i) for i in ins for _ in range(slices)]

    if kernels.groups == 1:
        return _Layout(tiles, _CELL_IN, read(0), rows)
    captioned = [
        [replace(tile, caption=text) for tile, text in zip(row, read(o), strict=True)]
        for o, row in zip(outs, tiles, strict=True)
    ]
    return _Layout(captioned, _CELL_IN, (), rows)


def _matrix(weights: Float[Tensor, "o i *one"], outs: Sequence[int], ins: Sequence[int]) -> _Layout:
    """One tile of output by input channels."""
    tile = Tile(map=_stretched(weights.flatten(1)), caption=f"input channels {_listed(ins)}")
    return _Layout([[tile]], _MATRIX_IN, (), [f"output channels {_listed(outs)}"])


def _colours(kernel: Float[Tensor, "3 *k"], limit: float) -> list[Tile]:
    """The colours of an output channel's kernel, of each slice."""
    return [Tile(x) for x in rearrange(0.5 + kernel / (2 * limit), "c ... h w -> (...) c h w")]


def _signed(kernel: Float[Tensor, "i *k"]) -> list[Tile]:
    """The signed maps of an output channel's kernel, of each slice of each input channel."""
    if kernel.ndim == 2:
        return [Tile(map=_stretched(kernel))]
    return [Tile(map=x) for x in rearrange(kernel, "i ... h w -> (i ...) h w")]


def _chosen(channels: Channels | None, strength: Float[Tensor, " c"], most: int, what: str) -> tuple[list[int], str]:
    """The channels asked for, or the strongest; and what to say of those that are left out, if any."""
    count = len(strength)
    if channels is None:
        found = strength.argsort(descending=True, stable=True)[:most].tolist()
        return found, "" if most >= count else f"the {most} strongest of {count} {what}"
    try:
        found = [index(channel) for channel in channels]
    except TypeError:  # callers without a type checker
        raise MulticamError(f"{what} are chosen by their numbers, as in [0, 5], not by {channels!r}") from None
    wrong = [channel for channel in found if not 0 <= channel < count]
    if wrong or not found:
        raise MulticamError(f"{what} are 0 to {count - 1}, not {wrong[0] if wrong else 'none'}")
    return found, "" if {*found} == {*range(count)} else f"{len(found)} of {count} {what}"


def _aspect(tile: Tile) -> float:
    shown = tile.map if tile.map is not None else tile.image
    assert shown is not None
    low, high = TILE_ASPECTS
    return min(max(shown.shape[-1] / shown.shape[-2], low), high)


def _stretched(map: Float[Tensor, "h w"]) -> Float[Tensor, "high wide"]:
    """The map with its rows or columns repeated until it is wide enough to be seen."""
    high, wide = map.shape
    return map.repeat_interleave(ceil(wide / (_SLIMMEST * high)), 0).repeat_interleave(
        ceil(high / (_SLIMMEST * wide)), 1
    )


def _label(what: str, number: int) -> str:
    return f"{what}\N{NO-BREAK SPACE}{number}"


def _listed(channels: Sequence[int]) -> str:
    first, last = channels[0], channels[-1]
    whole = list(channels) == [*range(first, last + 1)] and last > first
    return f"{first} to {last}" if whole else ", ".join(map(str, channels))


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))
