"""Hooks that stay until they are taken away, for callers who run the model themselves."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Hear = Callable[[nn.Module, Any, Any], Any]


def on_return(modules: Iterable[nn.Module], *hear: Hear) -> list[RemovableHandle]:
    """Hooks on modules that tell what each is called with and returns, in every pass until they are removed.

    Args:
        modules: Those to listen to; one that is given twice is heard twice.
        *hear: Each is called as `hear(module, arguments, output)`; what it returns, unless None, takes the output's place.
    """
    return [module.register_forward_hook(each) for module in modules for each in hear]


def on_gradient(x: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Tell the gradient by a tensor, whenever one arrives in a backward pass.

    Args:
        x: The tensor; it requires a gradient.
        receive: Called with the gradient, of the shape of `x`.
    """
    x.register_hook(receive)  # type: ignore[no-untyped-call]
