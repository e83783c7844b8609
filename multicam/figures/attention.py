"""Figures of attention: every head of every layer, what a query looks at, and how much goes from input to input."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Literal, TypeVar

import torch
from torch import Tensor

from multicam.attending.attention_call import AttentionCall, Value
from multicam.attending.between import flow_matrix
from multicam.attending.passes import Query
from multicam.call.inputs import as_names, frames_second
from multicam.errors import MulticamError, unknown
from multicam.figures.colours import Colormap
from multicam.figures.page import Picture
from multicam.figures.plan import Scale
from multicam.figures.tiles import Tile, figure

Point = TypeVar("Point", bound=tuple[int | float, int | float])  # a list of int is no list of int | float
_CELL, _CELL_IN = (1, 2), 0.42  # rows and columns of pixels, and inches, of a number's cell


def head_sheet(
    calls: AttentionCall | Sequence[AttentionCall],
    onto: str | None = None,
    query: Query = "mean",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    of: str | None = None,
    value: Value = "weights",
    sample: int = 0,
    scale: Scale = "shared",
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """A sheet with one row for each attention and one column for each head: where on an input that head looks.

    Args:
        calls: The attentions, in the order of the rows, such as `att.between("rgb", "depth")`.
        onto: See `AttentionCall.heatmap`.
        query: See `AttentionCall.heatmap`.
        inputs: Name to images `(b c h w)` below the maps. None shows the maps alone, as is right for a spectrum.
        of: See `AttentionCall.heatmap`.
        value: See `AttentionCall.heatmap`.
        sample: Which sample.
        scale: See `figure`; "each" where one head is so strong that the others look empty.
        title: The line on top.
        colormap: See `colorize`.
        width: See `figure`.

    Raises:
        MulticamError: There is no attention or no such sample, or one of the attentions has no such map.

    Example:
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> att = attention(EditDetector(), inputs)
        >>> head_sheet(att.between("rgb", "texture"), query=(10, 20))  # doctest: +ELLIPSIS
        Picture(2 tiles, ...)
    """
    chosen = _several(calls)
    heads = range(max(call.heads for call in chosen))

    def tile(call: AttentionCall, head: int) -> Tile:
        if head >= call.heads:
            return Tile()
        map = _sampled(call.heatmap(onto, query, of=of, heads=head, value=value), sample)
        name = onto or next(iter(call.inputs()[1]))
        return _tile(inputs or {}, name, sample, map)

    return figure(
        [[tile(call, head) for head in heads] for call in chosen],
        columns=[f"head\N{NO-BREAK SPACE}{head}" for head in heads],
        rows=_labels(chosen),
        title=title,
        scale=scale,
        quantity=_quantity(value),
        units=_units(value),
        colormap=colormap,
        width=width,
    )


def query_figure(
    calls: AttentionCall | Sequence[AttentionCall],
    inputs: Mapping[str, Tensor],
    query: Query | list[Point],
    onto: str | Sequence[str] | None = None,
    *,
    of: str | None = None,
    heads: int | Sequence[int] | Literal["mean"] = "mean",
    value: Value = "weights",
    sample: int = 0,
    spectral: Collection[str] = (),
    scale: Scale = "shared",
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """What a query looks at: the input that it stands for with its patch outlined, and beside it its attention on each input.

    Several points make several rows. Captions say how much of the query's attention goes to an input, where not all of it does.

    Args:
        calls: One attention, or several whose maps stand side by side.
        inputs: Name to images `(b c h w)`, or clips, as for `panel`.
        query: A pixel `(y, x)` of the queries' input, a list of such, or any query of `AttentionCall.heatmap`.
        onto: The inputs looked at; None: all that the keys stand for.
        of: As for `head_sheet`.
        heads: See `AttentionCall.heatmap`.
        value, sample: As for `head_sheet`.
        spectral: The inputs whose axes are frequencies, as for `panel`: no map is laid over them.
        scale, title, colormap, width: As for `head_sheet`.

    Raises:
        MulticamError: There is no attention to these inputs, or no such query, input or sample.

    Example:
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> query_figure(attention(EditDetector(), inputs), inputs, (10, 20), spectral=["frequency"])  # doctest: +ELLIPSIS
        Picture(5 tiles, ...)
    """
    chosen = _several(calls)
    _refuse_other_inputs(inputs, spectral)
    looks = _looks(chosen, as_names(onto))
    queries = query if isinstance(query, list) else [query]
    ambiguous = len({name for _, name in looks}) < len(looks)
    short = dict(zip((call.name for call in chosen), _labels(chosen), strict=True))

    def column(query: Query, call: AttentionCall, name: str, beside: str) -> list[tuple[str, Tile]]:
        map = _sampled(call.heatmap(name, query, of=of, heads=heads, value=value), sample)
        share = 100 * map.mean().item()
        caption = "" if value == "grad*weights" or share > 99.5 else f"{share:.0f}\N{NO-BREAK SPACE}% of its attention"
        label = f"{name}, {short[call.name]}" if ambiguous else name
        own = _image(inputs, name, sample, len(map) if map.ndim == 3 else None)
        image = [(label, Tile(own))] * (own is not None and name != beside)
        return [*image, (label, _tile(inputs, name, sample, map, alone=name in spectral, caption=caption))]

    def row(query: Query) -> list[tuple[str, Tile]]:
        name, tile = _outlined(looks[0][0], inputs, query, of, sample)
        first = [(name, tile)] * bool(name)
        return [*first, *chain.from_iterable(column(query, call, onto, name) for call, onto in looks)]

    rows = [row(query) for query in queries]
    return figure(
        [[tile for _, tile in row] for row in rows],
        columns=[label for label, _ in rows[0]],
        rows=[_named(query) for query in queries] if len(queries) > 1 else (),
        title=title,
        scale=scale,
        quantity=_quantity(value),
        units=_units(value),
        colormap=colormap,
        width=width,
    )


def flow_figure(
    calls: AttentionCall | Sequence[AttentionCall],
    *,
    forward: int | None = None,
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """How much of the attention of each input's tokens goes to each input, and to the model's own tokens: a row for each attention.

    The cells of one row and one group add up to 100 per cent, as `flow_matrix` has them, with the mean over the samples. A
    cell is empty where no such tokens ask, or none are asked.

    Args:
        calls: The attentions of one pass.
        forward: The number of the pass, where there are several.
        title, colormap, width: As for `head_sheet`.

    Raises:
        MulticamError: There is no attention, or there are several passes.

    Example:
        >>> from timm.models import VisionTransformer
        >>> from multicam.attending.attend import attention
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)
        >>> flow_figure(attention(model, torch.rand(1, 3, 32, 32)))  # doctest: +ELLIPSIS
        Picture(12 tiles, ...)
    """
    between = flow_matrix(_several(calls), forward=forward)
    shares = between.shares.nanmean(0)
    queries, keys = (["own tokens" if x == "own" else x for x in names] for names in (between.queries, between.keys))
    pairs = [(i, j) for i in range(len(queries)) for j in range(len(keys)) if (shares[:, i, j] > 0).any()]

    def tile(call: int, i: int, j: int) -> Tile:
        below = f"to {keys[j]}" if call == len(shares) - 1 else ""
        share = shares[call, i, j]
        if not share > 0:
            return Tile(caption=below)
        return Tile(map=100 * share.expand(*_CELL), caption=below, text=f"{100 * share:.0f}")

    return figure(
        [[tile(n, i, j) for i, j in pairs] for n in range(len(shares))],
        columns=[f"from {queries[i]}" for i, _ in pairs],
        rows=_short(between.calls),
        title=title,
        quantity="attention",
        units="per cent of what these tokens give away",
        colormap=colormap,
        width=width,
        tallest=_CELL_IN,
    )


def _several(calls: AttentionCall | Sequence[AttentionCall]) -> Sequence[AttentionCall]:
    chosen = [calls] if isinstance(calls, AttentionCall) else calls
    if not chosen:
        raise MulticamError("a figure of attention needs at least one attention, not none")
    return chosen


def _refuse_other_inputs(inputs: Mapping[str, Tensor], spectral: Collection[str]) -> None:
    if not isinstance(inputs, Mapping):
        raise MulticamError(
            f"inputs are a mapping from names to images, as the model is given them, not a {type(inputs).__name__}"
        )
    for name in spectral:
        if name not in inputs:
            raise unknown("input", name, inputs)


def _looks(calls: Sequence[AttentionCall], onto: Sequence[str] | None) -> list[tuple[AttentionCall, str]]:
    """Every attention with every input that it looks at; of all inputs, or of those asked for."""
    looks = [(call, name) for call in calls for name in onto or call.forward.places.names if name in call.inputs()[1]]
    if not looks:
        seen = "\n".join(f"  {call.name}: {call.describe()}" for call in calls)
        raise MulticamError(f"none of these attentions looks at {' or '.join(onto or ['any input'])}:\n{seen}")
    return looks


def _sampled(maps: Tensor, sample: int) -> Tensor:
    """The map `(h w)` or `(t h w)` of a sample; words become a row."""
    if not 0 <= sample < len(maps):
        raise MulticamError(f"samples are 0 to {len(maps) - 1}, not {sample!r}")
    return maps[sample].cpu() if maps.ndim > 2 else maps[sample].cpu()[None]


def _image(inputs: Mapping[str, Tensor], name: str, sample: int, frames: int | None = None) -> Tensor | None:
    """The image of a sample; None for what is no image, such as words."""
    x = inputs.get(name)
    if x is None or x.ndim not in (4, 5):
        return None
    return (frames_second(x, frames) if x.ndim == 5 else x)[sample]


def _tile(
    inputs: Mapping[str, Tensor], name: str, sample: int, map: Tensor, *, alone: bool = False, caption: str = ""
) -> Tile:
    image = _image(inputs, name, sample, len(map) if map.ndim == 3 else None)
    fits = image is not None and image.shape[-2:] == map.shape[-2:] and not alone
    return Tile(image if fits else None, map, caption)


def _outlined(
    call: AttentionCall, inputs: Mapping[str, Tensor], query: Query, of: str | None, sample: int
) -> tuple[str, Tile]:
    """The name and the image of the input that a query stands for, with its part of it outlined; "" where there is none."""
    followed = not isinstance(query, str) and bool((call.rows >= 0).all())
    found = call.patch(query, of, sample) if followed else None
    name, box = found or ("", ())
    image = _image(inputs, name, sample)
    if image is None:
        return "", Tile()
    size = torch.tensor(image.shape[-2:])
    low, high = (torch.tensor(box[i : i + 2]) * size for i in (1, 4))
    rows, columns = (torch.arange(n) + 0.5 for n in image.shape[-2:])
    inside = ((rows > low[0]) & (rows < high[0]))[:, None] & ((columns > low[1]) & (columns < high[1]))
    return name, Tile(image, region=inside)


def _labels(calls: Sequence[AttentionCall]) -> list[str]:
    return _short([call.name for call in calls])


def _short(names: Sequence[str]) -> list[str]:
    """The names without the dotted parts that all of them begin or end with; a number keeps what it counts."""
    again = {name.rpartition("#")[0] for name in names if not name.endswith("#0")}
    parts = [(name if name.rpartition("#")[0] in again else name.removesuffix("#0")).split(".") for name in names]
    if len(parts) == 1:
        return [" ".join(parts[0])]
    levels = enumerate(zip(*parts, strict=False))
    alike = next((i for i, level in levels if len({*level}) > 1), min(map(len, parts)) - 1)
    if alike and all(part[alike].isdigit() for part in parts):
        alike -= 1
    parts = [part[alike:] for part in parts]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return [" ".join(part) for part in parts]


def _named(query: Query) -> str:
    return f"y {query[0]:g}, x {query[1]:g}" if isinstance(query, tuple) else f"query {query}"


def _quantity(value: Value) -> str:
    return "evidence" if value == "grad*weights" else "attention"


def _units(value: Value) -> str:
    return "units of the score" if value == "grad*weights" else "1 is attention spread evenly over the input"
