"""What becomes of token ids in operations that compute: element by element, contracted, on grids."""

import re
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multicam.watch.tokens.lattices import Lattice, same_rows
from multicam.watch.tokens.marks import (
    Mark,
    Marks,
    Operation,
    Pads,
    Rule,
    Shape,
    by_axes,
    is_lost,
    lay_images,
    lay_rows,
    lose,
    lost_like,
    tensors_in,
)
from multicam.watch.tokens.places import Places


def _forget(op: Operation) -> None:
    """For constants that are made like another tensor."""


def _keep(op: Operation) -> Mark | None:
    return op.mark()


def _to_complex(op: Operation) -> Mark | None:
    return _reduced(op.origins, op.args[0], (op.args[0].ndim - 1,), op.out)


def _to_real(op: Operation) -> Mark | None:
    mark = op.mark()
    return mark and Mark(mark.ids[..., None])


def _glu(op: Operation) -> Mark | None:
    mark = op.mark()
    return mark if mark and mark.shape[op.get(1, "dim", -1)] == 1 else lost_like(op.out)


def _embedding(op: Operation) -> Mark | None:
    mark = op.mark(1)
    return Mark(mark.ids[..., None]) if mark and not op.mark() else lost_like(op.out)


def _pointwise(op: Operation) -> Mark | None:
    if op.out.dtype == torch.bool:
        return None
    known = [(mark, x) for x in tensors_in((op.args, tuple(op.kwargs.values()))) if (mark := op.origins.mark(x))]
    values = [(mark, x) for mark, x in known if x.dtype != torch.bool] or known
    mark, shape = (
        values[0][0].at(op.out.ndim) if values[0][1].ndim != op.out.ndim else values[0][0],
        _shape(values[0][1], op.out),
    )
    for other, x in values[1:]:
        mark, shape = _met(op.origins, mark, shape, other.at(op.out.ndim), _shape(x, op.out), op.out)
    return mark


def _shape(x: Tensor, out: Tensor) -> tuple[int, ...]:
    return (1,) * (out.ndim - x.ndim) + tuple(x.shape)


def _met(origins: Marks, a: Mark, shape_a: Shape, b: Mark, shape_b: Shape, out: Tensor) -> tuple[Mark, tuple[int, ...]]:
    shape = tuple(np.broadcast_shapes(tuple(shape_a), tuple(shape_b)))
    if a is b and shape_a == shape_b:
        return a, shape
    a_broadcast = any(mine == 1 < theirs for mine, theirs in zip(shape_a, b.shape, strict=True))
    b_broadcast = any(mine == 1 < theirs for mine, theirs in zip(shape_b, a.shape, strict=True))
    if a_broadcast or b_broadcast:  # both, where all pairs of tokens are formed
        return (lost_like(out) or b) if a_broadcast and b_broadcast else b if a_broadcast else a, shape
    if is_lost(a) or is_lost(b):
        return lost_like(out) or a, shape
    if a.lattice and b.lattice and not (a.pads or b.pads) and same_rows(a.lattice, b.lattice):
        inputs = a.lattice.inputs | b.lattice.inputs
        if np.array_equal(inputs, a.lattice.inputs) and a.shape[-len(a.lattice.grid) - 1] == 1:
            return a, shape
        if np.array_equal(inputs, b.lattice.inputs) and b.shape[-len(a.lattice.grid) - 1] == 1:
            return b, shape
        both = Lattice(a.lattice.samples, inputs, a.lattice.boxes, a.lattice.axes, a.lattice.grid)
        joined = partial(_joined, origins.places, a, b)
        return origins.once(a, b, lambda: Mark(joined, np.broadcast_shapes(a.shape, b.shape), both)), shape
    if np.array_equal(a.ids, b.ids):
        return a, shape
    return Mark(origins.places.joined(a.ids, b.ids)), shape


def _reduce(position: int) -> Rule:
    def rule(op: Operation) -> Mark | None:
        axes = op.get(position, "dim")
        axes = range(op.args[0].ndim) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
        first = op.out if isinstance(op.out, Tensor) else op.out[0]
        return _reduced(op.origins, op.args[0], tuple(sorted(axis % op.args[0].ndim for axis in axes)), first)

    return rule


def _reduced(origins: Marks, x: Tensor, axes: tuple[int, ...], out: Tensor) -> Mark | None:
    mark = origins.mark(x)
    if mark is None or out.dtype == torch.bool:
        return None
    lattice = mark.lattice
    n = len(lattice.grid) if lattice else 0
    if n and axes == tuple(range(x.ndim - n, x.ndim)) and mark.shape[-n - 1] == 1:
        mark = _resized(origins, mark, (1,) * n, ())
    elif any(mark.shape[axis] > 1 for axis in axes):
        mark = Mark(origins.places.union(mark.ids, axes))
    elif mark.lattice:
        mark = Mark(mark.ids)
    return mark if out.ndim == x.ndim else Mark(mark.ids.squeeze(axes))


