"""From a layer's output to a grid: `(b c *grid)`.

A reshape is any callable that rearranges or selects entries of a tensor without computing anything new, so that the same
call serves activations and their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from multicam.errors import MulticamError

Reshape = Callable[[Tensor], Tensor]
Grid = tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """Tokens `(b n c)` as a grid `(b c *grid)`; see `tokens`."""

    grid: Grid
    part: slice
    sequence_first: bool

    def __call__(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The grid `(b c *grid)` of tokens `(b n c)`."""
        if x.ndim != 3:
            raise MulticamError(f"{self!r} takes tokens (b n c), but the layer returned {tuple(x.shape)}")
        sequence = x.transpose(0, 1) if self.sequence_first else x
        picked = sequence[:, self.part]
        cells = prod(self.grid)
        if picked.shape[1] != cells:
            raise MulticamError(
                f"{self!r} needs {' x '.join(map(str, self.grid))} = {cells} tokens, but of the layer's "
                f"{sequence.shape[1]} tokens {picked.shape[1]} are left after cutting; "
                "check the grid and the number of class and register tokens"
            )
        return picked.transpose(1, 2).reshape(x.shape[1 if self.sequence_first else 0], x.shape[2], *self.grid)


def tokens(
    *grid: int, prefix: int = 0, suffix: int = 0, part: slice | None = None, sequence_first: bool = False
) -> Tokens:
    """A reshape of tokens `(b n c)` to a grid `(b c *grid)`; the count must be exact.

    Args:
        *grid: Rows and columns (or frames, rows and columns, or one length).
        prefix: Tokens in front of the grid: class, distillation and register tokens.
        suffix: Tokens behind it.
        part: The tokens of this grid as a slice, where the sequence holds several grids or text; instead of `prefix`
            and `suffix`.
        sequence_first: Whether the layer returns `(n b c)`.

    Example:
        >>> tokens(14, 14, prefix=1)(torch.rand(2, 197, 48)).shape
        torch.Size([2, 48, 14, 14])
    """
    if not grid or any(side < 1 for side in grid) or prefix < 0 or suffix < 0:
        raise MulticamError(f"a token grid is positive, as in tokens(14, 14, prefix=1); given is {grid}")
    if part is not None and (prefix or suffix):
        raise MulticamError("give either part=, or prefix= and suffix=")
    cut = slice(prefix, -suffix if suffix else None)
    return Tokens(grid, cut if part is None else part, sequence_first)


def as_it_is(x: Shaped[Tensor, "b c *grid"]) -> Shaped[Tensor, "b c *grid"]:
    """`(b c *grid)` unchanged: what convolutions return, and what a signal `(b c l)` is."""
    return x


def channels_last(x: Shaped[Tensor, "b *grid c"]) -> Shaped[Tensor, "b c *grid"]:
    """`(b *grid c)` as `(b c *grid)`: what Swin, SAM and other window transformers return.

    Example:
        >>> channels_last(torch.rand(2, 7, 9, 48)).shape
        torch.Size([2, 48, 7, 9])
    """
    return x.movedim(-1, 1)


def stacked(index: int, of: int, *, inner: bool = False, then: Reshape | None = None) -> Reshape:
    """A reshape for a layer that sees several inputs stacked on the batch axis: the rows of one of them.

    Args:
        index: Which input, counted from 0.
        of: How many were stacked.
        inner: False for `torch.cat` of whole batches (input 0 of all samples, then input 1 …), True for a batch whose
            samples lie together (all inputs of sample 0, then of sample 1 …), as frames folded into the batch do.
        then: What to do with these rows to get a grid; None where they are `(b c *grid)` already.

    Example:
        >>> stacked(1, of=2)(torch.rand(8, 16, 4, 4)).shape
        torch.Size([4, 16, 4, 4])
    """
    if not 0 <= index < of:
        raise MulticamError(f"stacked({index}, of={of}): the index must be between 0 and {of - 1}")

    def pick(x: Tensor) -> Tensor:
        if x.shape[0] % of:
            raise MulticamError(f"a batch axis of {x.shape[0]} cannot hold {of} stacked inputs")
        rows = x[index::of] if inner else x.chunk(of)[index]
        return rows if then is None else then(rows)

    return pick


def positions(reshape: Reshape, x: Shaped[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Which entry of `x` (counted flat) each entry of `reshape(x)` is; -1 for a zero where `x` has none.

    Raises:
        MulticamError: If the reshape computes instead of rearranging.
    """
    index = _numbers(reshape, x)
    exists = not index.is_floating_point() and bool(((index >= -1) & (index < x.numel())).all())
    if not exists or not torch.equal(_taken(x, index), reshape(x).nan_to_num()):
        raise MulticamError(f"the reshape {reshape!r} must only rearrange or select entries, but it computes new ones")
    return index


def put_back(reshape: Reshape, x: Shaped[Tensor, "..."], grid: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """`x` with those entries exchanged that `reshape` lays on a grid; those on none (class tokens) stay.

    Args:
        reshape: It only rearranges, see `positions`.
        x: What a layer returned.
        grid: What `reshape` is to return for it.
    """
    if reshape is as_it_is:
        return grid.to(x.dtype)
    # Done to the numbers of all entries, a rearrangement tells where each of them went.
    index = _numbers(reshape, x).flatten()
    values = grid.to(x.dtype).flatten()
    if not x.is_meta and bool((index < 0).any()):
        index, values = index[index >= 0], values[index >= 0]
    return x.flatten().scatter(0, index, values).view(x.shape)


def _numbers(reshape: Reshape, x: Tensor) -> Tensor:
    return reshape(torch.arange(1, x.numel() + 1, device=x.device).view(x.shape)) - 1


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten()[index.clamp(min=0)].nan_to_num().where(index >= 0, x.new_zeros(()))
