"""All that somebody can see of a value from outside, to any depth: to be compared before and after."""

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def insides(*values: Any) -> dict[str, Any]:
    """What is in some values, by path: identities, numbers bit for bit, shapes, memory, versions, states of generators."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo = [(str(place), value) for place, value in enumerate(values)]
    while todo:
        path, inner = todo.pop()
        if isinstance(inner, str | int | float | bool | type(None)):
            found[path] = inner
            continue
        found[path] = id(inner)
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, Tensor):
            found[f"{path} tensor"] = _tensor(inner)
        elif isinstance(inner, np.ndarray):
            found[f"{path} array"] = inner.tobytes()
        elif (state := _generator(inner)) is not None:
            found[f"{path} state"] = state
        todo += [(f"{path}.{key}", item) for key, item in _items(inner)]
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths of what is another or not there."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path, ...) != after.get(path, ...))


def _items(value: Any) -> list[tuple[object, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | deque):
        return list(enumerate(value))
    if isinstance(value, set | frozenset):
        return [(repr(item), item) for item in value]
    if isinstance(value, Tensor):
        return list(vars(value).items())
    if isinstance(value, type | np.ndarray) or (callable(value) and not isinstance(value, torch.nn.Module)):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *((name, getattr(value, name)) for name in slots)]


def _tensor(x: Tensor) -> Any:
    if x.is_meta or is_traceable_wrapper_subclass(x):
        return x.shape
    if x.layout is not torch.strided:
        return x.layout, x.shape, _bytes(x.detach().to_dense())
    memory = x.untyped_storage()
    version = None if x.is_inference() else x._version
    whole = torch.empty(0, dtype=torch.uint8).set_(memory)
    return x.dtype, x.shape, x.stride(), x.storage_offset(), memory.data_ptr(), _bytes(whole), version, x.requires_grad


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state())
    return value.getstate() if isinstance(value, random.Random) else None