def _product(left: int) -> Rule:
    """A product of matrices of which at most one has places; `left` is the position of the first."""

    def rule(op: Operation) -> Mark | None:
        a, b = (op.origins.mark(x) for x in op.args[left : left + 2])
        if (a is None and b is None) or (left and op.mark()):
            return lost_like(op.out)
        rows = a and _contracted(op.origins, a, len(a.shape) - 1)
        columns = b and _contracted(op.origins, b, len(b.shape) - 2)
        if rows is None or columns is None:
            return rows or columns
        places = op.origins.places
        if places.has_parts(rows.ids) and places.has_parts(columns.ids):
            return lost_like(op.out)  # all pairs
        return Mark(places.joined(rows.ids, columns.ids))

    return rule


def _linear(op: Operation) -> Mark | None:
    mark = op.mark()
    return _contracted(op.origins, mark, op.out.ndim - 1) if mark and not op.mark(1) else lost_like(op.out)


def _contracted(origins: Marks, mark: Mark, axis: int) -> Mark:
    if mark.shape[axis] > 1:
        return Mark(origins.places.union(mark.ids, (axis,)))
    return Mark(mark.ids) if mark.lattice else mark


def _normalise_features(op: Operation) -> Mark | None:
    """A layer norm over features makes one token of those that were laid side by side along them, as a merging of patches does."""
    mark, last = op.mark(), len(op.args[0].shape) - 1
    if mark is None or len(op.args[1]) > 1 or mark.shape[last] == 1:
        return mark
    united = op.origins.places.union(mark.ids, (last,))
    return Mark(united) if op.origins.places.has_parts(united) else mark


def _convolve(op: Operation) -> Mark | None:
    x, weight, stride = op.args[0], op.args[1], list(op.get(3, "stride", ()))
    if op.origins.mark(x) is None or op.origins.mark(weight) is not None:
        return lost_like(op.out)
    n = weight.ndim - 2
    added = [after - before for before, after in zip(x.shape[-n:], op.out.shape[-n:], strict=True)]
    transposed = op.get(6, "transposed", False)
    fitted = not transposed and list(weight.shape[2:]) == stride
    # An even kernel with padding on both sides adds one cell at the end, which models cut off again.
    even = not transposed and set(stride) <= {1} and set(added) == {1}
    return _spatial(op.origins, x, op.out, n, fitted, contracts=True, more=((0, 1),) * n if even else ())


def _pool(n: int) -> Rule:
    def rule(op: Operation) -> Mark | None:
        kernel, stride = op.get(1, "kernel_size"), op.get(2, "stride", [])
        fitted = isinstance(stride, list) and stride in ([], kernel)
        return _spatial(op.origins, op.args[0], next(tensors_in(op.out)), n, fitted)

    return rule


def _spatial(
    origins: Marks, x: Tensor, out: Tensor, n: int, fitted: bool, contracts: bool = False, more: Pads = ()
) -> Mark | None:
    mark = origins.mark(x)
    if mark is None:
        return None
    if contracts and is_lost(mark):
        return by_axes(origins, out, n) or mark
    if prod(mark.shape[-n:]) == 1:
        return _contracted(origins, mark, x.ndim - 1 - n) if contracts else mark
    after = tuple(out.shape[-n:])
    # Frames may all be the same picture; along an axis over which ids are constant they stay so.
    constant = tuple(i for i in range(x.ndim - n, x.ndim) if mark.shape[i] == 1 < x.shape[i])
    if constant:
        kept = [i for i in range(n) if i + x.ndim - n not in constant]
        thin = Mark(mark.ids.squeeze(constant))
        found = _on_grid(origins, thin, tuple(after[i] for i in kept), fitted, contracts, ()) or lost_like(out)
        return found and (found if is_lost(found) else Mark(np.expand_dims(found.ids, constant)))
    return _on_grid(origins, mark, after, fitted, contracts, more) or lost_like(out)


def _on_grid(
    origins: Marks, mark: Mark, after: tuple[int, ...], fitted: bool, contracts: bool, more: Pads
) -> Mark | None:
    """The companion of something spatial on another grid; None where that is lost."""
    n = len(after)
    if mark.lattice is None or len(mark.lattice.grid) != n:
        mark = _gridded(origins, mark, n, contracts)
        if mark.lattice is None:
            return _in_blocks(origins, mark, after)
    return _resized(origins, mark, after, more or (mark.pads if fitted else ()))


def _in_blocks(origins: Marks, mark: Mark, after: tuple[int, ...]) -> Mark | None:
    """A companion of no single grid, such as several pictures side by side, on another grid: each cell is the union of a block."""
    n = len(after)
    before = mark.shape[-n:]
    if before == after:
        return mark
    if any(a % b for a, b in zip(before, after, strict=True)):
        return None
    sizes = [size for a, b in zip(before, after, strict=True) for size in (b, a // b)]
    lead = len(mark.shape) - n
    split = mark.ids.reshape(*mark.shape[:-n], *sizes)
    blocks = origins.places.union(split, tuple(range(lead + 1, lead + 2 * n, 2)))
    return Mark(blocks.reshape(*mark.shape[:-n], *after))


def _gridded(origins: Marks, mark: Mark, n: int, contracts: bool) -> Mark:
    """A companion that knows its lattice, if it is one."""

    def made() -> Mark:
        joined = contracts and mark.shape[-1 - n] > 1
        ids = origins.places.union(mark.ids, (len(mark.shape) - 1 - n,)) if joined else mark.ids
        found = origins.places.lattice(ids.reshape(-1, *ids.shape[-n:]))
        if found is None:
            return Mark(ids)
        lattice, pads = found
        whole = (slice(None),) * (ids.ndim - n)
        part = tuple(slice(p, p + size) for (p, _), size in zip(pads, lattice.grid, strict=True))
        inner = Mark(ids[whole + part], lattice=lattice)
        return Mark(ids, (), lattice, pads, inner) if any(map(any, pads)) else inner

    return origins.once(mark, ("gridded", n, contracts), made)


def _resized(origins: Marks, mark: Mark, grid: tuple[int, ...], over: Pads) -> Mark:
    """The companion of the same image on another grid, over what it covers and so many cells more."""
    lattice = mark.lattice
    assert lattice is not None
    n, inner = len(grid), mark.inner or mark
    if grid == mark.shape[-n:] and (mark.inner or mark.shape[-n - 1] == 1):
        return mark
    if grid == lattice.grid and inner.shape[-n - 1] == 1:
        return inner
    lead = mark.shape[: -n - 1]

    def made() -> Mark:
        rows = lattice.extended(over or ((0, 0),) * n, grid)
        # Channels are rows of their own where they differ and are pooled.
        one = prod(lead) == len(lattice.samples)
        return lay_images(origins.places, rows, lead) if one else lay_rows(origins, rows, mark.shape[:-n])

    return origins.once(mark, (grid, over), made)


def _joined(places: Places, a: Mark, b: Mark) -> np.ndarray:
    return places.joined(a.ids, b.ids)


_NAMES: dict[Rule, str] = {
    _to_complex: "view_as_complex",
    _to_real: "view_as_real",
    _glu: "glu",
    _embedding: "embedding",
    _linear: "linear",
    _product(0): "mm bmm",
    _normalise_features: "native_layer_norm layer_norm _fused_rms_norm rms_norm",
    _product(1): "addmm baddbmm _addmm_activation",
    _reduce(1): "mean sum amax amin max min logsumexp var std var_mean std_mean prod nansum",
    _reduce(2): "linalg_vector_norm norm",
    _keep: "clone _to_copy detach alias lift_fresh contiguous to tril triu fill zero masked_fill prelu _prelu_kernel "
    "_softmax _log_softmax _safe_softmax softmax log_softmax native_dropout dropout _fused_dropout native_group_norm group_norm native_batch_norm _native_batch_norm_legit batch_norm cudnn_batch_norm "
    "_native_batch_norm_legit_no_training miopen_batch_norm _batch_norm_with_update _batch_norm_no_update "
    "_batch_norm_impl_index instance_norm renorm hardswish rrelu_with_noise log_sigmoid_forward "
    "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine "
    "fake_quantize_per_channel_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper quantize_per_tensor quantize_per_channel dequantize "
    "cumsum",  # a running sum stays the token that it has come to, as a query does
    _forget: "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full "
    "new_empty new_empty_strided bernoulli uniform normal random exponential",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def rule_of(name: str, func: Any) -> Rule:
    """The rule of an operation of that name."""
    if name in RULES:
        return RULES[name]
    if "convolution" in name or name in ("conv1d", "conv2d", "conv3d"):
        return _convolve
    if spatial := re.search(r"(?:pool|upsample).*(\d)d", name):
        return _pool(int(spatial[1]))
    return _pointwise if torch.Tag.pointwise in func.tags else lose
