"""Where every token of a forward pass comes from, followed operation by operation.

Each followed tensor has a companion: an array of token ids with the same axes, of size 1 along every axis over which the ids
are constant (channels, features, heads). What rearranges a tensor rearranges its companion, so windows, shifts, padding, class
tokens and concatenated streams come out exactly, whatever the model. The rules for what computes:

- Element by element: equal ids stay. A constant takes the other's id, and so do the model's own tokens and tokens of whole inputs
  (pooled context, conditions). Two that cover the same part become a token of both inputs. Two parts of the same inputs become
  their union, parts of different inputs the first. An operand that is broadcast along the other's tokens leaves them as they are.
- Contracted (linear layers, means): the union of what is contracted; nothing happens where ids are constant along that axis, as along
  features.
- Convolved, pooled, resized: regular grids become regular grids of the new size over the same part of the input.
- Anything else is lost (-1), never guessed.

Companions are NumPy arrays in main memory: no dispatch mode, no gradient and no inference mode sees them. Only indices that live on
another device are copied from there.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from multicam.errors import MulticamError, out_of_memory, unknown
from multicam.watch.reshape import Tokens
from multicam.watch.tokens import moving, picking
from multicam.watch.tokens.computing import rule_of
from multicam.watch.tokens.marks import (
    Mark,
    Marks,
    Operation,
    Rule,
    by_axes,
    compressed,
    is_lost,
    lose,
    lost_like,
    same_marks,
    tensors_in,
)
from multicam.watch.tokens.places import CONSTANT, LOST
from multicam.watch.tokens.raw import Leaf, Raw, channels_of, moved


class Origins(Marks):
    """Follows the token ids through one forward pass.

    Args:
        leaves: The tensors by the names of the inputs, as the very objects that the model is given: `(b …)`, with channels on the axis that the
            model takes for them, see `multicam.watch.tokens.raw`. Rows are samples, also of an input with another number of rows than the
            batch, such as the class prompts of CLIP.
        batch: The number of samples.

    Attributes:
        path: The module in which the next operation runs.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> origins = Origins({"rgb": x}, batch=2)
        >>> weight = torch.rand(8, 3, 16, 16)
        >>> y = torch.conv2d(x, weight, stride=16)
        >>> origins.follow(torch.ops.aten.conv2d.default, (x, weight, None, [16, 16]), {}, y)
        >>> origins.ids(y, 1)
        tensor([[[1, 2],
                 [3, 4]],
        <BLANKLINE>
                [[5, 6],
                 [7, 8]]])
    """

    def __init__(self, leaves: Mapping[str, Tensor], batch: int) -> None:
        known = {name: x for name, x in leaves.items() if _has_places(x)}
        super().__init__({name: x.shape[1:] for name, x in known.items()}, batch)
        self.path = ""
        self._said: dict[tuple[str, int], np.ndarray] = {}
        self._views: Any = WeakTensorKeyDictionary()  # of a view: the tensor it is a view of, and the operation
        self._raw: Any = WeakTensorKeyDictionary()  # what only moved entries of an input so far
        one: dict[int, list[str]] = {}
        for name, x in known.items():
            one.setdefault(id(x), []).append(name)
        for names in one.values():
            self.places.unite(names)
            self._raw[leaves[names[0]]] = Leaf(names, leaves[names[0]], self.places).start

    def mark(self, x: Any) -> Mark | None:
        """The companion of a tensor; None for what is not followed."""
        if isinstance(x, Tensor) and x in self._raw:
            self._marks[x] = self._raw.pop(x).mark(self.places)
        return super().mark(x)

    def kept(self, x: Tensor) -> Mark | Raw | None:
        """The companion of a tensor, which may be one that the rest of the pass tells more of, see `Raw.mark`."""
        return self._raw.get(x) or super().mark(x)

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Any) -> None:
        """Take note of one operation of the dispatcher that has run."""
        try:
            self._follow(func, args, kwargs, returned)
        except (
            Exception
        ) as error:  # an operation called in a way that its rule does not know; the model's pass must go on
            if out_of_memory(error):
                raise
            for out in tensors_in(returned):
                self._set(out, lost_like(out), mutates=False)

    def again(self, x: Shaped[Tensor, "b c *grid"]) -> None:
        """Give what a convolution returned out of sight, in a thread of the model's own, places by its axes."""
        if self.mark(x) is None and (mark := by_axes(self, x, x.ndim - 2)) is not None:
            self._marks[x] = mark

    def ids(self, x: Shaped[Tensor, "..."], *but: int) -> Int[Tensor, "..."]:
        """The ids of a tensor without the axes `but`; -1 where they differ along these, 0 where `x` is not followed."""
        mark = self.mark(x)
        shape = [size for axis, size in enumerate(x.shape) if axis not in {i % x.ndim for i in but}]
        if mark is None:
            return torch.zeros(shape, dtype=torch.int64)
        ids = mark.ids
        for axis in sorted((i % x.ndim for i in but), reverse=True):
            first = ids.take(0, axis)
            ids = (
                np.where((ids == np.expand_dims(first, axis)).all(axis), first, LOST) if ids.shape[axis] > 1 else first
            )
        return torch.from_numpy(np.broadcast_to(ids, shape).copy())

    def give(self, x: Shaped[Tensor, "..."], ids: Int[Tensor, "..."], *but: int) -> None:
        """Give a tensor these ids, constant along the axes `but`."""
        array = np.expand_dims(ids.cpu().numpy(), tuple(i % x.ndim for i in but))
        known = self.mark(x)
        if known is None or not np.array_equal(known.ids, array):
            self._marks[x] = Mark(array)

    def fresh(self, rows: int, n: int, samples: Int[Tensor, "rows"] | None = None) -> Int[Tensor, "rows n"]:
        """Fresh ids for tokens of the model's own, such as learned queries.

        Args:
            rows: How many rows the tensor has.
            n: How many tokens each row has.
            samples: The sample of each row; None where the rows are the samples. Rows that are neither are lost.
        """
        one_each = np.arange(rows) if rows == self.batch else np.full(rows, LOST)
        of_rows = one_each if samples is None else samples.cpu().numpy()
        return torch.from_numpy(self.places.fresh(np.repeat(of_rows[:, None], n, axis=1)))

    def said(self, name: str, layout: Tokens | None, rows: int, n: int) -> Int[Tensor, "rows n"]:
        """The ids of n tokens of an input that lie as the user says, the same ones every time.

        Raises:
            MulticamError: If there is no such input, or the layout does not fit.
        """
        if name not in self.places.names:
            raise unknown("input in streams", name, self.places.names)
        axes = self.places.axes(name)
        if layout is None and axes != 1:
            raise MulticamError(
                f"streams names input {name!r}, whose layout is needed, too: layouts={{{name!r}: tokens(rows, columns)}}"
            )
        grid, part = ((n,), slice(None)) if layout is None else (layout.grid, layout.part)
        given = len(range(n)[part])
        if given != prod(grid) or len(grid) != axes or rows != self.batch:
            raise MulticamError(
                f"the layout {layout!r} of input {name!r} does not fit {n} tokens in {rows} rows for {self.batch} samples: it takes "
                f"{given} of them for a grid of {' x '.join(map(str, grid))}"
            )
        if (name, n) not in self._said:
            ids = self.places.fresh(np.repeat(np.arange(rows)[:, None], n, axis=1))
            ids[:, part] = self.places.lay(self.places.whole(name, rows, grid)).reshape(rows, -1)
            self._said[name, n] = ids
        return torch.from_numpy(self._said[name, n].copy())

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Any) -> None:
        rule, is_view, mutates = _rule(func)
        if is_view:
            for i, out in enumerate(tensors_in(returned)):
                if out is not args[0]:
                    self._views[out] = (args[0], rule, args, kwargs, i)
        given = list(tensors_in((args, tuple(kwargs.values()))))
        outs = list(tensors_in(returned))
        if self._moves(func, rule, args, kwargs, given, outs):
            return
        if not any(x in self._marks for x in given):
            return
        marks = rule(Operation(self, args, kwargs, outs[0] if len(outs) == 1 else outs))
        for out, mark in zip(outs, marks if isinstance(marks, list) else [marks], strict=False):
            if mark is not None and is_lost(mark):
                reasons = (m.lost_by for x in given if (m := self._marks.get(x)) and m.lost_by)
                mark.lost_by = next(reasons, f"{func._opname} in {self.path!r}")
            self._set(out, mark, mutates)

    def _moves(self, func: Any, rule: Rule, args: Any, kwargs: Any, given: list[Tensor], outs: list[Tensor]) -> bool:
        """Follow an operation on what is still raw: whether it only moves it. If not, what it takes for channels is told."""
        raws = [x for x in given if x in self._raw]
        if not raws:
            return False
        others = any(x in self._marks or (x in self._raw and x is not raws[0]) for x in given)
        if args and raws[0] is args[0] and not others:
            found = moved(func, rule, args, kwargs, outs, self._raw[raws[0]])
            if found is not None:
                for out, raw in zip(outs, found, strict=True):
                    self._keep_raw(out, raw)
                return True
        for x in raws:
            if (channels := channels_of(func, args, x)) is not None:
                self._raw[x].leaf.tell(self._raw[x], channels)
            self.mark(x)
        return False

    def _keep_raw(self, x: Tensor, raw: Raw | None) -> None:
        self._marks.pop(x, None)
        if raw is None:
            self._raw.pop(x, None)
        else:
            self._raw[x] = raw

    def _set(self, x: Tensor, mark: Mark | None, mutates: bool) -> None:
        before = self.mark(x)
        if mark is before or (before and mark and not mark.lattice and same_marks(before, mark)):
            return
        if mark is None:
            self._marks.pop(x, None)
        else:
            self._marks[x] = mark
        if mutates and x in self._views:
            self._write_back(x, mark)

    def _write_back(self, view: Tensor, mark: Mark | None) -> None:
        """Tell the tensor that `view` is a part of that this part has got other ids."""
        base, rule, args, kwargs, i = self._views[view]
        before = self.mark(base)
        ids = np.broadcast_to(CONSTANT if before is None else before.ids, base.shape).copy()
        self._marks[base] = Mark(ids)
        part = rule(Operation(self, (base, *args[1:]), kwargs, view))
        target = (part[i] if isinstance(part, list) else part).ids
        if np.shares_memory(target, ids) and target.shape == tuple(view.shape):
            target[...] = CONSTANT if mark is None else mark.ids
            self._marks[base] = Mark(compressed(ids))
        else:
            self._marks[base] = lost_like(base)
        if base in self._views:
            self._write_back(base, self._marks[base])


def _has_places(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested and x.numel() > 0 and x.ndim > 1


@cache
def _rule(func: Any) -> tuple[Rule, bool, bool]:
    """The rule of an operation, whether it returns a view of its first argument, and whether it writes into it."""
    aliases = [result.alias_info for result in func._schema.returns if result.alias_info]
    mutates = any(alias.is_write for alias in aliases)
    name = func._opname.removesuffix("_")
    if name.endswith("_copy") and name != "_to_copy":
        name = name.removesuffix("_copy")
    rule = (
        (moving.RULES.get(name) or picking.RULES.get(name) or rule_of(name, func)) if func.namespace == "aten" else lose
    )
    return rule, bool(aliases) and not mutates, mutates
