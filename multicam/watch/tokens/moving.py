"""What becomes of token ids in operations that view, move or join entries."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from multicam.watch.tokens.lattices import Lattice, same_rows
from multicam.watch.tokens.marks import (
    Mark,
    Marks,
    Operation,
    Pads,
    Rule,
    Shape,
    broadcast,
    compressed,
    frames_of,
    lost_like,
    same_marks,
    viewed,
)
from multicam.watch.tokens.places import CONSTANT, LOST


def _view(op: Operation) -> Mark | None:
    x, mark = op.args[0], op.mark()
    if mark is None or x.shape == op.out.shape:
        return mark
    old, new, lattice = tuple(x.shape), tuple(op.out.shape), mark.lattice
    n = len(lattice.grid) + 1 if lattice else 0
    if lattice and old[-n:] == new[-n:] and prod(mark.shape[:-n]) == prod(new[:-n]):
        shape = (*new[:-n], *mark.shape[-n:])
        return Mark(
            lambda: mark.ids.reshape(shape), shape, lattice, mark.pads, mark.inner and _view_of(mark.inner, shape, n)
        )
    return Mark(viewed(mark.ids, old, new))


def _view_of(mark: Mark, shape: Shape, n: int) -> Mark:
    whole = (*shape[:-n], *mark.shape[-n:])
    return Mark(lambda: mark.ids.reshape(whole), whole, mark.lattice)


def _permute(op: Operation) -> Mark | None:
    mark, ndim = op.mark(), op.args[0].ndim
    return mark and _permuted(mark, [axis % ndim for axis in op.args[1]])


def _permuted(mark: Mark, order: list[int]) -> Mark:
    if order == sorted(order):
        return mark
    n = len(mark.lattice.grid) if mark.lattice and not mark.pads else 0
    if mark.lattice and n > 1 and order == [0, 2, 1, *range(3, 2 + n)]:
        shape = tuple(mark.shape[axis] for axis in order)
        return Mark(lambda: mark.ids.transpose(order), shape, frames_of(mark.lattice))
    return Mark(mark.ids.transpose(order))


def _transpose(op: Operation) -> Mark | None:
    mark, order = op.mark(), list(range(op.out.ndim))
    a, b = op.args[1:3] if len(op.args) > 1 else (0, op.out.ndim - 1)
    if order:
        order[a], order[b] = order[b], order[a]
    return mark and _permuted(mark, order)


def _expand(op: Operation) -> Mark | None:
    mark = op.mark()
    if mark and mark.lattice and op.out.shape[1 - op.args[0].ndim :] != op.args[0].shape[1:]:
        mark = Mark(mark.ids)
    return mark and mark.at(op.out.ndim)


def _cut(mark: Mark, axis: int, part: slice) -> Mark:
    axis %= len(mark.shape)
    lattice = mark.lattice
    if mark.shape[axis] == 1:
        channel = lattice is None or axis == len(mark.shape) - 1 - len(lattice.grid)
        return mark if channel else Mark(mark.ids)
    where = (slice(None),) * axis + (part,)
    if lattice and axis == 0 and not mark.pads and len(lattice.samples) == mark.shape[0]:
        rows = Lattice(lattice.samples[part], lattice.inputs[part], lattice.boxes[:, part], lattice.axes, lattice.grid)
        return Mark(lambda: mark.ids[where], (len(rows.samples), *mark.shape[1:]), rows)
    return Mark(mark.ids[where])


def _slice(op: Operation) -> Mark | None:
    mark = op.mark()
    axis, start, stop, step = (op.get(i + 1, name) for i, name in enumerate(("dim", "start", "end", "step")))
    axis = (axis or 0) % op.out.ndim
    if mark is None or op.out.shape[axis] == op.args[0].shape[axis]:
        return mark
    return _cut(mark, axis, slice(start, stop, step))


def _select(op: Operation) -> Mark | None:
    return _picked(op.mark(), op.args[1], op.args[2])


def _picked(mark: Mark | None, axis: int, index: int) -> Mark | None:
    if mark is None:
        return None
    where = (slice(None),) * (axis % len(mark.shape)) + (index if mark.shape[axis] > 1 else 0,)
    return Mark(mark.ids[where])


def _unbind(op: Operation) -> list[Mark | None]:
    mark, axis = op.mark(), op.get(1, "dim", 0)
    return [_picked(mark, axis, i) for i in range(op.args[0].shape[axis])]


def _split(op: Operation) -> list[Mark | None]:
    mark, sizes, axis = op.mark(), op.args[1], op.get(2, "dim", 0)
    whole = op.args[0].shape[axis]
    if isinstance(sizes, int):
        sizes = [sizes] * -(-whole // sizes)
    stops = np.cumsum(sizes)
    return [mark and _cut(mark, axis, slice(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)]


def _roll(op: Operation) -> Mark | None:
    mark, axes = op.mark(), op.get(2, "dims", ())
    if not axes:
        return lost_like(op.out)
    return mark and Mark(np.roll(mark.ids, op.args[1], axes))


def _flip(op: Operation) -> Mark | None:
    mark = op.mark()
    return mark and Mark(np.flip(mark.ids, op.args[1]))


def _repeat(op: Operation) -> Mark | None:
    mark = op.mark()
    if mark is None:
        return None
    ids = mark.at(op.out.ndim).ids
    return Mark(np.tile(ids, [1 if size == 1 else times for size, times in zip(ids.shape, op.args[1], strict=True)]))


def _join(op: Operation) -> Mark | None:
    """Concatenation. Along features the parts keep their ids; constants put beside tokens become own tokens."""
    parts = [x for x in op.args[0] if x.ndim > 1 or x.numel()]
    axis = op.get(1, "dim", 0) % op.out.ndim
    marks = [op.origins.mark(x) for x in parts]
    known = [mark for mark in marks if mark]
    if len(parts) == 1:
        return marks[0]
    lattices = [mark.lattice for mark in known if mark.lattice and not mark.pads]
    gridded = len(lattices) == len(known)
    # A vector that became one token has a signal's shape.
    channel = gridded and axis == op.out.ndim - 1 - len(lattices[0].grid)
    channel &= gridded and (len(lattices[0].grid) > 1 or all(x.shape[axis] > 1 for x in parts))
    features = channel or all(m.shape[axis] == 1 and x.shape[axis] > 1 for m, x in zip(marks, parts, strict=True) if m)
    if features and all(same_marks(mark, known[0]) for mark in known[1:]):
        return known[0] if channel or not known[0].lattice else Mark(known[0].ids)
    if not features and len(known) < len(parts):
        marks = _with_own(op.origins, parts, marks, axis)

    ids = partial(_concatenated, marks, [tuple(x.shape) for x in parts], axis)
    first = lattices[0] if gridded else None
    if first and all(other.grid == first.grid and other.axes == first.axes for other in lattices):
        shape = list(known[0].shape)
        shape[axis] = op.out.shape[axis]
        if channel and all(same_rows(first, other) for other in lattices):
            inputs = np.bitwise_or.reduce([other.inputs for other in lattices])
            return Mark(ids, shape, Lattice(first.samples, inputs, first.boxes, first.axes, first.grid))
        if (
            axis == 0
            and len(known) == len(parts)
            and all(len(m.lattice.samples) == m.shape[0] for m in known if m.lattice)
        ):
            samples, inputs, boxes = (
                np.concatenate([getattr(x, name) for x in lattices], -1) for name in ("samples", "inputs", "boxes")
            )
            return Mark(ids, shape, Lattice(samples, inputs, boxes, first.axes, first.grid))
    return Mark(ids())


def _concatenated(marks: Sequence[Mark | None], shapes: Sequence[Shape], axis: int) -> np.ndarray:
    # Of no tensor and no pass: those would be held by their own companions.
    arrays = [
        np.full((1,) * len(shape), CONSTANT) if m is None else m.ids for m, shape in zip(marks, shapes, strict=True)
    ]
    sizes = np.broadcast_shapes(*((*a.shape[:axis], 1, *a.shape[axis + 1 :]) for a in arrays))
    full = [(*sizes[:axis], shape[axis], *sizes[axis + 1 :]) for shape in shapes]
    return np.concatenate([np.broadcast_to(a, shape) for a, shape in zip(arrays, full, strict=True)], axis)


def _with_own(origins: Marks, parts: Sequence[Tensor], marks: Sequence[Mark | None], axis: int) -> list[Mark | None]:
    """The companions of concatenated parts; a constant part gets own tokens, of the sample of the same row."""
    shape = [max(m.shape[i] for m in marks if m) for i in range(len(parts[0].shape))]
    shape[axis] = 1
    most, least = np.full(shape, -1), np.full(shape, np.iinfo(np.int64).max)
    for mark in filter(None, marks):
        samples = origins.places.samples(mark.ids)
        most = np.maximum(most, samples.max(axis, keepdims=True))
        least = np.minimum(least, np.where(samples < 0, least, samples).min(axis, keepdims=True))
    sample = np.where(most == least, most, LOST)
    return [
        m or Mark(origins.places.fresh(sample.repeat(x.shape[axis], axis))) for m, x in zip(marks, parts, strict=True)
    ]


def _stack(op: Operation) -> Mark | None:
    axis, marks = op.get(1, "dim", 0) % op.out.ndim, [op.origins.mark(x) for x in op.args[0]]
    arrays = [np.full((1,) * op.out.ndim, CONSTANT) if m is None else np.expand_dims(m.ids, axis) for m in marks]
    known = [array for array, mark in zip(arrays, marks, strict=True) if mark]
    if all(array.shape == known[0].shape and np.array_equal(array, known[0]) for array in known[1:]):
        return Mark(known[0])
    return Mark(np.concatenate(np.broadcast_arrays(*arrays), axis))


def _pad(op: Operation) -> Mark | None:
    mark, flat = op.mark(), list(op.args[1])
    if mark is None:
        return None
    pads = tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))
    return _with_pads(mark, op.args[0].shape, ((0, 0),) * (op.out.ndim - len(pads)) + pads)


def _mirror(how: str) -> Rule:
    def rule(op: Operation) -> Mark | None:
        mark, flat = op.mark(), list(op.args[1])
        pads = tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))
        return mark and _with_pads(mark, op.args[0].shape, ((0, 0),) * (op.out.ndim - len(pads)) + pads, mode=how)

    return rule


def _with_pads(mark: Mark, shape: Shape, pads: Pads, **how: Any) -> Mark:
    # Along an axis over which the ids are constant, such as features, what is added takes part in the same tokens.
    thin = tuple(
        (0, 0) if size == 1 and full > 1 else pad for size, full, pad in zip(mark.shape, shape, pads, strict=True)
    )
    if not any(map(any, thin)):
        return Mark(mark.ids) if any(map(any, pads)) else mark
    n = len(mark.lattice.grid) if mark.lattice and not mark.inner else 0
    if n and min(map(min, pads)) >= 0 and not any(map(any, pads[:-n])):
        padded = tuple(size + sum(pad) for size, pad in zip(mark.shape, pads, strict=True))
        return Mark(lambda: np.pad(mark.ids, pads, **how), padded, mark.lattice, pads[-n:], mark)
    ids = mark.ids[tuple(slice(-min(p, 0), size + min(q, 0)) for (p, q), size in zip(thin, mark.shape, strict=True))]
    return Mark(np.pad(ids, [(max(p, 0), max(q, 0)) for p, q in thin], **how))


def _unfold(op: Operation) -> Mark | None:
    x, axis, size, step = op.args
    mark = op.origins.mark(x)
    if mark is None:
        return None
    axis %= x.ndim
    if mark.shape[axis] == 1 < x.shape[axis]:
        return Mark(mark.ids[..., None])
    windows = np.lib.stride_tricks.sliding_window_view(mark.ids, size, axis)
    return Mark(windows[(slice(None),) * axis + (slice(None, None, step),)])


def _as_strided(op: Operation) -> Mark | None:
    x, size, stride = op.args[:3]
    mark, offset = op.origins.mark(x), op.get(3, "storage_offset")
    if mark is None or not x.is_contiguous():
        return lost_like(op.out)
    start = 0 if offset is None else offset - x.storage_offset()
    places = start + sum(
        np.arange(n).reshape(-1, *[1] * (len(size) - 1 - i)) * step
        for i, (n, step) in enumerate(zip(size, stride, strict=True))
    )
    return Mark(compressed(np.broadcast_to(mark.ids, x.shape).reshape(-1)[places]))


def _columns(op: Operation) -> Mark | None:
    """`im2col`: each neighbourhood of an image as a column."""
    x, kernel, dilation, padding, stride = op.args
    mark = op.origins.mark(x)
    if mark is None:
        return None
    ids = np.pad(broadcast(mark.ids, x.shape, 2, 3), ((0, 0), (0, 0), *((p, p) for p in padding)))
    windows = np.lib.stride_tricks.sliding_window_view(
        ids, [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)], (2, 3)
    )
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]].transpose(0, 1, 4, 5, 2, 3)
    whole = np.broadcast_to(windows, (len(windows), x.shape[1], *windows.shape[2:]))
    return Mark(whole.reshape(len(whole), op.out.shape[1], op.out.shape[2]))


def _shuffle(op: Operation) -> Mark | None:
    mark, r = op.mark(), op.args[1]
    b, c, h, w = op.args[0].shape
    if mark is None:
        return None
    ids = viewed(mark.ids, (b, c, h, w), (b, c // r**2, r, r, h, w)).transpose(0, 1, 4, 2, 5, 3)
    return Mark(viewed(ids, (b, c // r**2, h, r, w, r), op.out.shape))


def _unshuffle(op: Operation) -> Mark | None:
    mark, r = op.mark(), op.args[1]
    b, c, h, w = op.args[0].shape
    if mark is None:
        return None
    ids = viewed(mark.ids, (b, c, h, w), (b, c, h // r, r, w // r, r)).transpose(0, 1, 3, 5, 2, 4)
    return Mark(viewed(ids, (b, c, r, r, h // r, w // r), op.out.shape))


_NAMES: dict[Rule, str] = {
    _view: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten",
    _permute: "permute",
    _transpose: "transpose t swapaxes",
    _expand: "expand broadcast_to",
    _slice: "slice",
    _select: "select",
    _unbind: "unbind",
    _split: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
    _roll: "roll",
    _flip: "flip",
    _repeat: "repeat",
    _join: "cat",
    _stack: "stack",
    _pad: "constant_pad_nd",
    _mirror("reflect"): "reflection_pad1d reflection_pad2d reflection_pad3d",
    _mirror("edge"): "replication_pad1d replication_pad2d replication_pad3d",
    _unfold: "unfold",
    _as_strided: "as_strided",
    _columns: "im2col",
    _shuffle: "pixel_shuffle",
    _unshuffle: "pixel_unshuffle",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
