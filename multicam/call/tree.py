"""Nested containers: name their leaves, and build them anew with other leaves.

What a model takes and what a layer returns comes in lists, tuples, named tuples, mappings, dataclasses and objects that
carry tensors as attributes. A leaf is anything that is none of these, or an object without a tensor in it (a dataclass or
namespace: without a tensor, list or array). Its path is the keys that lead to it, joined by dots: `samples.tensors`, `x.0`.
"""

import copy
from collections import UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from multicam.errors import MulticamError, unknown

Path = tuple[str, ...]
Whole = Callable[[str, Any], bool]


def leaves(value: Any, whole: Whole = lambda path, inner: False) -> dict[str, Any]:
    """Every leaf of `value` by its path; a value that is itself a leaf has the path `""`.

    Args:
        value: Anything.
        whole: Called as `whole(path, inner)` for all that is in `value`: whether it is one leaf, whatever is in it.

    Example:
        >>> leaves({"image": 1, "text": [2, None]})
        {'image': 1, 'text.0': 2, 'text.1': None}
        >>> leaves({"image": 1, "text": [2, None]}, lambda path, inner: path == "text")
        {'image': 1, 'text': [2, None]}
    """
    found: dict[str, Any] = {}
    for path, leaf in _walk(value, whole, (), ()):
        name = ".".join(path)
        if name in found:
            raise MulticamError(f"two leaves are both called {name!r}; rename a key so that every path is different")
        found[name] = leaf
    return found


def nodes(value: Any) -> dict[str, Any]:
    """All that is in `value` by its path, containers as well as leaves.

    Example:
        >>> nodes({"image": 1, "text": [2]})
        {'image': 1, 'text': [2], 'text.0': 2}
    """
    found: dict[str, Any] = {}

    def note(path: str, inner: Any) -> bool:
        found[path] = inner
        return False

    leaves(value, note)
    return {path: inner for path, inner in found.items() if path}


def rebuild(value: Any, exchange: Callable[[str, Any], Any], whole: Whole = lambda path, inner: False) -> Any:
    """A copy of `value` in fresh containers of the same types, each leaf replaced by `exchange(path, leaf)`.

    Args:
        value: Anything.
        exchange: What takes the place of a leaf.
        whole: As for `leaves`.

    Example:
        >>> rebuild({"image": 1, "text": (2, 3)}, lambda path, leaf: leaf * 10)
        {'image': 10, 'text': (20, 30)}
    """
    return _rebuild(value, exchange, whole, (), ())


def resolve(what: str, name: str, names: Iterable[str]) -> str:
    """The one of `names` that `name` means: itself, or the only path that ends in it.

    Raises:
        MulticamError: If there is none, or more than one.
    """
    known = list(names)
    if name in known:
        return name
    tails = [path for path in known if path.endswith("." + name)]
    if len(tails) == 1:
        return tails[0]
    if tails:
        raise MulticamError(
            f"{what} {name!r} is ambiguous: it could be {', '.join(map(repr, tails))}; write it in full"
        )
    raise unknown(what, name, known)


def _walk(value: Any, whole: Whole, path: Path, above: tuple[int, ...]) -> Iterator[tuple[Path, Any]]:
    children = None if id(value) in above or whole(".".join(path), value) else _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children.items():
        yield from _walk(child, whole, (*path, str(key)), (*above, id(value)))


def _rebuild(value: Any, exchange: Callable[[str, Any], Any], whole: Whole, path: Path, above: tuple[int, ...]) -> Any:
    children = None if id(value) in above or whole(".".join(path), value) else _children(value)
    if children is None:
        return exchange(".".join(path), value)
    fresh = {
        key: _rebuild(child, exchange, whole, (*path, str(key)), (*above, id(value))) for key, child in children.items()
    }
    if isinstance(value, tuple):
        return value._make(fresh.values()) if hasattr(value, "_make") else type(value)(fresh.values())
    new = copy.copy(value)
    for key, child in fresh.items():
        if isinstance(value, MutableMapping | list | deque | UserList):
            new[key] = child
        else:
            object.__setattr__(new, key, child)  # a frozen dataclass refuses a plain assignment
    return new


def _children(value: Any) -> Mapping[Any, Any] | None:
    """What `value` contains, by key; None for a leaf."""
    if isinstance(value, torch.Size | PackedSequence):
        return None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple | deque | UserList):
        return dict(enumerate(value))
    if isinstance(value, MutableMapping):
        return value
    attributes = _attributes(value)
    looked_at = {id(value)}
    # Lists in other objects are their own affair: a configuration is not taken apart.
    wanted = (Tensor, list, tuple, np.ndarray) if is_dataclass(value) or isinstance(value, SimpleNamespace) else Tensor
    return attributes if any(_holds(wanted, child, looked_at) for child in attributes.values()) else None


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor | nn.Module | type) or callable(value):
        return {}
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})


def _slots(cls: type) -> tuple[str, ...]:
    names = cls.__dict__.get("__slots__", ())
    names = (names,) if isinstance(names, str) else names
    return tuple(name for name in names if not name.startswith("__"))


def _holds(wanted: type | tuple[type, ...], value: Any, looked_at: set[int]) -> bool:
    if isinstance(value, wanted):
        return True
    if id(value) in looked_at:
        return False
    looked_at.add(id(value))
    children = (
        value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list | tuple) else None
    )
    inside = _attributes(value) if children is None else children
    return any(_holds(wanted, child, looked_at) for child in inside.values())
