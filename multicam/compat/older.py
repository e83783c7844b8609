"""What older versions of pytorch-grad-cam took, and calls that do not fit: accepted where they mean the same, or refused."""

from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from multicam.errors import MulticamError, unknown

P = ParamSpec("P")
R = TypeVar("R")
RENAMED = {"target_layer": "target_layers", "target_category": "targets"}


def spoken(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with the arguments of older versions, and with words of ours for a call that does not fit.

    `target_layer=` and `target_category=` are the old names of `target_layers=` and `targets=`; `use_cuda`, by name or in the
    place that it had, and `device=` are taken where they say where the model is.

    Args:
        function: A function or a method.

    Example:
        >>> spoken(lambda model, target_layers: target_layers)(nn.Identity(), target_layer="layer4", use_cuda=False)
        'layer4'
    """
    taken = signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        name = _shown(function, args)
        today, named = _today(name, taken, args, kwargs)
        try:
            taken.bind(*today, **named)
        except TypeError as error:
            wrong = [name for name in named if name not in taken.parameters]
            if wrong:
                raise unknown(f"argument of {name}", wrong[0], _names(taken)) from None
            raise MulticamError(
                f"{name} takes ({', '.join(_names(taken))}), and this call does not fit: {error}"
            ) from None
        return function(*today, **named)

    return called


def _today(name: str, taken: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The call as it is written today."""
    named = dict(kwargs)
    where = next((i for i, arg in enumerate(taken.parameters) if arg in ("reshape_transform", "device")), None)
    if where is not None and len(args) > where and isinstance(args[where], bool):  # where use_cuda was
        named.setdefault("use_cuda", args[where])
        args = args[:where] + args[where + 1 :]
    for old, new in RENAMED.items():
        if old in named and old not in taken.parameters and new in taken.parameters:
            if new in taken.bind_partial(*args).arguments or new in named:
                raise MulticamError(f"{name}: {old} is the old name of {new}; give one of them")
            named[new] = named.pop(old)
    for device in {"use_cuda", "device"} & named.keys() - taken.parameters.keys():
        if "target_layers" in taken.parameters or (device == "use_cuda" and "model" in taken.parameters):
            model = named.get("model", taken.bind_partial(*args[:2]).arguments.get("model"))
            refuse_elsewhere(model, device, named.pop(device))
    return args, named


def refuse_elsewhere(model: Any, name: str, value: Any) -> None:
    """Refuse a device on which the model is not.

    Args:
        model: The model.
        name: How the device was said, `use_cuda` or `device`.
        value: What was said.

    Raises:
        MulticamError: If it is elsewhere; versions that had these arguments moved it for good.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    there = next((parameter.device for parameter in parameters), None)
    if value is None or value is False or there is None:
        return
    asked = torch.device("cuda" if value is True else value)
    if asked.type != there.type or asked.index not in (None, there.index):
        raise MulticamError(
            f"{name}={value!r}, but the model is on {there}, and it is not moved here: move it before, as in "
            f"model.to({str(asked)!r}), and leave {name} out; the images follow the model"
        )


def _names(taken: Signature) -> list[str]:
    return [name for name in taken.parameters if name != "self"]


def _shown(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """`GradCAM` for its `__init__`, and what else is called of which class."""
    owner, _, method = function.__qualname__.rpartition(".")
    owner = type(args[0]).__name__ if args and owner else owner
    return {"__init__": owner, "__call__": f"the call of a {owner}"}.get(method, f"{owner}.{method}".lstrip("."))
