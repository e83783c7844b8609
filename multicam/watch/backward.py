"""The backward pass, with one fault of PyTorch's kernels kept out of it.

The kernel of batch normalisation for CPUs (of PyTorch 2.14 and before) asks whether its input and the gradient are contiguous, with the channels
first or last. Where an axis has one entry, its stride may be anything, and both may be said of a tensor by turns: then it pairs numbers of
one place with those of another, and the gradient is false. Attention written out over the places of one photo has such strides. Modules are given
other inputs, in a forward pass that may be run again; what functions were given is laid out anew in the backward pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import CheckpointError

from multicam.errors import out_of_memory
from multicam.watch.hooks import Kernels


def gradients(
    outputs: Tensor, wanted: Sequence[Tensor], grad_outputs: Tensor | None = None, **options: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of `outputs` by each tensor of `wanted`; None for one that they do not depend on.

    As `torch.autograd.grad`, but for batch normalisations, which are handed gradients and inputs in a common layout.

    Args:
        outputs: What is differentiated: a number, or with `grad_outputs` any tensor.
        wanted: What it is differentiated by.
        grad_outputs, options: As for `torch.autograd.grad`.

    Example:
        >>> x = torch.rand(2, requires_grad=True)
        >>> gradients(3 * x.sum(), [x])
        (tensor([3., 3.]),)
    """
    with _normalisations_laid_out(outputs.grad_fn):
        return torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, **options)


def in_common_layouts(modules: Iterable[nn.Module]) -> None:
    """Hooks by which the normalisations among these modules are given inputs in a common layout."""
    for module in modules:
        if isinstance(module, _NormBase):
            module.register_forward_pre_hook(Kernels(_first_laid_out))


def _first_laid_out(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (_laid_out(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) and _is_odd(args[0]) else None


@contextmanager
def _normalisations_laid_out(last: Node | None) -> Iterator[None]:
    normalisations = [node for node in _nodes(last) if "BatchNorm" in node.name()]
    handles = [node.register_prehook(_all_laid_out) for node in normalisations]
    handles += [
        node.register_hook(partial(_anew, node)) for node in normalisations if node.name() == "NativeBatchNormBackward0"
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nodes(last: Node | None) -> Iterator[Node]:
    todo, seen = [last] if last is not None else [], {last}
    while todo:
        node = todo.pop()
        yield node
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        todo += new


def _all_laid_out(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(_laid_out(g) if g is not None and _is_odd(g) else g for g in grads)


def _anew(
    node: Any, found: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a normalisation whose input lies in an odd layout, from a copy in a common one; None where they are right."""
    try:
        x = node._saved_input
    except (CheckpointError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return None  # a checkpointed part, run again for the backward pass, keeps what it saved for one use
    if not _is_odd(x) or grads[0] is None:
        return None
    return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
        grads[0],
        _laid_out(x),
        node._saved_weight,
        node._saved_running_mean,
        node._saved_running_var,
        node._saved_result1,
        node._saved_result2,
        node._saved_training,
        node._saved_eps,
        [each is not None for each in found],
    )


def _laid_out(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _is_odd(x: Tensor) -> bool:
    """Whether a tensor is contiguous with the channels first or last, with other strides than such tensors are made with."""
    if 1 not in x.shape:
        return False
    axes = [*range(x.ndim)]
    orders = ([*axes], [*axes[:1], *axes[2:], *axes[1:2]])
    packed = [_strides(x.shape, order) for order in orders]
    dense = any(all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), each, strict=True)) for each in packed)
    return dense and x.stride() not in packed


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose memory goes along the axes in an order, the last one fastest."""
    found, step = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis] = step
        step *= shape[axis]
    return tuple(found)
