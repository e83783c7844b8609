"""The attributions that are called alike, for whoever needs to choose one by name or to try them all: what the face names."""

from collections.abc import Callable
from inspect import Parameter, isfunction, signature

from multicam import saliency
from multicam.saliency.attributions import Attributions


def _needs(function: Callable[..., Attributions]) -> set[str]:
    """The arguments that a caller must give."""
    return {p.name for p in signature(function).parameters.values() if p.default is Parameter.empty}


# Entry by entry. Expected gradients need references, and a captum algorithm needs to be named.
ATTRIBUTIONS: tuple[Callable[..., Attributions], ...] = tuple(
    function
    for name in saliency.__dir__()
    if isfunction(function := getattr(saliency, name)) and _needs(function) <= {"model", "inputs", "layers"}
)
