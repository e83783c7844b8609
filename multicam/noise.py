"""Normal noise that belongs to a key: the same for every sample and every size of a batch, whatever else is random."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], key: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of a shape, on the CPU; the global random state is not used.

    Example:
        >>> torch.equal(normal((2, 3), (0, 1)), normal((2, 3), (0, 1)))
        True
    """
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**63
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device="cpu")


def spread(leaf: Tensor) -> Tensor:
    """The range of values of each sample, on axes that broadcast against the input `(b …)`; of complex ones, of their size.

    Example:
        >>> spread(torch.tensor([[1.0, 4.0], [2.0, 2.0]]))
        tensor([[3.],
                [0.]])
    """
    flat = (leaf.abs() if leaf.is_complex() else leaf).flatten(1)
    return (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (leaf.ndim - 1))
