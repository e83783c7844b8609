"""What becomes of token ids in operations that pick entries, or put them somewhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from multicam.watch.tokens.marks import (
    Mark,
    Operation,
    Rule,
    broadcast,
    compressed,
    lost_like,
    to_numpy,
)
from multicam.watch.tokens.places import CONSTANT


def _index(op: Operation) -> Mark | None:
    x, mark = op.args[0], op.mark()
    if mark is None:  # a table looked up at followed places, as an embedding is
        indices = [op.origins.mark(index) for index in op.args[1] if index is not None]
        if len(op.args[1]) != 1 or indices[0] is None:
            return lost_like(op.out)
        return Mark(indices[0].ids.reshape(indices[0].shape + (1,) * (op.out.ndim - len(indices[0].shape))))
    where, axes = _where(op.args[1])
    return Mark(broadcast(mark.ids, x.shape, *axes)[where])


def _where(indices: Sequence[Tensor | None]) -> tuple[tuple[Any, ...], list[int]]:
    """NumPy's form of PyTorch's indices, and the axes that they index."""
    where: list[Any] = []
    axes: list[int] = []
    position = 0
    for index in indices:
        array = None if index is None else index.detach().cpu().numpy()
        where.append(slice(None) if array is None else array)
        covered = 1 if array is None or array.dtype != np.bool_ else array.ndim
        if array is not None:
            axes += range(position, position + covered)
        position += covered
    return tuple(where), axes


def _put(op: Operation) -> Mark | None:
    x, indices, values = op.args[:3]
    if op.get(3, "accumulate", False):
        return lost_like(op.out)
    old, new = (op.origins.mark(t) for t in (x, values))
    ids = np.broadcast_to(CONSTANT if old is None else old.ids, x.shape).copy()
    ids[_where(indices)[0]] = CONSTANT if new is None else new.ids
    return Mark(compressed(ids))


def _index_select(op: Operation) -> Mark | None:
    x, axis, index = op.args[:3]
    mark = op.origins.mark(x)
    if mark is None:
        return lost_like(op.out)
    return Mark(broadcast(mark.ids, x.shape, axis % x.ndim).take(index.cpu().numpy(), axis))


def _gather(op: Operation) -> Mark | None:
    x, axis, index = op.args[:3]
    mark = op.origins.mark(x)
    if mark is None:
        return lost_like(op.out)
    ids = broadcast(mark.ids, x.shape, axis % x.ndim)
    part = [slice(None) if a == axis % x.ndim else slice(size) for a, size in enumerate(index.shape)]
    return Mark(np.take_along_axis(ids[tuple(part)], to_numpy(index), axis))


def _masked_select(op: Operation) -> Mark | None:
    x, mask = op.args[:2]
    mark, shape = op.origins.mark(x), np.broadcast_shapes(tuple(x.shape), tuple(mask.shape))
    chosen = np.broadcast_to(mask.detach().cpu().numpy(), shape)
    return mark and Mark(np.broadcast_to(mark.ids, shape)[chosen])


def _masked_scatter(op: Operation) -> Mark | None:
    x, mask, source = op.args[:3]
    old, new = (op.origins.mark(t) for t in (x, source))
    ids = np.broadcast_to(CONSTANT if old is None else old.ids, op.out.shape).copy()
    chosen = np.broadcast_to(mask.detach().cpu().numpy(), op.out.shape)
    flat = np.broadcast_to(CONSTANT if new is None else new.ids, source.shape).reshape(-1)
    ids[chosen] = flat[: int(chosen.sum())]
    return Mark(compressed(ids))


def _copy(op: Operation) -> Mark | None:
    mark = op.mark(1)
    return mark and mark.at(op.out.ndim)


def _scatter_part(op: Operation) -> Mark | None:
    """`slice_scatter` and `select_scatter`."""
    x, source, axis = op.args[0], op.args[1], op.get(2, "dim", 0)
    old, new = (op.origins.mark(t) for t in (x, source))
    ids = np.broadcast_to(CONSTANT if old is None else old.ids, x.shape).copy()
    if source.ndim < x.ndim:
        part: Any = op.args[3]
    else:
        part = slice(*(op.get(i + 3, name) for i, name in enumerate(("start", "end", "step"))))
    ids[(slice(None),) * (axis % x.ndim) + (part,)] = CONSTANT if new is None else new.ids
    return Mark(compressed(ids))


def _sample(op: Operation) -> Mark | None:
    """Values fetched from computed places: what comes out are the tokens that say where to, as those of queries come out of an attention."""
    asking = op.mark(1)
    if asking is None or not op.origins.places.has_parts(asking.ids):
        return lost_like(op.out)
    ids = op.origins.places.union(asking.ids, (asking.ids.ndim - 1,))
    return Mark(np.expand_dims(ids[..., 0], 1))


_NAMES: dict[Rule, str] = {
    _sample: "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler",
    _index: "index _unsafe_index",
    _put: "index_put _unsafe_index_put _index_put_impl",
    _index_select: "index_select",
    _gather: "gather",
    _masked_select: "masked_select",
    _masked_scatter: "masked_scatter",
    _copy: "copy",
    _scatter_part: "slice_scatter select_scatter",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
