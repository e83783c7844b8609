"""What a forward can reach that does not belong to its model: a state that it keeps there is not put back."""

import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from multicam.watch.attributes import PLAIN, Attributes
from multicam.watch.memory import SMALL
from multicam.watch.plain import has_memory

Read = Callable[[], Any]


class Outside:
    """Variables around the methods of a model's classes, globals that they name, and attributes of the classes.

    Args:
        modules: The modules.
        others: Values that the modules hold and whose insides are not put back, by name.
    """

    def __init__(self, modules: Iterable[nn.Module], others: dict[str, Any]) -> None:
        reads = {name: read for kind in {type(module) for module in modules} for name, read in _reached(kind)}
        self._values = [(name, read, value) for name, read in reads.items() if _may_change(value := read())]
        found = {name: value for name, _, value in self._values if type(value) not in PLAIN}
        self._insides = _Insides([], found | others)
        self._tensors = [(name, x, _noted(x)) for name, x in self._insides.tensors.items()]
        self._iterators = [(name, value, _left(value)) for name, value in (found | others).items()]

    def changed(self) -> list[str]:
        """The names of what is another now."""
        names = [name for name, read, before in self._values if _differs(read(), before)]
        names += self._insides.changed()
        names += [name for name, x, before in self._tensors if _moved(x, before)]
        names += [name for name, value, before in self._iterators if _left(value) != before]
        return sorted(set(names))


class _Insides(Attributes):
    """Values with their insides, those of Python's own classes included."""

    def _holds(self, value: Any) -> bool:
        return hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | FunctionType)


def _reached(kind: type) -> Iterator[tuple[str, Read]]:
    """The names of what the methods of a class can reach, and how each is read."""
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if owner.__module__.partition(".")[0] == "torch":
            continue
        methods = [method for value in vars(owner).values() for method in _functions(value)]
        seen: set[int] = set()
        while methods:
            method = methods.pop()
            if id(method) in seen or method.__globals__.get("__name__") != owner.__module__:
                continue
            seen.add(id(method))
            for name, read in _named(method):
                yield name, read
                methods += _functions(read())
        for name, value in vars(owner).items():
            if not name.startswith("__") and not _functions(value):
                yield f"{owner.__name__}.{name}", partial(vars(owner).get, name)


def _functions(value: Any) -> list[FunctionType]:
    parts = (value, getattr(value, "__func__", None), getattr(value, "fget", None), getattr(value, "__wrapped__", None))
    return [part for part in parts if isinstance(part, FunctionType)]


def _named(function: FunctionType) -> Iterator[tuple[str, Read]]:
    """The variables of the functions around one, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, partial(_content, cell)
    space = function.__globals__
    for name in _names(function.__code__):
        if name in space:
            yield name, partial(space.get, name)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _may_change(value: Any) -> bool:
    return not isinstance(value, type | ModuleType | FunctionType)


def _differs(now: Any, before: Any) -> bool:
    if type(now) in PLAIN and type(before) in PLAIN:
        return bool(now != before)
    return now is not before


def _noted(x: Tensor) -> tuple[int, Tensor | None]:
    """How often a tensor was written into; not all operations count, so a small one is copied."""
    copied = has_memory(x) and not x.is_quantized and x.numel() <= SMALL
    return 0 if x.is_inference() else x._version, x.detach().clone() if copied else None


def _moved(x: Tensor, before: tuple[int, Tensor | None]) -> bool:
    version, values = _noted(x)
    return version != before[0] or (values is not None and before[1] is not None and not torch.equal(values, before[1]))


def _left(value: Any) -> Any:
    """How far an iterator of Python's own is, as far as it says."""
    if not hasattr(value, "__next__") or isinstance(value, Tensor):
        return None
    return operator.length_hint(value, -1), repr(value)
