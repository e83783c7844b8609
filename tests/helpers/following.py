"""The ids of tokens followed through operations and models, and what they say of each row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multicam.call.inputs import Inputs
from multicam.watch.tokens.origins import Origins

X = torch.rand(2, 3, 16, 16)


class Watch(TorchDispatchMode):
    """A recorder in miniature: the queries and keys of every attention, with their ids."""

    def __init__(self, **leaves: Tensor) -> None:
        super().__init__()
        self.origins = Origins(leaves, len(next(iter(leaves.values()))))
        self.places = self.origins.places
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.queries: list[Tensor] = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # PyTorch would take resizing apart into its corners, whose union has no grid.
        if torch.is_inference_mode_enabled() and not func._opname.startswith("upsample"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.origins._follow(func, args, kwargs, out)  # `follow` lets no error of a rule through
        if func._opname.startswith("_scaled_dot_product"):
            q, k = args[:2]
            rows = self.record(q, k, (1, 3), (1, 3))
            self.origins.give(out[0], rows, 1, 3)
        elif func._opname in ("bmm", "baddbmm"):
            a, b = args[-2:]
            if self.waiting is not None and a.shape == (*self.waiting[0].shape, self.waiting[1].shape[1]):
                self.origins.give(out, self.waiting[0], 2)
                self.waiting = None
            elif (self.origins.ids(b) > 0).any():
                self.waiting = self.record(a, b, (2,), (1,)), self.calls[-1][1]
        return out

    def record(self, q: Tensor, k: Tensor, of_q: tuple[int, ...], of_k: tuple[int, ...]) -> Tensor:
        rows, columns = self.origins.ids(q, *of_q), self.origins.ids(k, *of_k)
        if (rows == 0).all():
            rows = self.origins.fresh(
                *rows.shape, samples=self.places.sample[columns.amax(1)] if columns.any() else None
            )
        self.calls.append((rows, columns))
        self.queries.append(q)
        return rows

    @property
    def said(self) -> list[tuple[str, str]]:
        """Queries and keys of the last row of every call in words, repetitions left out."""
        words = [(self.places.describe(q[-1]), self.places.describe(k[-1])) for q, k in self.calls]
        return [word for i, word in enumerate(words) if word not in words[:i]]


def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Watch:
    leaves = {name: x for name, x in Inputs(*args, **kwargs).bind(model).leaves.items() if isinstance(x, Tensor)}
    watch = Watch(**leaves)
    with watch:  # with gradients, so that PyTorch's fast path for transformers, one operation, does not run
        model.eval()(*args, **kwargs)
    return watch


def after(op: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Origins, Tensor]:
    watch = Watch(x=x)
    with torch.inference_mode(), watch:
        y = op(x)
    return watch.origins, y


def parts(origins: Origins, y: Tensor, *but: int) -> list[str]:
    """The tokens of each row in words."""
    return [origins.places.describe(row) for row in origins.ids(y, *but)]
