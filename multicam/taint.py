"""Which tensors of a pass are computed from given ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Taint(TorchDispatchMode):
    """Marks every tensor that is computed from marked ones, also where no gradient reaches.

    A mark belongs to memory and not to a tensor, so views and operations in place carry it. Once a marked value became a number or
    a shape, anything may depend on it, and everything that follows counts as marked.

    Example:
        >>> x, y = torch.rand(3), torch.rand(3)
        >>> taint = Taint()
        >>> taint.mark(x)
        >>> with taint:
        ...     z = x.argmax() + y
        >>> taint.touches(z), taint.touches([y])
        (True, False)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.touched: Callable[[], None] = lambda: None  # called for every operation on something marked
        self._memory: set[int] = set()
        self._escaped = False

    def mark(self, *tensors: Tensor) -> None:
        """Mark these tensors."""
        self._memory |= _memory(tensors)

    def touches(self, value: Any) -> bool:
        """Whether anything inside of `value` is marked."""
        return self._escaped or not self._memory.isdisjoint(_memory(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        marked = self.touches(given)
        returned = func(*args, **(kwargs or {}))
        if not marked:
            # Freed memory is used again.
            self._memory -= _memory(returned)
            return returned
        self._memory |= _memory(returned)
        if func._schema.is_mutable:
            self._memory |= _memory(given)
        leaked = any(isinstance(x, bool | int | float | complex) for x in tree_leaves(returned))
        self._escaped |= leaked or torch.Tag.dynamic_output_shape in func.tags
        self.touched()
        return returned


def _memory(value: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, Tensor) and _has_storage(x)}


def _has_storage(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested
