"""Which axis of a matrix of attention is the queries' and which the keys', through whatever rearranged it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import TensorWeakRef

TOLERANCE = 1e-2  # of a sum of probabilities, in bfloat16
# For each entry of a tensor: its row, its column, and its matrix (n), in the product of queries and keys (n row column). Rows and
# columns that were put beside it have numbers below zero.
Where = dict[str, Int[Tensor, "..."]]


@dataclass(eq=False)
class Softmax:
    """One softmax of a pass.

    Attributes:
        path: The module that took it.
        shape: Of what it returned.
        over: The axis that sums to one.
        where: See `Where`; without a product of queries and keys only the column, which is `over`.
        output: What it returned.
        saved: A copy of that, made before somebody writes into it.
        used: Whether it was found to be attention.
    """

    path: str
    shape: tuple[int, ...]
    over: int
    where: Where
    output: TensorWeakRef
    saved: Tensor | None = None
    used: bool = False


def varies(where: Tensor, axis: int) -> bool:
    """Whether numbers differ along an axis."""
    if where.shape[axis] == 1 or where.stride(axis) == 0:
        return False
    for other in range(where.ndim):
        if where.stride(other) == 0:
            where = where.narrow(other, 0, 1)
    return bool((where != where.narrow(axis, 0, 1)).any())


def role_of(where: Where, contracted: int, free: int) -> str | None:
    """Whether an axis runs over the rows or the columns of a product; "mixed" for neither, None for both."""
    lines = [name for name in ("row", "column") if name in where]
    along = [name for name in lines if varies(where[name], contracted)]
    across = [name for name in lines if varies(where[name], free)]
    if not along and where["column"].shape[contracted] == 1:
        return "row" if across == ["column"] and "row" in where else "column"
    if not along:
        return "mixed"
    return along[0] if len(along) == 1 and along[0] not in across else None


def sums_to_one(weights: Float[Tensor, "*n q k"]) -> str | None:
    """Which axis of non-negative weights sums to one."""
    wide = weights.detach().float()
    if not wide.numel() or not (wide >= 0).all():
        return None
    for axis, name in ((-1, "keys"), (-2, "queries")):
        if wide.shape[axis] > 1 and ((wide.sum(axis) - 1).abs() <= TOLERANCE).all():
            return name
    return None


def order_of(matrix: Int[Tensor, " n"]) -> Int[Tensor, " n"] | None:
    """What puts matrices in the order of their numbers; None where they are, or where some are missing."""
    order = matrix.argsort()
    expected = torch.arange(len(matrix), device=matrix.device)
    return None if torch.equal(order, expected) or not torch.equal(matrix[order], expected) else order


def laying(
    softmax: Softmax,
    over: str,
    role: str,
    matrices: Tensor | None,
    rows: Int[Tensor, "n q"],
    columns: Int[Tensor, "n k"],
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """From what a softmax returned to these matrices, rows and columns `(m q k)`, and the axes that m is made of."""
    # P came out of the softmax with its axes in the model's order, all matrices' rows and columns side by side. First its axes are moved to
    # (… q k) and the others folded to m. Then it is compared by numbers: where what is wanted has other rows, columns or matrices
    # than P (slices, windows, a constant column put in front), they are copied to where they belong, and the rest is zero.
    where, shape = softmax.where, softmax.shape
    other = "row" if role == "column" else "column"
    second = _axis(where, other if over == "keys" else role, softmax.over)
    keys, queries = (softmax.over, second) if over == "keys" else (second, softmax.over)
    # Where each query has keys of its own, it is a matrix, of a single row.
    alone = rows.shape[1] == 1 and shape[queries] > 1 and prod(shape) == len(rows) * shape[keys]

    def apart(m: Tensor) -> Tensor:
        return m.movedim(keys, -1)[..., None, :] if alone else m.movedim((queries, keys), (-2, -1))

    others = tuple(apart(torch.empty(shape, device="meta")).shape[:-2])

    def flat(m: Tensor) -> Tensor:
        return apart(m).flatten(0, -3) if others else apart(m)[None]

    known = {name: flat(w) for name, w in where.items()}
    wanted = [(-1, known[role][0, 0], columns[0])]
    if "row" in where:
        wanted.append((-2, known[other][0, :, 0], rows[0]))
    if matrices is not None and "matrix" in known:
        wanted.append((0, known["matrix"][:, 0, 0], matrices))
    moves = [(axis, *_found(want, have), len(want)) for axis, have, want in wanted if not torch.equal(have, want)]

    def lay(m: Tensor) -> Tensor:
        m = flat(m)
        for axis, to, at, size in moves:
            shape = list(m.shape)
            shape[axis] = size
            m = m.new_zeros(shape).index_copy(axis, to, m.index_select(axis, at))
        return m

    return lay, (len(rows),) if any(axis == 0 for axis, *_ in moves) else others


def _found(want: Int[Tensor, " n"], have: Int[Tensor, " m"]) -> tuple[Int[Tensor, " both"], Int[Tensor, " both"]]:
    """Where the numbers are that both have: among those wanted, and among the others."""
    to, at = (want[:, None] == have).nonzero(as_tuple=True)
    return to, at


def line_of(where: Where, axis: int) -> str:
    """Whether an axis runs over rows or columns; an axis of size one runs over what no other axis does."""
    varying = {name: [i for i in range(w.ndim) if varies(w, i)] for name, w in where.items()}
    for name in ("column", "row"):
        if axis in varying[name]:
            return name
    if bool(varying["column"]) != bool(varying["row"]):
        return "row" if varying["column"] else "column"
    return "row" if axis == where["row"].ndim - 2 else "column"


def _axis(where: Where, name: str, taken: int) -> int:
    """The axis that runs over rows or columns; the last one where there is a single row or column."""
    ndim = where["column"].ndim
    varying = [axis for axis in range(ndim) if name in where and axis != taken and varies(where[name], axis)]
    # Where samples and heads were folded into the rows, several axes run over them. Rows of one matrix are neighbours, so the axis of the
    # smallest step is that of its rows.
    if varying:
        return min(
            varying, key=lambda axis: int((where[name].select(axis, 1) - where[name].select(axis, 0)).abs().max())
        )
    return max(axis for axis in range(ndim) if axis != taken)


def broadcasts(small: Tensor, large: Tensor) -> bool:
    """Whether one shape is spread over the other."""
    sides = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.ndim <= large.ndim and all(a in (1, b) for a, b in sides)
