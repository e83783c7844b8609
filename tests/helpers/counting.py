"""How often the modules of a model run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """How often each module runs for real."""
    counts: dict[str, int] = {}
    originals = {}
    for path, module in model.named_modules():

        def forward(*args: Any, path: str = path, of: Callable[..., Any] = module.forward, **kwargs: Any) -> Any:
            counts[path] = counts.get(path, 0) + 1
            return of(*args, **kwargs)

        originals[module] = module.__dict__.get("forward")
        module.forward = forward
    try:
        yield counts
    finally:
        for module, original in originals.items():
            del module.forward
            if original is not None:
                module.forward = original
