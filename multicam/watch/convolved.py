"""The convolutions of a pass, with the weights that they really have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Convolved(TorchDispatchMode):
    """The weights, and whether transposed and in how many groups, of every convolution that is computed in its context.

    However a layer spells it, in one or three dimensions, padded or transposed, it arrives here as one operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Tensor, bool, int]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append((args[1], args[6], args[8]))
        return func(*args, **(kwargs or {}))
