"""From a layer's output to a grid: `(b c *grid)`.

A reshape is any callable that rearranges or selects entries of a tensor without computing anything new, so that the same
call serves activations and their gradients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int, Shaped
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
    """Which entry of `x` (counted flat) each entry of `reshape(x)` is.

    Raises:
        MulticamError: If the reshape computes instead of rearranging.
    """
    index = reshape(torch.arange(x.numel(), device=x.device).view(x.shape))
    exists = not index.is_floating_point() and bool(((index >= 0) & (index < x.numel())).all())
    if not exists or not torch.equal(x.flatten()[index].nan_to_num(), reshape(x).nan_to_num()):
        raise MulticamError(f"the reshape {reshape!r} must only rearrange or select entries, but it computes new ones")
    return index


@dataclass(frozen=True)
class Scope:
    """What a module and all inside it prove about the outputs of its parts.

    Attributes:
        channels: The channel counts of its convolutions and batch norms, whose outputs are `(b c *grid)`.
        features: The channel counts of its linear layers and layer norms, whose outputs are `(… c)`.
        grids: The grids that its convolutions and poolings returned so far.
        extras: How many tokens its class and register parameters may put in front of a grid.
        queries: How many learned queries it may hold, which are no grid whatever their number.
    """

    channels: frozenset[int]
    features: frozenset[int]
    grids: frozenset[Grid]
    extras: frozenset[int]
    queries: frozenset[int]


@dataclass(frozen=True)
class Evidence:
    """What one forward pass and the modules themselves prove about a layer's output.

    Attributes:
        layer: The layer's path.
        batch: How many samples the model was given.
        sequence_first: Whether the layer says that it returns `(n b c)`; None if it says nothing.
        scopes: The layer itself and the modules around it, from the inside out.
    """

    layer: str
    batch: int
    sequence_first: bool | None
    scopes: tuple[Scope, ...]


def find_reshape(x: Float[Tensor, "..."], evidence: Evidence) -> Reshape:
    """The reshape that the evidence proves for a layer's output.

    The widths of the nearest modules tell `(b c *grid)` from channels-last, and a token sequence gets the only grid that
    a convolution or pooling of the same branch proves.

    Raises:
        MulticamError: If nothing is proved; the message says what to pass.
    """
    shape = tuple(x.shape)
    layer, batch = evidence.layer, evidence.batch
    if len(shape) <= 2:
        raise MulticamError(
            f"layer {layer!r} returns {shape}: it has no spatial axes left to lay a map on; take an earlier layer"
        )
    if len(shape) == 3 and shape[0] == shape[1] == batch and evidence.sequence_first is None:
        raise MulticamError(
            f"layer {layer!r} returns {shape} for {batch} samples: nothing tells which of the first two axes is the batch; "
            f"give another number of samples, or {_say(False)}"
        )
    turned = len(shape) == 3 and (bool(evidence.sequence_first) or (shape[0] != batch and shape[1] == batch))
    if shape[1 if turned else 0] != batch:
        raise MulticamError(
            f"layer {layer!r} returns {shape} for {batch} samples: it folds something into the batch axis, or the "
            "input has none (use x[None]). If inputs or "
            "frames are stacked there, say which with reshape=stacked(index, of=count); if windows are, take a layer "
            "outside the windows, or pass a reshape of your own"
        )
    last = _channels_are_last(shape, evidence.scopes)
    grids = frozenset[Grid]().union(*(scope.grids for scope in evidence.scopes))
    if len(shape) == 3:
        signal = last is False and not turned and any(_is_halving(shape[2:], grid) for grid in grids)
        return as_it_is if signal else _find_token_grid(shape, turned, evidence)
    if last is None and (shape[1] == shape[-1] or not any(_is_halving(shape[2:], grid) for grid in grids)):
        raise MulticamError(
            f"layer {layer!r} returns {shape}, and nothing tells whether its channels are the second axis or the last; "
            "say so with Layer(…, reshape=as_it_is) or Layer(…, reshape=channels_last)"
        )
    if not last:
        return as_it_is
    if not any(_is_halving(shape[1:-1], grid) for grid in grids):
        raise MulticamError(
            f"layer {layer!r} returns {shape} with its channels last, but nothing proves that {shape[1:-1]} is a grid "
            f"(grids seen in the model: {_listed((grid, 0) for grid in grids)}); if it is, say so with "
            "Layer(…, reshape=channels_last)"
        )
    return channels_last


def _channels_are_last(shape: tuple[int, ...], scopes: tuple[Scope, ...]) -> bool | None:
    """Whether the last axis holds the channels, by the nearest module whose widths fit one axis only; None: unknown."""
    for scope in scopes:
        first, last = shape[1] in scope.channels, shape[-1] in scope.features
        if first == last:
            both = scope.channels | scope.features
            first, last = shape[1] in both, shape[-1] in both
        if first != last:
            return last
    return None


def _find_token_grid(shape: tuple[int, ...], turned: bool, evidence: Evidence) -> Reshape:
    count = shape[0] if turned else shape[1]
    returned = f"layer {evidence.layer!r} returns {shape}"
    if any(count in scope.queries for scope in evidence.scopes):
        raise MulticamError(f"{returned}: {count} tokens may be the model's {count} learned queries; {_say(turned)}")
    for scope in evidence.scopes:
        fitting = {(grid, count - prod(grid)) for grid in scope.grids if count - prod(grid) in scope.extras}
        if len(fitting) == 1:
            grid, prefix = fitting.pop()
            return tokens(*grid, prefix=prefix, sequence_first=turned)
        if fitting:
            raise MulticamError(f"{returned}: {count} tokens, which fit {_listed(fitting)}; {_say(turned)}")
    known = {(grid, 0) for scope in evidence.scopes for grid in scope.grids}
    raise MulticamError(
        f"{returned}: {count} tokens whose grid nothing proves (grids seen in the model: {_listed(known)}); {_say(turned)}"
    )


def _is_halving(grid: Grid, of: Grid) -> bool:
    """Whether `grid` is `of`, or what is left of it after merging neighbours in pairs some times."""
    while len(of) == len(grid) and max(of) > max(grid):
        of = tuple(-(-side // 2) for side in of)
    return grid == of


def _say(turned: bool) -> str:
    more = ", sequence_first=True" if turned else ""
    return (
        f"say it with Layer(…, reshape=tokens(rows, columns, prefix=class and register tokens{more})), or with "
        "reshape=as_it_is for a signal (b c l)"
    )


def _listed(fitting: Iterable[tuple[Grid, int]]) -> str:
    shown = [" x ".join(map(str, grid)) + (f" + {n}" if n else "") for grid, n in sorted(fitting)]
    return ", ".join(shown) or "none"
