"""Attention that is written out: queries times keys, softmax, times values, followed through plain operations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from multicam.watch.tokens.matrices import (
    Softmax,
    Where,
    broadcasts,
    laying,
    line_of,
    order_of,
    role_of,
    sums_to_one,
    varies,
)

aten = torch.ops.aten
SOFTMAXES = {aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.bmm.default: 0, aten.mm.default: 0, aten.baddbmm.default: 1}  # and where their operands begin
VIEWS = {aten.view.default, aten._unsafe_view.default}
REARRANGING = VIEWS | {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.unbind.int,
}  # fmt: skip
COPYING = {aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default, aten.lift_fresh.default}
REORDERING = {
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.cumsum.default,
    aten.roll.default,
    aten.flip.default,
}


@dataclass(frozen=True, eq=False)
class Operand:
    """One side of a product.

    Attributes:
        tensor: As the model had it, `(n tokens e)`, `(n e tokens)` or without `n`.
        axis: Where its tokens are, counted from the end.
    """

    tensor: Tensor
    axis: int

    @property
    def features(self) -> int:
        """Where its features are, counted from the end."""
        return -3 - self.axis

    def rows(self) -> Tensor:
        """`(n tokens e)`, without history."""
        x = self.tensor.detach() if self.axis == -2 else self.tensor.detach().mT
        return x if x.ndim == 3 else x[None]


@dataclass(frozen=True, eq=False)
class Follow:
    """What is known of a tensor that is, or may become, a matrix of attention.

    Attributes:
        path: The module that multiplied queries and keys.
        left: The first operand of the product; None where none was seen.
        right: The second.
        where: Of each entry of the tensor.
        softmax: The last softmax that it went through.
        probs: What that returned, where it is another tensor than this.
        changed: Whether anything but rearranging happened since the softmax, or since the product.
    """

    path: str
    left: Operand | None
    right: Operand | None
    where: Where
    softmax: Softmax | None = None
    probs: Tensor | None = None
    changed: bool = False


@dataclass(frozen=True, eq=False)
class Attended:
    """Attention that was written out, lay_probs as the product of queries and keys is.

    Attributes:
        path: The module that multiplied queries and keys (the values, where no product was seen).
        q: The queries; None where no product of queries and keys was seen.
        k: The keys; None where `q` is.
        v: The values; in the order of `order`.
        matrices: Which matrix of the product each of `n` is; None where it is not one of them alone.
        queries: Which token of `q` each row is; below zero for none of them.
        keys: Which token of `k` each column is; below zero for none of them.
        weights: What multiplied the values `(n q k)`.
        probs: What the softmax returned for these queries and keys `(m q k)`; None where no softmax was seen.
        output: What came out; in the order of `order`.
        order: From the matrices of `v` and `output` to those of the product; None: they are the same.
        split: The axes that `n` is made of, as the model had them.
        softmax_over: "keys" or "queries".
        source: The tensor of the softmax (or of the weights), with its history for a backward pass.
        lay: From a tensor shaped as `source` to `(m q k)`.
        reason: Why `source` has no gradient of its own values; None: it has.
    """

    path: str
    q: Operand | None
    k: Operand | None
    v: Operand
    matrices: Int[Tensor, " n"] | None
    queries: Int[Tensor, "n q"]
    keys: Int[Tensor, "n k"]
    weights: Float[Tensor, "n q k"]
    probs: Float[Tensor, "m q k"] | None
    output: Operand
    order: Int[Tensor, " n"] | None
    split: tuple[int, ...]
    softmax_over: str
    source: Tensor
    lay: Callable[[Tensor], Tensor]
    reason: str | None


class Products:
    """Follows the products of one forward pass, operation by operation.

    Args:
        is_parameter: Whether a tensor is a parameter of the model: a matrix product with one is a linear layer.
    """

    def __init__(self, is_parameter: Callable[[Tensor], bool]) -> None:
        self._is_parameter = is_parameter
        self._follows: Any = WeakTensorKeyDictionary()
        self.softmaxes: list[Softmax] = []
        self.unconfirmed: list[tuple[str, tuple[int, ...]]] = []

    def before(self, x: Tensor) -> None:
        """Save probabilities that an operation is about to write into."""
        follow = self._follows.get(x)
        if follow is not None and follow.softmax is not None and follow.softmax.saved is None:
            probs = follow.softmax.output()
            if probs is not None and probs.untyped_storage()._cdata == x.untyped_storage()._cdata:
                follow.softmax.saved = probs.detach().clone()

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Any, returned: Any, path: str) -> Attended | None:
        """Take note of an operation in this module; the attention, if it is what completes it."""
        if func in PRODUCTS:
            a, b = args[PRODUCTS[func] :][:2]
            return self._multiplied(a, b, returned, path)
        if func in SOFTMAXES:
            self._softmaxed(args[0], args[1], returned, path)
            return None
        if func is aten.cat.default:
            args = (*args[0], *args[1:])
        given = next((x for x in args if isinstance(x, Tensor) and x in self._follows), None)
        if given is None:
            return None
        follow = self._follows[given]
        if func in REARRANGING:
            self._rearranged(func, given, args, kwargs, returned, follow)
            return None
        if func is aten.cat.default:
            axis = (args[-1] if isinstance(args[-1], int) else 0) % given.ndim
            before = sum(x.shape[axis] for x in args[: next(i for i, x in enumerate(args) if x is given)])
            self._extended(follow, given, {axis: before}, returned)
            return None
        if func is aten.constant_pad_nd.default:
            befores = args[1][::2]
            self._extended(follow, given, {given.ndim - 1 - i: befores[i] for i in range(len(befores))}, returned)
            return None
        results = returned if isinstance(returned, tuple | list) else [returned]
        if not results or not isinstance(results[0], Tensor) or func in REORDERING:
            return None
        x = results[0]
        if func is aten.convolution.default:
            if x.shape[2:] == given.shape[2:] and given is args[0]:  # heads are mixed
                self._mixed(follow, given, 1, x)
            return None
        if broadcasts(given, x):
            where = {name: w.expand(x.shape) for name, w in follow.where.items()}
            self._pass_on(follow, given, x, where, follow.changed or func not in COPYING)
        return None

    def _pass_on(self, follow: Follow, given: Tensor, x: Tensor, where: Where, changed: bool) -> None:
        probs = follow.probs
        if follow.softmax is not None and probs is None and x is not given:
            probs = given  # a weak dictionary must not hold its own keys, so only what comes after holds it
        self._follows[x] = replace(follow, where=where, probs=probs, changed=changed)

    def _rearranged(self, func: Any, given: Tensor, args: Any, kwargs: Any, returned: Any, follow: Follow) -> None:
        if given is not args[0]:
            return
        moved = {
            name: w.reshape(args[1]) if func in VIEWS else func(w, *args[1:], **kwargs)
            for name, w in follow.where.items()
        }
        several = isinstance(returned, tuple | list)
        for i, x in enumerate(returned if several else [returned]):
            where = {name: w[i] if several else w for name, w in moved.items()}
            self._pass_on(follow, given, x, where, follow.changed)

    def _extended(self, follow: Follow, given: Tensor, befores: dict[int, int], returned: Tensor) -> None:
        """Rows or columns are put before and behind along some axes."""
        # Entries that were put in belong to no row and column of the product Q K^T: along the axis that runs over rows (or columns) their
        # numbers are below zero, and all different, so that no two of them are taken for the same. Numbers that do not change along the
        # axis are those of the new entries as well.
        where = dict(follow.where)
        for axis, before in befores.items():
            size = returned.shape[axis]
            for name, w in where.items():
                usual = {"row": -2, "column": -1}.get(name) == axis - given.ndim
                if not (varies(w, axis) or (w.shape[axis] == 1 and usual)):
                    where[name] = w.narrow(axis, 0, 1).expand(*w.shape[:axis], size, *w.shape[axis + 1 :])
                    continue
                at = torch.arange(size, device=w.device) - before
                inside = (at >= 0) & (at < w.shape[axis])
                shape = (-1, *[1] * (w.ndim - axis - 1))
                moved = w.index_select(axis, at.clamp(0, w.shape[axis] - 1))
                where[name] = moved.where(inside.view(shape), -1 - torch.arange(size, device=w.device).view(shape))
        self._pass_on(follow, given, returned, where, True)

    def _softmaxed(self, x: Tensor, over: int, returned: Tensor, path: str) -> None:
        over %= x.ndim
        follow = self._follows.get(x)
        column = torch.arange(x.shape[over], device=x.device).view(-1, *[1] * (x.ndim - over - 1)).expand(x.shape)
        where = {"column": column} if follow is None else follow.where
        softmax = Softmax(path, tuple(x.shape), over, where, TensorWeakRef(returned))
        self.softmaxes.append(softmax)
        start = Follow(path, None, None, where) if follow is None else follow
        self._follows[returned] = replace(start, softmax=softmax, probs=None, changed=False)

    def _multiplied(self, a: Tensor, b: Tensor, returned: Tensor, path: str) -> Attended | None:
        # Attention is O = P V, or O^T = V^T P^T, with P made of Q K^T: the axis that the product sums over then runs over the columns of Q K^T
        # and the free axis over its rows (or the other way round, where the model has K Q^T), and what is summed over are the keys. An
        # axis that runs over neither is that of heads: the product mixes their matrices, as a linear layer over heads does.
        for x, other, contracted in ((a, b, a.ndim - 1), (b, a, b.ndim - 2)):
            follow = self._follows.get(x)
            if follow is None:
                continue
            free = 2 * x.ndim - 3 - contracted  # the other one of the last two axes
            role = role_of(follow.where, contracted, free)
            linear = a.ndim == 2 and self._is_parameter(other)
            if role == "mixed" or (linear and x.shape[contracted] == 1):
                self._mixed(follow, x, contracted, returned)
                return None
            if role is not None and not linear:
                found = self._attended(follow, x, other, returned, role, contracted, path)
                if found is not None:
                    return found
        if a.ndim == 3 or not (self._is_parameter(a) or self._is_parameter(b)):
            self._follows[returned] = _product(a, b, returned, path)
        return None

    def _mixed(self, follow: Follow, given: Tensor, axis: int, returned: Tensor) -> None:
        """The matrices of several heads are added up; rows and columns stay what they are."""
        kept = {name: w for name, w in follow.where.items() if name != "matrix"}
        if any(varies(w, axis) for w in kept.values()):
            return
        where = {name: w.narrow(axis, 0, 1).expand(returned.shape) for name, w in kept.items()}
        self._pass_on(follow, given, returned, where, True)

    def _attended(
        self, follow: Follow, x: Tensor, other: Tensor, returned: Tensor, role: str, contracted: int, path: str
    ) -> Attended | None:
        turned = contracted == x.ndim - 2  # the weights are the right operand, and all is transposed
        over = self._normalised_over(follow, x, turned, role)
        if over is None:
            return None
        matrix = follow.where.get("matrix")
        order = None if matrix is None else order_of(matrix if matrix.ndim == 2 else matrix[:, 0, 0])

        def lay(m: Tensor) -> Tensor:
            m = m if m.ndim == 3 else m[None]
            m = m.mT if turned else m
            return m if order is None else m[order]

        # Laid so, x is (n q k), and so are the numbers of its entries: any row tells the keys, and any column the queries.
        lines = {name: lay(w) for name, w in follow.where.items()}
        along, across = (role, "row" if role == "column" else "column")
        keys = lines[along][:, 0]
        queries = lines[across][..., 0] if across in lines else torch.full_like(lines[along][..., 0], -1)
        if matrix is None:
            matrices = None if x.ndim == 3 else torch.zeros_like(keys[:, 0])
        else:
            matrices = lines["matrix"][:, 0, 0]
        n = len(keys)
        # The softmax may have run before heads were mixed, rows were cut or constants were put in: what it returned is laid by its own
        # numbers, and its gradient is asked for where it stands in the model's history.
        softmax = follow.softmax
        source, probs = x, None
        split: tuple[int, ...] = (n,)
        lay_probs: Callable[[Tensor], Tensor] = lay
        if softmax is not None:
            softmax.used = True
            source = x if follow.probs is None else follow.probs
            lay_probs, others = laying(softmax, over, role, matrices, queries, keys)
            probs = lay_probs(source.detach() if softmax.saved is None else softmax.saved)
            split = others if others and prod(others) == n else split
        q, k = (follow.left, follow.right) if role == "column" else (follow.right, follow.left)
        overwritten = softmax is not None and softmax.saved is not None
        reason = "the model writes into its probabilities" if overwritten else None
        axis = -1 if turned else -2
        return Attended(
            path if q is None else follow.path, q, k, Operand(other, axis), matrices, queries, keys, lay(x.detach()), probs,
            Operand(returned, axis), order, split, over, source, lay_probs, reason,
        )  # fmt: skip

    def _normalised_over(self, follow: Follow, x: Tensor, turned: bool, role: str) -> str | None:
        """Whether weights sum to one over keys or over queries; None, with a note, if they are no attention."""
        softmax = follow.softmax
        if softmax is None:
            over = sums_to_one(x.mT if turned else x)
        elif "row" not in softmax.where:  # of something else than a product of queries and keys
            over = "keys" if role == "column" else None
        else:
            over = "keys" if line_of(softmax.where, softmax.over) == role else "queries"
        linear = any(operand and self._is_parameter(operand.tensor) for operand in (follow.left, follow.right))
        if over is None and follow.changed and not linear:
            self.unconfirmed.append((follow.path, tuple(x.shape)))
        return over


def _product(a: Tensor, b: Tensor, returned: Tensor, path: str) -> Follow:
    """What is known of the product of two tensors."""
    shape = returned.shape

    def index(axis: int) -> Tensor:
        return torch.arange(shape[axis], device=returned.device).view(-1, *[1] * (-axis - 1)).expand(shape)

    where = {"row": index(-2), "column": index(-1)} | ({"matrix": index(-3)} if len(shape) == 3 else {})
    return Follow(path, Operand(a, -2), Operand(b, -1), where)
