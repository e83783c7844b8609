"""How any explanation is called, whatever makes it: with a model, inputs and a target, to one map per input."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import TargetLike
from multicam.cam.base import CAM, InputCAM
from multicam.cam.together import refuse_unmade
from multicam.errors import MulticamError
from multicam.maps import Maps
from multicam.saliency.attributions import Attributions

# `gradient` and its like are such functions, and any lambda may be one.
Explain = Callable[[nn.Module, Any, TargetLike], Tensor | Mapping[str, Tensor]]


def explainer(method: type[CAM] | type[InputCAM], *arguments: Any, signed: bool = False, **options: Any) -> Explain:
    """A method as a function of model, inputs and target, for whoever calls it with several models or beside others.

    Args:
        method: A class such as `GradCAM` or `RISE`.
        arguments: What it takes behind the model, such as layers.
        signed: As for the call of a `CAM`.
        options: What else it takes, by name.

    Raises:
        MulticamError: If it is no such class, or is not made of a model and these arguments.

    Example:
        >>> import torch
        >>> from multicam import HiResCAM
        >>> explain = explainer(HiResCAM, {"input": "0"})
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> explain(model, torch.rand(2, 3, 16, 16), 1)["input"].shape
        torch.Size([2, 16, 16])
    """
    if not (isinstance(method, type) and issubclass(method, CAM | InputCAM)):
        raise MulticamError(
            f"explainer is for classes such as GradCAM; {method!r} can be used as it is, or in a lambda"
        )
    refuse_unmade(method, CAM | InputCAM, *arguments, **options)

    def explain(model: nn.Module, inputs: Any, target: TargetLike) -> Tensor | Maps:
        return method(model, *arguments, **options)(inputs, target, signed=signed)

    return explain


def explained_maps(explain: Explain, model: nn.Module, call: Inputs, target: TargetLike) -> Maps:
    """The maps of an explanation by the full names of their inputs.

    Args:
        explain: What makes it.
        model: Any module.
        call: The call, bound to the model.
        target: As for the call of a `CAM`.

    Raises:
        MulticamError: If it is no such function, or returns anything but maps of inputs.
    """
    refuse_uncallable(explain)
    return named_maps(explain(model, call, target), call)


def refuse_uncallable(explain: Any) -> None:
    """Refuse what cannot be called with model, inputs and target."""
    if isinstance(explain, type | CAM | InputCAM) or not callable(explain):
        raise MulticamError(
            f"a method is a function of model, inputs and target, not {explain!r}; explainer(GradCAM, layers) makes one of a class"
        )


def named_maps(found: Any, call: Inputs) -> Maps:
    """What an explanation returned, as maps by the full names of their inputs; of attributions, those of `Attributions.maps`.

    Raises:
        MulticamError: If these are no maps of inputs.
    """
    maps = found.maps() if isinstance(found, Attributions) else found
    by_input = {call.name(name): m.detach() for name, m in by_name(maps, call).items()}
    return Maps(by_input, getattr(maps, "comparable", True))


def refuse_not_finite(maps: Maps) -> Maps:
    """The maps, by input.

    Raises:
        MulticamError: If one has NaN or infinite values.
    """
    for name, m in maps.items():
        bad = ~torch.isfinite(m).flatten(1).all(1)
        if bad.any():
            raise MulticamError(
                f"the map of input {name!r} has NaN or infinite values in sample {int(bad.nonzero()[0])}"
            )
    return maps


def by_name(found: Any, call: Inputs) -> Mapping[str, Tensor]:
    """What an explanation returned, by what it calls the inputs; one tensor is of the only image input.

    Raises:
        MulticamError: If it is not clear which input a tensor is of, or there is something else.
    """
    if isinstance(found, Tensor):
        if len(call.images) != 1:
            raise MulticamError(
                f"say which input the map is of, as in {{name: map}}; there are: {', '.join(map(repr, call.images))}"
            )
        return dict.fromkeys(call.images, found)
    if not isinstance(found, Mapping) or not all(isinstance(values, Tensor) for values in found.values()):
        raise MulticamError(f"an explanation is a map, a dict of maps or Attributions, not a {type(found).__name__}")
    if not found:
        raise MulticamError("the explanation is empty: it has no map of any input")
    return found
