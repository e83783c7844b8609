"""Which tensors of a pass are computed from given ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multicam.call.tree import leaves
from multicam.watch.memory import written_by
from multicam.watch.plain import has_memory


class Taint(TorchDispatchMode):
    """Marks every tensor that is computed from marked ones, also where no gradient reaches.

    A mark belongs to memory and not to a tensor, so views and operations in place carry it. Once a marked value became a number or
    a shape, anything may depend on it, and everything that follows counts as marked. Marks have colours, the bits of a number,
    so that one pass tells what depends on which of several things. Memory that comes into a pass from nowhere, made out of sight by another thread or
    by a kernel that PyTorch does not know, may depend on all that is marked, and counts as that.

    Example:
        >>> x, y = torch.rand(3), torch.rand(3)
        >>> taint = Taint()
        >>> taint.mark(x)
        >>> taint.know([y])
        >>> with taint:
        ...     z = x.argmax() + y
        >>> taint.colours(z), taint.colours([y])
        (1, 0)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marked = 0  # all colours that were given
        self.touched: Callable[[int], None] = _ignored  # called for every operation on something marked
        self.writing: Callable[[Tensor], None] = _ignored  # called with what an operation is about to write into
        self._memory: dict[int, int] = {}
        self._addresses: dict[int, StorageWeakRef] = {}  # while they are there, no other memory has the address
        self._escaped = 0
        self.decided = False  # whether any value became a number or a shape, of marked things or not
        self.numbers = 0  # the colours of what became a number, by which a branch may be taken for all rows at once
        self._exits: _Exits | None = None  # only in a pass, as it is a cycle

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These were there before, and depend on nothing."""
        self._paint(list(tensors), 0)

    def mark(self, *tensors: Tensor, colours: int = 1) -> None:
        """Mark these tensors."""
        self._marked |= colours
        self._paint(tensors, colours)
        if not all(map(has_memory, tensors)):
            self._escaped |= colours

    def colours(self, value: Any) -> int:
        """The colours of everything inside of `value`."""
        return self._escaped | self._held([x for x in leaves(value).values() if isinstance(x, Tensor)])

    @property
    def escaped(self) -> int:
        """The colours of what became a number or a shape, by which all that followed may have been decided."""
        return self._escaped

    def escape(self, colours: int) -> None:
        """From now on everything counts as marked with these colours."""
        self._escaped |= colours
        self.touched(self._escaped)

    def __enter__(self) -> "Taint":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._exits = _Exits(self)
        self._exits.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._exits is not None:
            self._exits.__exit__(*error)  # type: ignore[no-untyped-call]
            self._exits = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.touched = self.writing = _ignored

    def _held(self, value: Any) -> int:
        found = 0
        for memory in _memory(value):
            if memory._cdata not in self._memory:
                self._take(memory, self._marked)
            found |= self._memory[memory._cdata]
        return found

    def _paint(self, value: Any, colours: int) -> None:
        for memory in _memory(value):
            self._take(memory, self._memory.get(memory._cdata, 0) | colours)

    def _take(self, memory: UntypedStorage, colours: int) -> None:
        self._memory[memory._cdata] = colours
        if memory._cdata not in self._addresses:
            self._addresses[memory._cdata] = StorageWeakRef(memory)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher(func, args, kwargs)
        made_here = func is torch.ops.aten.lift_fresh.default  # of numbers of Python's
        colours = self._escaped | (0 if made_here else self._held((args, kwargs)))
        written = written_by(func, args, kwargs)
        for x in written:
            self.writing(x)
        returned = func(*args, **kwargs)
        found = tree_leaves(returned)
        number = any(isinstance(x, bool | int | float | complex) for x in found)
        hidden = any(isinstance(x, Tensor) and not has_memory(x) for x in found)
        leaked = torch.Tag.dynamic_output_shape in func.tags or number or hidden
        self.decided |= leaked
        self.numbers |= colours if number else 0
        if not colours:
            self._paint(returned, 0)
            return returned
        self._paint([returned, written], colours)
        if leaked:
            self.escape(colours)
        self.touched(colours)
        return returned

    def _higher(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        # The functions that it is given may close over anything, which is not among its arguments: it depends on all that is marked.
        returned = func(*args, **kwargs)
        self._paint(returned, self._marked)
        self.touched(self._marked)
        return returned


def _ignored(_: Any) -> None:
    pass


class _Exits(TorchFunctionMode):
    """Sees marked tensors leave PyTorch where the dispatcher does not: to lists, arrays and text."""

    WAYS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__)

    def __init__(self, taint: Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAYS:
            self._taint.decided = True
            if colours := self._taint.colours(args[0]):
                self._taint.numbers |= colours
                self._taint.escape(colours)
        return func(*args, **(kwargs or {}))


def _memory(value: Any) -> list[UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(value) if isinstance(x, Tensor) and has_memory(x)]
