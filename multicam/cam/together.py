"""Several methods from one pass, and what a class of a method is."""

from collections.abc import Iterable, Mapping
from inspect import isabstract, signature
from types import UnionType
from typing import Any, overload

from torch import Tensor, nn

from multicam import cam
from multicam.call.scorer import OutputLike, TargetLike
from multicam.cam.base import CAM, InputCAM, LayersLike, named_layers
from multicam.cam.laying import ONLY
from multicam.cam.wrappers import Wrapper
from multicam.errors import MulticamError
from multicam.maps import Maps
from multicam.watch.layers import LayerLike
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import unwrapped


@overload
def explain_methods(
    model: nn.Module,
    inputs: Any,
    layers: LayerLike,
    methods: Iterable[type[CAM]],
    target: TargetLike = None,
    *,
    output: OutputLike = None,
    signed: bool = False,
) -> dict[str, Tensor]: ...


@overload
def explain_methods(
    model: nn.Module,
    inputs: Any,
    layers: Mapping[str, LayerLike],
    methods: Iterable[type[CAM]],
    target: TargetLike = None,
    *,
    output: OutputLike = None,
    signed: bool = False,
) -> dict[str, Maps]: ...


def explain_methods(
    model: nn.Module,
    inputs: Any,
    layers: LayersLike,
    methods: Iterable[type[CAM]],
    target: TargetLike = None,
    *,
    output: OutputLike = None,
    signed: bool = False,
) -> dict[str, Tensor] | dict[str, Maps]:
    """The maps of several methods, by class name, all from one forward and one backward pass.

    Args:
        model: As for `CAM`.
        inputs: As for the call of a `CAM`.
        layers: As for `CAM`.
        methods: The classes of the methods.
        target: As for the call of a `CAM`.
        output: As for `CAM`.
        signed: As for the call of a `CAM`.

    Raises:
        MulticamError: As for `CAM`; or one of the methods is no class that is made of a model and layers.

    Example:
        >>> import torch
        >>> from multicam import GradCAM, HiResCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> explain_methods(model, torch.rand(2, 3, 16, 16), "1", [GradCAM, HiResCAM]).keys()
        dict_keys(['GradCAM', 'HiResCAM'])
    """
    named = _by_name(methods, layers, output)
    trace = Trace(unwrapped(model), inputs, named_layers(layers), target, output)
    maps = {name: method(model, layers, output=output).maps(trace, signed=signed) for name, method in named.items()}
    return maps if isinstance(layers, Mapping) else {name: found[ONLY] for name, found in maps.items()}


def refuse_unmade(method: object, kind: type | UnionType, *arguments: Any, **options: Any) -> None:
    """Refuse what is no class of a method that a model and some arguments make, and say how it is used instead.

    Args:
        method: What the caller gave as a method.
        kind: What the class is derived from: `CAM`, `InputCAM` or either.
        arguments: What it will be given behind the model.
        options: What it will be given by name.
    """
    if not (isinstance(method, type) and issubclass(method, kind)) or isabstract(method) or issubclass(method, Wrapper):
        raise MulticamError(f"methods are classes such as GradCAM, not {_shown(method)}{_instead(method)}")
    taken = signature(method)
    try:
        taken.bind(None, *arguments, **options)
    except TypeError as error:
        given = ", ".join(["model", *map(repr, arguments), *(f"{name}={value!r}" for name, value in options.items())])
        raise MulticamError(
            f"{method.__name__} takes ({', '.join(taken.parameters)}), so {method.__name__}({given}) cannot be made: {error}"
        ) from None


def _by_name(methods: Iterable[type[CAM]], layers: LayersLike, output: OutputLike) -> dict[str, type[CAM]]:
    """The classes of methods by their names."""
    if isinstance(methods, str) or not isinstance(methods, Iterable):  # callers without a type checker
        raise MulticamError(f"methods are several classes in a list, as in [GradCAM, HiResCAM], not {_shown(methods)}")
    named: dict[str, type[CAM]] = {}
    for method in methods:
        refuse_unmade(method, CAM, layers, output=output)
        if named.setdefault(method.__name__, method) is not method:
            raise MulticamError(
                f"two methods are called {method.__name__!r}, the name of their maps: rename one of them"
            )
    if not named:
        raise MulticamError("there is no method: give classes such as GradCAM in a list")
    return named


def _shown(method: object) -> str:
    return f"the class {method.__module__}.{method.__qualname__}" if isinstance(method, type) else repr(method)


def _instead(method: object) -> str:
    """How something is used that is no class of a method on layers."""
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    known = {each.lower(): each for each in cam.__dir__()}
    plain = name.lower().replace("-", "").replace("_", "").replace("++", "plusplus")
    match method:
        case CAM():
            return ", which is made already: call it, or give its class"
        case InputCAM():
            return ", which explains inputs and not layers: call it"
        case type() if issubclass(method, CAM | InputCAM) and isabstract(method):
            return ", which is abstract: give one that is derived from it"
        case type() if issubclass(method, InputCAM):
            return f", which explains inputs and not layers: {name}(model)(inputs, target)"
        case type() if issubclass(method, Wrapper):
            return f", which refines a method and is made of one: {name}(GradCAM(model, layers))(inputs, target)"
        case _ if plain in known:
            return f"; here it is multicam.{known[plain]}"
        case _ if callable(method):
            return ", which is called by itself"
    return ""
