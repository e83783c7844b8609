"""The plain memory of tensors of every kind: where it is, how it is compared, and whether a tensor still shows it."""

import re

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SAMPLES = 64  # numbers by which a pass is seen to have written where nobody saw it

# What holds the memory of sparse tensors.
SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
USUAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}
# Numbers of less than a byte, which PyTorch moves and does not copy.
SHELLS = {kind for name, kind in vars(torch).items() if re.fullmatch(r"u?int[1-7]|bits\w+", name)}


def has_memory(x: Tensor) -> bool:
    """Whether a tensor is plain memory: neither sparse nor nested, nor the wrapper of a function transform."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return False
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def plain(x: Tensor) -> list[Tensor]:
    """The plain tensors that share the memory of a tensor, with each number once; none where it has no memory to be reached."""
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        return [memory for name in x.__tensor_flatten__()[0] for memory in plain(getattr(x, name))]
    if x.layout is not torch.strided:
        return [getattr(x, name)() for name in SPARSE.get(x.layout, ())]
    if x.is_nested:
        return [x.values()]
    if not has_memory(x) or not x.numel():
        return []
    if x.is_quantized or x.dtype in SHELLS:
        return [torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())]
    if x.dtype.is_complex and x.is_conj():
        x = x.conj()
    if x.is_neg():
        x = torch._neg_view(x)
    if not x.is_contiguous() and torch._debug_has_internal_overlap(x) == 1:
        x = x[tuple(slice(None, None if stride else 1) for stride in x.stride())]
    return [x]


def sampled(x: Tensor) -> Tensor:
    """Some of the numbers of a tensor, all over it."""
    if x.is_contiguous():
        return x.view(-1)[:: x.numel() // SAMPLES]
    each = max(1, round(SAMPLES ** (1 / x.ndim)))
    return x[tuple(slice(None, None, max(1, side // each)) for side in x.shape)]


def same_bytes(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN and the sign of zero included."""
    return torch.equal(_bytes(x), _bytes(y))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def is_usual(x: Tensor) -> bool:
    """Whether a tensor is as nearly all are, told fast: numbers of a usual kind side by side."""
    return (
        (type(x) is nn.Parameter or type(x) is Tensor)
        and x.dtype in USUAL
        and x.layout is torch.strided
        and not x.is_nested
        and x.is_contiguous()
        and not x.is_neg()
    )


def is_same(x: Tensor, alias: Tensor) -> bool:
    """Whether a tensor still is the view of its memory that another one is; not told of those that are made of several."""
    if is_traceable_wrapper_subclass(x):
        return True  # its parts are attributes
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        return False
    return x.dtype is alias.dtype and x.is_set_to(alias)


def address(x: Tensor) -> int:
    """Where the memory of a plain tensor is: no other has this number while it is there."""
    return int(x.untyped_storage()._cdata)
