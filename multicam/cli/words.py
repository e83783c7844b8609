"""From words on a command line to layers, grids, methods and targets."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import signature
from math import prod
from typing import Any, TypeVar

from multicam.call.files import find_object, read_value
from multicam.call.targets.scores import Binary, ClassScore, Contrast, Probability, Regression, Target, TopClass
from multicam.cam.base import CAM, InputCAM
from multicam.cam.catalogue import INPUT_METHODS, METHODS, WRAPPERS
from multicam.cli.help import GRIDS, TARGETS
from multicam.errors import MulticamError, unknown
from multicam.metrics.measures import METRICS
from multicam.saliency.attributions import Attributions
from multicam.saliency.catalogue import ATTRIBUTIONS
from multicam.watch.layers import Layer
from multicam.watch.reshape import Reshape, as_it_is, channels_last, tokens

T = TypeVar("T")
# The arguments of attributions whose values can be typed.
OPTIONS = ("samples", "std", "seed", "steps", "baseline", "patch", "stride", "batch_size", "method")
KINDS: tuple[type[CAM] | type[InputCAM], ...] = (*METHODS, *INPUT_METHODS)
CAMS = {kind.__name__.lower(): kind for kind in KINDS}
REFINEMENTS = {kind.__name__.lower(): kind.__name__ for kind in WRAPPERS}
FUNCTIONS = {function.__name__.replace("_", ""): function for function in ATTRIBUTIONS}
FIELDS = ("scores", "target")  # what the file of maps calls the rest of its contents


def read_layers(layers: Iterable[str], grids: Iterable[str] = (), *, unnamed: str = "map") -> dict[str, Layer]:
    """The layers that `[NAME=]PATH[#CALL][:PICK]` mean, with the grids that `[NAME=]GRID` give them.

    Args:
        layers: One for each layer; a single one may go without a name.
        grids: See `read_grid`.
        unnamed: The name of a layer without one.

    Raises:
        MulticamError: If names are missing, come twice or do not exist.

    Example:
        >>> read_layers(["rgb=fusion.attn#1:0"])
        {'rgb': Layer('fusion.attn', call=1, pick='0')}
    """
    named: dict[str, Layer] = {}
    for text in layers:
        name, _, address = text.rpartition("=")
        if name in named or (named and "" in (name, *named)):
            raise MulticamError(
                "several layers need a name each, as in --layer rgb=rgb.layer4 --layer depth=depth.layer4"
            )
        if name in FIELDS:
            raise MulticamError(f"a map cannot be called {name!r}: the file of maps keeps the {name} under that name")
        path, _, pick = address.partition(":")
        named[name] = Layer.of(Layer(path, pick=pick or None))
    for text in grids:
        name, _, grid = text.rpartition("=")
        if name not in named:
            raise unknown("layer called", name, named)
        named[name] = replace(named[name], reshape=read_grid(grid))
    return {name or unnamed: layer for name, layer in named.items()}


def read_grid(text: str) -> Reshape:
    """The reshape that a grid means: `14x14`, `14x14+1` behind a prefix, `14x14@197` inside a longer sequence, or a word.

    Raises:
        MulticamError: If it is none of `GRIDS`.

    Example:
        >>> read_grid("14x14+1") == tokens(14, 14, prefix=1)
        True
    """
    words: dict[str, Reshape] = {"channels-last": channels_last, "as-it-is": as_it_is}
    if text in words:
        return words[text]
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?:\+(\d+)|@(\d+))?(,sequence-first)?", text)
    if found is None:
        raise unknown("grid", text, GRIDS)
    grid = [int(side) for side in found[1].split("x")]
    part = slice(int(found[3]), int(found[3]) + prod(grid)) if found[3] else None
    return tokens(*grid, prefix=int(found[2] or 0), part=part, sequence_first=bool(found[4]))


def read_method(text: str) -> type[CAM] | type[InputCAM]:
    """The method of that name, whatever its case and hyphens.

    Raises:
        MulticamError: If there is none.

    Example:
        >>> read_method("grad-cam++").__name__
        'GradCAMPlusPlus'
    """
    return _named("method", text.replace("++", "plusplus"), CAMS)


def read_attribution(text: str) -> Callable[..., Attributions]:
    """The function of attributions of that name, whatever its case, hyphens and underscores.

    Raises:
        MulticamError: If there is none.

    Example:
        >>> read_attribution("Guided-Backprop").__name__
        'guided_backprop'
    """
    return _named("method", text, FUNCTIONS)


def read_explanation(text: str) -> type[CAM] | type[InputCAM] | Callable[..., Attributions]:
    """The method or function of attributions of that name, whatever its case, hyphens and underscores.

    Raises:
        MulticamError: If there is none.

    Example:
        >>> read_explanation("hires-cam").__name__, read_explanation("Integrated-Gradients").__name__
        ('HiResCAM', 'integrated_gradients')
    """
    known: dict[str, type[CAM] | type[InputCAM] | Callable[..., Attributions]] = {**CAMS, **FUNCTIONS}
    return _named("method", text.replace("++", "plusplus"), known)


def no_layer(method: type[CAM] | type[InputCAM] | Callable[..., Attributions]) -> MulticamError:
    """The error for a method that explains a layer where no layer is given."""
    return MulticamError(f"{method.__name__} explains a layer: give one with --layer, as `multicam layers` lists them")


def read_metric(text: str) -> str:
    """The name of a metric of `evaluate`, whatever its case, hyphens and underscores.

    Raises:
        MulticamError: If there is none.

    Example:
        >>> read_metric("Average-Drop")
        'average drop'
    """
    return _named("metric", text, {name.replace(" ", ""): name for name in METRICS})


def read_players(texts: Iterable[str]) -> dict[str, list[str]]:
    """The players that `[LABEL=]NAME[,NAME…]` mean: names of inputs by label.

    Raises:
        MulticamError: If a label comes twice.

    Example:
        >>> read_players(["rgb", "text=ids,mask"])
        {'rgb': ['rgb'], 'text': ['ids', 'mask']}
    """
    players: dict[str, list[str]] = {}
    for text in texts:
        label, _, names = text.rpartition("=")
        label = label or names.replace(",", "+")
        if label in players:
            raise MulticamError(f"there are two players called {label!r}; --player LABEL={names} calls one otherwise")
        players[label] = names.split(",")
    return players


def read_cuts(texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The rows and columns of regions that `[NAME=]N` and `[NAME=]ROWSxCOLUMNS` mean, by input; without a name by `""`.

    Raises:
        MulticamError: If a text is neither.

    Example:
        >>> read_cuts(["rgb=4", "depth=2x3"])
        {'rgb': (4, 4), 'depth': (2, 3)}
    """
    cuts = {}
    for text in texts:
        name, _, cut = text.rpartition("=")
        rows, cross, columns = cut.partition("x")
        if not rows.isdecimal() or not (columns.isdecimal() if cross else True):
            raise MulticamError(f"regions are a number, or rows x columns as in 2x3, not {cut!r}")
        if name in cuts:
            raise MulticamError(f"there are two --regions of {f'input {name!r}' if name else 'all images'}")
        cuts[name] = (int(rows), int(columns if cross else rows))
    if "" in cuts and len(cuts) > 1:
        raise MulticamError("give --regions of all images, or of each by name, not both")
    return cuts


