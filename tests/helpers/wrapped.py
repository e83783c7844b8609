"""A tensor that is made of another."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


class Wrapped(Tensor):
    """A tensor made of another, as quantised and distributed ones are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        found = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        return args[0] if isinstance(found, Tensor) and found is bare(args[0]) else tree_map(dressed, found)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> "Wrapped":
        return cls(inner["inner"])


def dressed(x: Any) -> Any:
    """A plain tensor as one of these."""
    return Wrapped(x) if isinstance(x, Tensor) and not isinstance(x, Wrapped) else x
