"""Which tensors of a pass are computed from given ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multicam.tree import leaves


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
        self._exits = _Exits(self)

    def mark(self, *tensors: Tensor) -> None:
        """Mark these tensors."""
        self._memory |= _memory(tensors)
        self._escaped |= not all(map(has_memory, tensors))

    def touches(self, value: Any) -> bool:
        """Whether anything inside of `value` is marked."""
        return self._escaped or self._holds([x for x in leaves(value).values() if isinstance(x, Tensor)])

    def escape(self) -> None:
        """From now on everything counts as marked."""
        self._escaped = True
        self.touched()

    def __enter__(self) -> "Taint":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._exits.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _holds(self, value: Any) -> bool:
        return not self._memory.isdisjoint(_memory(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        marked = self._escaped or self._holds(given)
        returned = func(*args, **(kwargs or {}))
        if not marked:
            # Freed memory is used again.
            self._memory -= _memory(returned)
            return returned
        self._memory |= _memory(returned)
        if func._schema.is_mutable:
            self._memory |= _memory(given)
        leaked = any(
            isinstance(x, bool | int | float | complex) or (isinstance(x, Tensor) and not has_memory(x))
            for x in tree_leaves(returned)
        )
        if leaked or torch.Tag.dynamic_output_shape in func.tags:
            self.escape()
        self.touched()
        return returned


class _Exits(TorchFunctionMode):
    """Sees marked tensors leave PyTorch where the dispatcher does not: to lists, arrays and text."""

    WAYS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__)

    def __init__(self, taint: Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAYS and self._taint.touches(args[0]):
            self._taint.escape()
        return func(*args, **(kwargs or {}))


def has_memory(x: Tensor) -> bool:
    """Whether a tensor is plain memory: neither sparse nor nested, nor the wrapper of a function transform."""
    if x.layout is not torch.strided or x.is_nested:
        return False
    try:
        x.untyped_storage()
    except NotImplementedError:
        return False
    return True


def _memory(value: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, Tensor) and has_memory(x)}
