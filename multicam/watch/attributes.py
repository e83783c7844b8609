"""What modules hold in their attributes, noted and put back: flags, hooks, counters, states that a forward leaves there."""

import operator
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = frozenset({str, int, float, bool, type(None)})
# Those that modules have by the dozen, mostly empty, and whose own copies are exact.
USUAL = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
STATELESS = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
ABSENT = object()

Path = tuple[object, ...]


class Attributes:
    """The attributes of a model's modules, and what is in the containers and objects among them, to any depth.

    Put back are the objects, not their insides: what tensors hold is the matter of `multicam.watch.memory`. Generators of random numbers go back to
    their states, and NumPy's arrays to their values. An object's attributes are put back where its class is written in Python and not Python's own;
    what pools, locks, files or iterators hold stays as the pass leaves it.

    Args:
        modules: The modules.
        values: Other values whose insides are put back, by name.
        foreign: Whether the pass is a tool's, whose hooks leave what they see in new attributes of the modules that they are on, for its
            backward pass. They stay.

    Attributes:
        tensors: The tensors among the attributes, by name, but for the parameters of these modules.
        switches: All attributes that are true or false, in order: a model may take another way when one of them is switched.
        left: Objects that may keep a state which is not put back, by name.
    """

    def __init__(
        self, modules: Iterable[nn.Module], values: Mapping[str, Any] | None = None, foreign: bool = False
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.switches: list[bool] = []
        self.left: dict[str, Any] = {}
        self._hooked: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._empty: list[Any] = []
        self._full: dict[int, tuple[Any, Any, Path]] = {}
        self._slots: list[tuple[Any, dict[str, Any], Path]] = []
        self._states: list[Callable[[], object]] = []
        self._open: list[tuple[Path, Any]] = [(((name,), value)) for name, value in (values or {}).items()]
        # Every pass comes through here, and a large model has ten thousand attributes, nearly all of them plain or empty.
        empty, full, switches = self._empty, self._full, self.switches
        for place, module in enumerate(modules):
            attributes = vars(module)
            if foreign and (module._forward_hooks or module._forward_pre_hooks):
                self._hooked.append((attributes, attributes.copy()))
            else:
                full[id(attributes)] = attributes, attributes.copy(), (place,)
            for name, value in attributes.items():
                kind = type(value)
                if kind in USUAL:
                    if not value:
                        empty.append(value)
                    elif name in ("_parameters", "_buffers", "_modules"):
                        full[id(value)] = value, value.copy(), (place, name)
                    else:
                        self._open.append(((place, name), value))
                elif kind in PLAIN:
                    if kind is bool:
                        switches.append(value)
                elif kind is not tuple or not PLAIN.issuperset(map(type, value)):
                    self._open.append(((place, name), value))
            for name, x in module._buffers.items():
                if type(x) is Tensor:
                    self.tensors[f"{place}.{name}"] = x
                elif x is not None:
                    self._open.append(((place, name), x))
            for name, x in module._parameters.items():
                if type(x) is not nn.Parameter and x is not None:
                    self._open.append(((place, name), x))
        while self._open:
            self._note(*self._open.pop())

    def restore(self) -> None:
        """Put everything back; it may be called again where it was interrupted."""
        for container in self._empty:
            if container:
                container.clear()
        for attributes, before in self._hooked:
            attributes.update(before)
        for container, before, _ in self._full.values():
            if not _is_as(container, before):
                _refill(container, before)
        for value, slots, _ in self._slots:
            _reset(value, slots)
        for restore in self._states:
            restore()

    def changed(self) -> list[str]:
        """The names of the containers and objects that hold something else now."""
        found = [_name(path) for value, before, path in self._full.values() if not _is_as(value, before)]
        found += [_name(path) for value, before, path in self._slots if not _is_as(_slots(value, before), before)]
        return found

    def _note(self, path: Path, value: Any) -> None:
        if isinstance(value, dict | list | set | deque):
            if id(value) in self._full:
                return
            self._full[id(value)] = value, _copied(value), path
        if isinstance(value, dict):
            self._note_items(path, value.items())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            self._note_items(path, enumerate(value))
        elif isinstance(value, Tensor):
            self.tensors[_name(path)] = value
            if type(value) in (Tensor, nn.Parameter):
                return
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not isinstance(value, np.memmap):
                self._states.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self._states.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self._states.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self._states.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._states.append(partial(value.setstate, value.getstate()))
        if type(value) in USUAL:
            return
        if self._holds(value):
            self._note_object(path, value)
        elif hasattr(value, "__next__") or (hasattr(value, "__dict__") and not isinstance(value, STATELESS)):
            self.left[_name(path)] = value

    def _note_items(self, path: Path, items: Iterable[tuple[object, Any]]) -> None:
        self._open += [((*path, key), item) for key, item in items if type(item) not in PLAIN]

    def _note_object(self, path: Path, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._open.append((path, attributes))
        names = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
        if names and id(value) not in self._full:
            slots = _slots(value, [name for name in names if name not in ("__dict__", "__weakref__")])
            self._full[id(value)] = slots, slots, path  # so that it is noted once
            self._slots.append((value, slots, path))
            self._note_items(path, slots.items())

    def _holds(self, value: Any) -> bool:
        """Whether the attributes of an object are put back: those of Python's own classes hold threads, locks and files."""
        kind = type(value)
        module = kind.__module__ if isinstance(kind.__module__, str) else ""
        own = module.partition(".")[0]
        if isinstance(value, STATELESS) or (own in sys.stdlib_module_names and own not in ("types", "collections")):
            return False
        # The graphs and compiled code of PyTorch are large, and do not change.
        return isinstance(value, nn.Module) or not module.startswith(("torch.fx", "torch._"))


def _slots(value: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name, ABSENT) for name in names}


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _copied(container: Any) -> Any:
    """The same objects in a container of their own."""
    if type(container) in USUAL:
        return container.copy()
    kind = next(kind for kind in (dict, list, set, deque) if isinstance(container, kind))
    return kind(container)


def _is_as(container: Any, before: Any) -> bool:
    """Whether a container holds the same objects in the same order."""
    if len(container) != len(before) or not all(map(operator.is_, container, before)):
        return False
    return not isinstance(container, dict) or all(map(operator.is_, container.values(), before.values()))


def _refill(container: Any, before: Any) -> None:
    """Put the same objects into a container that it held before, in the same order; a class of its own may do more than that."""
    if isinstance(container, list):
        list.__setitem__(container, slice(None), before)
    elif isinstance(container, dict):
        base = OrderedDict if isinstance(container, OrderedDict) else dict
        # In this order, because other threads may be reading a module's attributes.
        base.update(container, before)
        for key in [key for key in container if key not in before]:
            base.__delitem__(container, key)
        if not all(map(operator.is_, container, before)):
            for key, value in before.items():
                base.__delitem__(container, key)
                base.__setitem__(container, key, value)
    elif isinstance(container, deque):
        deque.clear(container)
        deque.extend(container, before)
    else:
        set.clear(container)
        set.update(container, before)


def _reset(value: Any, slots: Mapping[str, Any]) -> None:
    for name, before in slots.items():
        if getattr(value, name, ABSENT) is before:
            continue
        if before is ABSENT:
            object.__delattr__(value, name)
        else:
            object.__setattr__(value, name, before)  # also where the class is frozen
