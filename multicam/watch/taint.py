"""Which tensors of a pass are computed from given ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multicam.call.tree import leaves


class Taint(TorchDispatchMode):
    """Marks every tensor that is computed from marked ones, also where no gradient reaches.

    A mark belongs to memory and not to a tensor, so views and operations in place carry it. Once a marked value became a number or
    a shape, anything may depend on it, and everything that follows counts as marked. Marks have colours, the bits of a number,
    so that one pass tells what depends on which of several things.

    Example:
        >>> x, y = torch.rand(3), torch.rand(3)
        >>> taint = Taint()
        >>> taint.mark(x)
        >>> with taint:
        ...     z = x.argmax() + y
        >>> taint.colours(z), taint.colours([y])
        (1, 0)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marked = 0  # all colours that were given
        self.touched: Callable[[int], None] = lambda colours: None  # called for every operation on something marked
        self._memory: dict[int, int] = {}
        self._escaped = 0
        self._exits = _Exits(self)

    def mark(self, *tensors: Tensor, colours: int = 1) -> None:
        """Mark these tensors."""
        self._marked |= colours
        self._paint(tensors, colours)
        if not all(map(has_memory, tensors)):
            self._escaped |= colours

    def colours(self, value: Any) -> int:
        """The colours of everything inside of `value`."""
        return self._escaped | self._held([x for x in leaves(value).values() if isinstance(x, Tensor)])

    def escape(self, colours: int) -> None:
        """From now on everything counts as marked with these colours."""
        self._escaped |= colours
        self.touched(self._escaped)

    def __enter__(self) -> "Taint":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._exits.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _held(self, value: Any) -> int:
        found = 0
        for memory in _memory(value):
            found |= self._memory.get(memory, 0)
        return found

    def _paint(self, value: Any, colours: int) -> None:
        for memory in _memory(value):
            self._memory[memory] = self._memory.get(memory, 0) | colours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self._higher(func, args, kwargs or {})
        given = (args, kwargs or {})
        colours = self._escaped | self._held(given)
        returned = func(*args, **(kwargs or {}))
        if not colours:
            # Freed memory is used again.
            for memory in _memory(returned):
                self._memory.pop(memory, None)
            return returned
        fresh = _memory(returned) - _memory(given)
        self._memory |= dict.fromkeys(fresh, colours)
        self._paint(returned, colours)
        if func._schema.is_mutable:
            self._paint(_written(func, args, kwargs or {}), colours)
        leaked = any(
            isinstance(x, bool | int | float | complex) or (isinstance(x, Tensor) and not has_memory(x))
            for x in tree_leaves(returned)
        )
        if leaked or torch.Tag.dynamic_output_shape in func.tags:
            self.escape(colours)
        self.touched(colours)
        return returned

    def _higher(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        # The functions that it is given may close over anything, which is not among its arguments: it depends on all that is marked.
        returned = func(*args, **kwargs)
        self._paint(returned, self._marked)
        self.touched(self._marked)
        return returned


class _Exits(TorchFunctionMode):
    """Sees marked tensors leave PyTorch where the dispatcher does not: to lists, arrays and text."""

    WAYS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__)

    def __init__(self, taint: Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAYS and (colours := self._taint.colours(args[0])):
            self._taint.escape(colours)
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


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes into."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _memory(value: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, Tensor) and has_memory(x)}
