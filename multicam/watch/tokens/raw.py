"""Entries of an input that have only been moved so far: the first operation that computes tells which of its axes is that of channels.

Until then a tensor has an array for each axis of the input, with the index along it of every entry, of size 1 along all axes of the tensor over
which that is constant. All of them are moved as the tensor is. A convolution, a pooling or a linear layer then says which axis of the tensor it takes for
channels: the axes of the input that lie along it, and along no other, are those of the input's channels, and all others are places.
"""

import re
from collections.abc import Sequence
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multicam.call.inputs import frames_second
from multicam.watch.tokens import moving
from multicam.watch.tokens.lattices import Lattice
from multicam.watch.tokens.marks import Mark, Marks, Operation, Pads, Rule
from multicam.watch.tokens.places import CONSTANT, Places

# What moves entries of one tensor, and what leaves them where they are.
_MOVING = moving.RULES.keys() - {"cat", "stack"}
_KEEPING = {"clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous"}
_QUANTISING = (
    "fake_quantize",
    "fused_moving_avg_obs",
    "_fake_quantize",
    "_fused_moving_avg_obs",
    "quantize_per",
    "dequantize",
)


class Leaf:
    """One input, and what was told of its axes.

    Args:
        names: Its names; several where one tensor was given for several inputs.
        x: The input `(b …)`.
        places: Where the places of its tokens will lie.

    Attributes:
        told: Whether the axes of its channels are known, or were taken for the usual ones.
        axes: Those of its places.
        sizes: How large it is along them.
    """

    def __init__(self, names: Sequence[str], x: Tensor, places: Places) -> None:
        self.names, self.shape, self._places = list(names), tuple(x.shape), places
        self._usual = usual_channels(x)
        self.told = False
        self._tell(self._usual)
        self.told = False

    @property
    def start(self) -> "Raw":
        """The companion of the input itself."""
        return Raw(self, tuple(_along(axis, self.shape) for axis in range(len(self.shape))))

    def tell(self, raw: "Raw", channels: int) -> None:
        """An operation takes an axis of a tensor for channels."""
        if self.told:
            return
        inner = range(1, len(self.shape))
        elsewhere = {axis for axis in inner if any(_varies(raw.index[axis], i) for i in raw.others(channels))}
        alone = [axis for axis in inner if _varies(raw.index[axis], channels) and axis not in elsewhere]
        # Several axes together are channels if the usual ones are among them, as frames folded into colours are; all of them together tell nothing.
        # Where the operation finds no axis of the input, the usual ones are channels as far as they are not places there.
        if len(alone) == 1 or (len(alone) < len(inner) and {*self._usual} < {*alone}):
            self._tell(alone if len(alone) == 1 else [axis for axis in inner if axis in alone or self.shape[axis] == 1])
        else:
            usual = [axis for axis in self._usual if alone or axis not in elsewhere]
            self._tell(usual or [axis for axis in inner if self.shape[axis] == 1])

    def _tell(self, channels: Sequence[int]) -> None:
        self.told = True
        self.axes = [axis for axis in range(1, len(self.shape)) if axis not in channels]
        self.sizes = tuple(self.shape[axis] for axis in self.axes)
        for name in self.names:
            self._places.tell(name, self.sizes or self.shape[1:])

    @cached_property
    def ids(self) -> np.ndarray:
        """The id of each place of each sample `(b *places)`."""
        whole = self._places.whole(self.names[0], self.shape[0], self.sizes)
        return self._places.lay(whole).reshape(self.shape[0], *self.sizes)


class Raw:
    """The companion of a tensor of nothing but entries of one input.

    Attributes:
        leaf: The input.
        index: For each of its axes one more than the index of each entry along it; zero for a constant that was put in.
    """

    def __init__(self, leaf: Leaf, index: tuple[np.ndarray, ...]) -> None:
        self.leaf, self.index = leaf, index

    @property
    def ndim(self) -> int:
        """The number of axes of the tensor."""
        return self.index[0].ndim

    def others(self, axis: int) -> list[int]:
        """All axes of the tensor but one."""
        return [other for other in range(self.ndim) if other != axis]

    def mark(self, places: Places) -> Mark:
        """The token ids of the tensor, once the channels of its input are told; nobody told means the usual ones."""
        leaf = self.leaf
        leaf.told = True
        sample, along = self.index[0], [self.index[axis] for axis in leaf.axes]
        pads = self._pads(along, leaf.sizes)
        n = len(pads)
        rows = [sample, *along[: len(along) - n]]
        lead = self.ndim - n - 1
        made = partial(_picked, leaf, [sample, *along])
        shape = np.broadcast_shapes(*(x.shape for x in (sample, *along)))
        if not n or not all(set(x.shape[lead:]) <= {1} and x.all() for x in rows):
            return Mark(made, shape)
        flat = [np.broadcast_to(x.reshape(x.shape[:lead]), shape[:lead]).reshape(-1) - 1 for x in rows]
        lattice = self._lattice(places, flat, n)
        if not any(map(any, pads)):
            return Mark(made, shape, lattice)
        inner = [*rows, *(_along(self.ndim - n + i, (1,) * (self.ndim - n) + lattice.grid) for i in range(n))]
        return Mark(
            made,
            shape,
            lattice,
            pads,
            Mark(partial(_picked, leaf, inner), (*shape[: lead + 1], *lattice.grid), lattice),
        )

    def _pads(self, along: Sequence[np.ndarray], sizes: Sequence[int]) -> Pads:
        """How much was put around the last places of the input, on the last axes of the tensor, as far as they lie there as they were."""
        pads: list[tuple[int, int]] = []
        for x, size in zip(reversed(along), reversed(sizes), strict=True):
            axis = self.ndim - 1 - len(pads)
            if axis < 1 or x.size != x.shape[axis]:
                break
            flat = x.reshape(-1)
            starts = [
                p
                for p in range(len(flat) - size + 1)
                if flat[p] == 1 and np.array_equal(flat[p : p + size], np.arange(1, size + 1))
            ]
            if len(starts) != 1:
                break
            pads.insert(0, (starts[0], len(flat) - size - starts[0]))
        return tuple(pads)

    def _lattice(self, places: Places, rows: Sequence[np.ndarray], n: int) -> Lattice:
        whole = places.whole(self.leaf.names[0], len(rows[0]), self.leaf.sizes)
        boxes, half = whole.boxes.copy(), len(whole.boxes) // 2
        for axis, size, index in zip(whole.axes, self.leaf.sizes, rows[1:], strict=False):
            boxes[axis], boxes[axis + half] = index / size, (index + 1) / size
        return Lattice(rows[0], whole.inputs, boxes, whole.axes[-n:], whole.grid[-n:])


