"""Figures of maps on their inputs: those of one method side by side, or of several methods."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from multicam.call.inputs import frames_second
from multicam.call.refusals import refuse_around, refuse_unreadable
from multicam.errors import MulticamError, unknown
from multicam.figures.colours import Colormap
from multicam.figures.page import Picture
from multicam.figures.plan import Scale
from multicam.figures.tiles import Tile, figure, line_labels
from multicam.maps import Maps, shares_of
from multicam.printing import percent


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
    quantity: str = "evidence",
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
        captions: Name of a map to one text for each sample. None writes each map's share of the evidence with its sign, see
            `Maps.shares`, where maps are comparable; a line below says whether that is of the positive evidence only.
        regions: The true regions as masks `(b h w)` of any resolution, or one such tensor per name; drawn as contours
            (one tensor for all leaves out the spectral inputs).
        rows: A label for each sample.
        title: The line on top.
        quantity: What to call the values of the maps, as in "interaction".
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
    refuse_around()
    maps = maps if isinstance(maps, Maps) else Maps(maps)
    own = captions is None and maps.comparable and len(maps) > 1
    if captions is None:
        captions = _shares(maps) if own else {}
    scene = _Scene.of(inputs, {"map": maps}, spectral, regions, captions)
    names = list(dict.fromkeys([*inputs, *maps]))

    def tiles(name: str, i: int) -> list[Tile]:
        if name not in maps:
            return [scene.tile(name, i)]
        evidence = scene.tile(name, i, maps[name][i], captions[name][i] if name in captions else "")
        return [Tile(scene.images[name][i]), evidence] if name in inputs else [evidence]

    return figure(
        [[tile for name in names for tile in tiles(name, i)] for i in range(scene.samples)],
        columns=[name for name in names for _ in tiles(name, 0)],
        rows=rows,
        title=title,
        scale=scale or ("shared" if maps.comparable else "each"),
        quantity=quantity,
        units="units of the score" if maps.comparable else "arbitrary units",
        note=shares_of({"map": maps}, quantity) if own else "",
        colormap=colormap,
        width=width,
    )


def compare(
    inputs: Mapping[str, Tensor],
    methods: Mapping[str, Tensor | Mapping[str, Tensor]],
    *,
    scale: Scale | None = None,
    spectral: Collection[str] = (),
    regions: Tensor | Mapping[str, Tensor] | None = None,
    rows: Sequence[str] = (),
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """A printable figure with one column for each method, and one row for each input of each sample.

    The numbers of different methods do not compare, so each has a scale and a colour bar of its own. Where its `Maps`
    are comparable, its inputs and samples share them, and the captions are each input's share of its evidence, as in `panel`;
    where they are not, every map is divided by its own maximum.

    Args:
        inputs: Name to images or clips, as for `panel`. One without a map is left out.
        methods: What to call each method, to its maps: what `explain_methods` returns. A tensor lies on the only input;
            nothing says that its samples compare.
        scale: See `figure`. None means what is said above.
        spectral, regions, rows, title, colormap, width: As for `panel`.

    Raises:
        MulticamError: There is no method, a name does not exist, or there are not equally many samples of everything.

    Example:
        >>> import torch
        >>> inputs = {"rgb": torch.rand(1, 3, 8, 8), "depth": torch.rand(1, 1, 8, 8)}
        >>> ours, theirs = (Maps({"rgb": torch.rand(1, 8, 8), "depth": torch.rand(1, 8, 8)}) for _ in range(2))
        >>> compare(inputs, {"ours": ours, "theirs": theirs})  # doctest: +ELLIPSIS
        Picture(6 tiles, ...)
    """
    if not methods or isinstance(methods, Maps):
        given = "the maps of one, which are for panel" if methods else "none"
        raise MulticamError(f"compare takes the maps of each method, as explain_methods returns them, not {given}")
    refuse_around()
    only = next(iter(inputs)) if len(inputs) == 1 else "map"
    found = {method: _named(maps, only) for method, maps in methods.items()}
    mapped = [name for maps in found.values() for name in maps]
    names = [name for name in dict.fromkeys([*inputs, *mapped]) if name in mapped]
    scene = _Scene.of(inputs, {f"{method} map": maps for method, maps in found.items()}, spectral, regions, {})
    labels = line_labels(rows, names, scene.samples)
    shares = {method: _shares(maps) for method, maps in found.items() if maps.comparable and len(maps) > 1}

    def tile(method: str, name: str, i: int) -> Tile:
        if name not in found[method]:
            return Tile()
        return scene.tile(name, i, found[method][name][i], shares[method][name][i] if method in shares else "")

    lines = [(name, i) for i in range(scene.samples) for name in names]
    images = [[Tile(scene.images[name][i]) if name in inputs else Tile()] * bool(inputs) for name, i in lines]
    scales: list[Scale] = [scale or ("column" if maps.comparable else "each") for maps in found.values()]
    numbered = [maps.comparable for maps, own in zip(found.values(), scales, strict=True) if own != "each"]
    return figure(
        [[*image, *(tile(method, *line) for method in found)] for image, line in zip(images, lines, strict=True)],
        columns=[*["input"] * bool(inputs), *found],
        rows=labels,
        title=title,
        scale=scales[:1] * bool(inputs) + scales,
        units=("units of the score" if all(numbered) else "arbitrary units")
        + (", one scale for each method" if "column" in scales else ""),
        note=shares_of({method: found[method] for method in shares}),
        colormap=colormap,
        width=width,
    )


def _named(maps: Tensor | Mapping[str, Tensor], only: str) -> Maps:
    """The maps of one method, of which a tensor says nothing about its scale."""
    if isinstance(maps, Tensor):
        return Maps({only: maps}, comparable=False)
    return maps if isinstance(maps, Maps) else Maps(maps)


@dataclass(frozen=True, eq=False)
class _Scene:
    """What maps are laid on: as many samples of every named image, and of the true regions on them."""

    images: Mapping[str, Tensor]
    regions: Mapping[str, Tensor]
    spectral: Collection[str]
    samples: int

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Tensor],
        maps: Mapping[str, Mapping[str, Tensor]],
        spectral: Collection[str],
        regions: Tensor | Mapping[str, Tensor] | None,
        captions: Mapping[str, Sequence[str]],
    ) -> "_Scene":
        """The scene of these maps, by what to call them and by name, if all of it fits together."""
        for name, image in inputs.items():
            refuse_unreadable(f"input {name!r}", image)
            if not isinstance(image, Tensor):  # callers without a type checker
                raise MulticamError(f"input {name!r} is a {type(image).__name__}, and images are tensors (b c h w)")
        mapped = {name: map for named in maps.values() for name, map in named.items()}
        frames = {name: map.shape[1] for name, map in mapped.items() if map.ndim == 4}
        images = {name: frames_second(x, frames.get(name)) if x.ndim == 5 else x for name, x in inputs.items()}
        names = list(dict.fromkeys([*images, *mapped]))
        if not isinstance(regions, Mapping):
            regions = {} if regions is None else {name: regions for name in names if name not in spectral}
        for what, given, known in (
            ("input", spectral, images),
            ("map", captions, mapped),
            ("input or map", regions, names),
        ):
            for name in given:
                if name not in known:
                    raise unknown(what, name, known)
        for name, image in images.items():
            if image.ndim not in (4, 5):
                raise MulticamError(
                    f"input {name!r} {tuple(image.shape)} is no image (b c h w) or (b c t h w): leave it out"
                )
        parts: dict[str, Mapping[str, Tensor | Sequence[str]]] = {
            "input": images, **maps, "region of": regions, "captions of": captions,
        }  # fmt: skip
        samples = {f"{what} {name!r}": len(values) for what, group in parts.items() for name, values in group.items()}
        if len({*samples.values()}) != 1:
            raise MulticamError(f"a figure needs equally many samples of everything, not {samples}")
        return cls(images, regions, spectral, max(samples.values()))

    def tile(self, name: str, i: int, map: Tensor | None = None, caption: str = "") -> Tile:
        """The map over its image, or alone where it does not lie on it; without a map the image."""
        image = self.images[name][i] if name in self.images else None
        alone = map is not None and image is not None and (name in self.spectral or image.shape[-2:] != map.shape[-2:])
        return Tile(None if alone else image, map, caption, self.regions[name][i] if name in self.regions else None)


def _shares(maps: Maps) -> dict[str, list[str]]:
    columns = zip(maps, maps.shares().T.tolist(), strict=True)
    return {name: [f"{name} {percent(share)[:-1]}\N{NO-BREAK SPACE}%" for share in each] for name, each in columns}
