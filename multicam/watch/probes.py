"""Changed values by which a pass shows what depends on them."""

import torch
from torch import Tensor


def probe(x: Tensor) -> Tensor:
    """`x (b …)` with every sample changed in the range of its values: places trade theirs, and all are halved.

    Whole numbers stay whole, so that what is a code or an index remains one that exists; zeros become ones where all are zero.

    Example:
        >>> probe(torch.tensor([[4.0, 1.0, 0.0]])), probe(torch.tensor([[[0.5], [1.0]]]))
        (tensor([[2., 0., 0.]]), tensor([[[0.5000],
                 [0.2500]]]))
    """
    if x.dtype == torch.bool:
        return ~x
    if x.ndim > 2:
        x = x.flip(tuple(range(1 if x.ndim == 3 else 2, x.ndim)))
    floating = x.is_floating_point() or x.is_complex()
    whole = not x.is_complex() and bool((x == x.round()).all()) if floating else True
    halved = (x / 2).floor().to(x.dtype) if whole else x / 2
    empty = (x == 0).reshape(len(x), -1).all(1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(empty, torch.ones_like(x), halved)


def shaken(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` versions of what a layer returned `(1 …)`, with every entry changed: the last so much that thresholds are crossed."""
    factors = torch.rand((count, *x.shape[1:]), generator=generator, device="cpu").to(x.device) + 0.5
    factors[-1] *= 0.1
    size = x.abs().max()
    noise = torch.randn(factors.shape, generator=generator, device="cpu").to(x.device)
    return (x * factors + 0.1 * noise * size.where(size > 0, 1)).to(x.dtype)