def moved(
    func: Any, rule: Rule, args: Sequence[Any], kwargs: Any, outs: Sequence[Tensor], raw: Raw
) -> list[Raw | None] | None:
    """The companions of what an operation made of the tensor `args[0]`; None where it does more than move its entries."""
    name = func._opname.removesuffix("_").removesuffix("_copy")
    if name.startswith(_QUANTISING):
        return [raw if out.shape == args[0].shape and out.dtype != torch.bool else None for out in outs]
    if name in _KEEPING or (torch.Tag.pointwise in func.tags and outs and outs[0].ndim == raw.ndim):
        shape = np.broadcast_shapes(*(x.shape for x in raw.index))
        same = len(outs) == 1 and all(a in (1, b) for a, b in zip(shape, outs[0].shape, strict=True))
        return [None if outs[0].dtype == torch.bool else raw] if same and outs[0].shape == args[0].shape else None
    if name not in _MOVING:
        return None
    found = [
        rule(Operation(_One(args[0], index), args, kwargs, outs[0] if len(outs) == 1 else list(outs)))
        for index in raw.index
    ]
    if any(each is None for each in found):
        return None
    several = [each if isinstance(each, list) else [each] for each in found]
    return [Raw(raw.leaf, tuple(mark.ids for mark in marks)) for marks in zip(*several, strict=True)]


def channels_of(func: Any, args: Sequence[Any], x: Tensor) -> int | None:
    """The axis of a tensor that an operation takes for channels; None for one that does not say."""
    name, ndim = func._opname.removesuffix("_"), x.ndim
    if name in ("mm", "bmm", "linear"):
        return ndim - 1 if args[0] is x else ndim - 2
    if name in ("addmm", "baddbmm", "_addmm_activation"):
        return ndim - 1 if args[1] is x else ndim - 2
    if args[0] is not x:
        return None
    if "convolution" in name or name in ("conv1d", "conv2d", "conv3d"):
        return ndim + 1 - int(args[1].ndim)
    if spatial := re.search(r"(?:pool|upsample).*(\d)d", name):
        return ndim - 1 - int(spatial[1])
    return 1 if "batch_norm" in name or "group_norm" in name else None


def usual_channels(x: Tensor) -> tuple[int, ...]:
    """The axes of an input that hold its channels by custom.

    Words `(b n)`, planes `(b h w)` of integers, features `(b n c)`, images `(b c h w)` or, of colours, `(b h w c)`, clips `(b c t h w)`
    or `(b t c h w)`.
    """
    if x.ndim < 4:
        return (x.ndim - 1,) if x.is_floating_point() else ()
    if x.ndim == 4:
        return (3,) if channels_are_last(x) else (1,)
    return (2,) if x.ndim == 5 and frames_second(x).shape != x.shape else (1,)


def channels_are_last(x: Tensor) -> bool:
    """Whether an image is `(b h w c)`: its last axis may be colour, and the others are too long for that."""
    return x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) >= 8


class _One(Marks):
    """The companion of a single tensor, as the rules ask for it."""

    def __init__(self, x: Tensor, index: np.ndarray) -> None:
        self._x, self._mark = x, Mark(index)

    def mark(self, x: Any) -> Mark | None:
        return self._mark if x is self._x else None


def _along(axis: int, shape: Sequence[int]) -> np.ndarray:
    return np.arange(1, shape[axis] + 1).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _varies(index: np.ndarray, axis: int) -> bool:
    return index.shape[axis] > 1 and bool((index != index.take([0], axis)).any())


def _picked(leaf: Leaf, index: Sequence[np.ndarray]) -> np.ndarray:
    """The ids at these places of an input; constants where an index is zero."""
    there = reduce(np.logical_and, [x > 0 for x in index])
    return np.where(there, leaf.ids[tuple(np.maximum(x - 1, 0) for x in index)], CONSTANT)
