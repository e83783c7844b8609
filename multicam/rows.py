"""Where the samples lie in a recorded tensor, as passes with another size of the batch prove it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the samples lie in a recorded tensor, proved by passes with two sizes of the batch.

    Attributes:
        batch: How many samples the recorded tensor has.
        axis: The axis that grows with the batch; None for a tensor without samples.
        each: How many entries of the axis belong to one sample.
        apart: Whether those entries lie `batch` apart, as `torch.cat` of whole batches puts them, and not side by side.
    """

    batch: int
    axis: int | None = None
    each: int = 1
    apart: bool = False

    def spread(self, x: Tensor, sample: int, n: int) -> Tensor:
        """The tensor for `n` copies of one sample, which share their memory where that can be."""
        if self.axis is None:
            return x
        sizes = (self.each, self.batch) if self.apart else (self.batch, self.each)
        split = x.view(*x.shape[: self.axis], *sizes, *x.shape[self.axis + 1 :])
        at = self.axis + self.apart
        copies = split.narrow(at, sample, 1).expand(*(n if i == at else -1 for i in range(split.ndim)))
        return (
            copies.squeeze(self.axis + (not self.apart)) if self.each == 1 else copies.flatten(self.axis, self.axis + 1)
        )

    def take(self, x: Tensor, samples: Sequence[int]) -> Tensor:
        """The tensor for these samples, which may come several times."""
        if self.axis is None:
            return x
        at = torch.as_tensor(samples, device=x.device)
        if self.each > 1:
            inside = torch.arange(self.each, device=x.device)
            apart = inside[:, None] * self.batch + at
            at = (apart if self.apart else at[:, None] * self.each + inside).flatten()
        return x.index_select(self.axis, at)


def where(x: Tensor, again: Tensor, batch: int, samples: Sequence[int], known: list[Rows] | None) -> list[Rows]:
    """Where the samples may lie in `x`, if `again` holds these of them and it was `known` to be one of these places."""
    n = len(samples)
    if x.ndim != again.ndim or x.dtype != again.dtype:
        return []
    grown = [axis for axis in range(x.ndim) if x.shape[axis] != again.shape[axis]]
    if not grown:
        candidates = [Rows(batch)]
    elif len(grown) == 1 and x.shape[grown[0]] * n == again.shape[grown[0]] * batch:
        each = x.shape[grown[0]] // batch
        candidates = [Rows(batch, grown[0], each, apart) for apart in ((False, True) if each > 1 else (False,))]
    else:
        return []
    possible = [rows for rows in candidates if known is None or rows in known]
    return [rows for rows in possible if alike(rows.take(x, samples), again)]


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of passes with other sizes of a batch."""
    share = rounding(y)
    if not share or not y.numel():
        return torch.equal(x, y)
    size = y.abs()
    size = size.where(size < 1e30, 0).max()  # masks are filled with the lowest number there is
    return torch.allclose(x, y, share, share * float(size), equal_nan=True)


def rounding(x: Tensor) -> float:
    """By how much passes with other sizes of a batch may differ, as a share of the largest value."""
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0
    short = x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return float((2**-10 if short else torch.finfo(x.dtype).eps) ** (2 / 3))