def read_options(function: Callable[..., Attributions], options: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The keyword arguments that names and values mean for a function.

    Raises:
        MulticamError: If the function has no such argument.

    Example:
        >>> read_options(read_attribution("smoothgrad"), [("samples", "10")])
        {'samples': 10}
    """
    known = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name in OPTIONS]
    for name, _ in options:
        if name not in known:
            raise unknown(f"option of {function.__name__}", name, known)
    return {name: read_method(text) if name == "method" else read_value(text) for name, text in options}


def _named(kind: str, text: str, known: Mapping[str, T]) -> T:
    plain = re.sub(r"[-_ ]", "", text.lower())
    if plain in REFINEMENTS:
        name = REFINEMENTS[plain]
        raise MulticamError(
            f"{name} refines another method's maps, which only Python can say: {name}(GradCAM(model, layers))"
        )
    if plain not in known:
        raise unknown(kind, plain, known)
    return known[plain]


def read_target(text: str) -> Target:
    """The target that a word means, or the function at `MODULE:FUNC`.

    Raises:
        MulticamError: If it is neither of `TARGETS` nor a function that exists.

    Example:
        >>> read_target("3"), read_target("prob:3,1")
        (ClassScore(index=3), Probability(index=(3, 1)))
    """
    words: dict[str, Target] = {
        "top": TopClass(),
        "binary": Binary(),
        "binary:no": Binary(positive=False),
        "regression": Regression(),
    }
    if text in words:
        return words[text]
    word, _, rest = text.partition(":")
    if re.fullmatch(r"-?\d+(,-?\d+)*", rest or word):
        numbers = [int(number) for number in (rest or word).split(",")]
        classes = numbers[0] if len(numbers) == 1 else numbers
        match word:
            case "prob":
                return Probability(classes)
            case "contrast":
                return Contrast(numbers[0], *numbers[1:])
            case "regression" if len(numbers) == 1:
                return Regression(numbers[0])
            case _ if not rest:
                return ClassScore(classes)
    elif rest.isidentifier() and word not in ("top", "prob", "contrast", "binary", "regression"):
        function: Target = find_object(text)
        return function
    raise unknown("target", text, TARGETS)
