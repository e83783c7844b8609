"""What is no tensor and may have one item for each sample: lists, tuples, arrays and the like."""

import copy
from collections import UserList, deque
from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from multicam.call.tree import leaves


def count(value: Any) -> int | None:
    """How many items a list, tuple, array, range or packed sequence has, or rows a tensor; None for what has none.

    A named tuple holds inputs, not items.

    Example:
        >>> count([12, 9]), count(np.zeros((3, 5))), count("text"), count(None)
        (2, 3, None, None)
    """
    if isinstance(value, Tensor | np.ndarray):
        return value.shape[0] if value.ndim else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    names = hasattr(value, "_fields") or hasattr(value, "n_fields") or isinstance(value, torch.Size)
    return len(value) if isinstance(value, list | tuple | deque | UserList | range) and not names else None


def hides(value: Any, n: int) -> bool:
    """Whether an object that is no container here has `n` items, or a list, tuple or array of them as an attribute or value.

    Nobody but its class knows how to take some of them.

    Example:
        >>> from types import MappingProxyType
        >>> hides(MappingProxyType({"lengths": [12, 9]}), 2), hides([12, 9], 2), hides("ab", 2)
        (True, False, False)
    """
    if count(value) is not None or isinstance(value, Tensor | torch.Size) or callable(value):
        return False
    inside = value.values() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).values()
    return any(_length(each) == n for each in (value, *inside))


def _length(value: Any) -> int | None:
    if isinstance(value, str | bytes | bytearray | Mapping | Set | Tensor | torch.Size | np.ndarray):
        return count(value) if isinstance(value, np.ndarray) else None
    return len(value) if isinstance(value, Sized) else None


def taken(value: Any, samples: Sequence[int]) -> Any:
    """The same kind of value with these of its items, which may come several times; a range becomes a list.

    Example:
        >>> taken(("a", "b"), [1, 0, 1])
        ('b', 'a', 'b')
    """
    if isinstance(value, Tensor):
        return value[torch.as_tensor(samples, device=value.device)]
    if isinstance(value, np.ndarray):
        return value[np.asarray(samples, dtype=np.intp)]
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        at = torch.as_tensor(samples, device=padded.device)
        return pack_padded_sequence(padded[at], lengths[at.cpu()], batch_first=True, enforce_sorted=False)
    items = [value[sample] for sample in samples]
    if isinstance(value, tuple | deque):
        return type(value)(items)
    if isinstance(value, range):
        return items
    new = copy.copy(value)
    new[:] = items
    return new


def all_alike(value: Any) -> bool:
    """Whether all items are the same.

    Example:
        >>> all_alike([torch.zeros(2), torch.zeros(2)]), all_alike([torch.zeros(2), torch.zeros(3)])
        (True, False)
    """
    each = [leaves(taken(value, [i])) for i in range(count(value) or 0)]
    return all(
        each[0].keys() == other.keys() and all(_same(each[0][path], leaf) for path, leaf in other.items())
        for other in each[1:]
    )


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.equal(x, y)
    if isinstance(x, PackedSequence) and isinstance(y, PackedSequence):
        return torch.equal(x.data, y.data) and torch.equal(x.batch_sizes, y.batch_sizes)
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return np.array_equal(x, y)
    try:
        return bool(x is y or x == y)
    except (RuntimeError, ValueError, TypeError):  # of values that cannot say whether they are equal
        return False
