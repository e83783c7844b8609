"""Normal noise that belongs to a key: the same for every sample and every size of a batch, whatever else is random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from multicam.errors import MulticamError


def seeded(*key: int) -> torch.Generator:
    """A generator of random numbers on the CPU that belong to a key: a seed, and what tells its draws apart.

    Raises:
        MulticamError: If the seed is no whole number.

    Example:
        >>> torch.equal(torch.rand(2, generator=seeded(0, 1)), torch.rand(2, generator=seeded(0, 1)))
        True
    """
    seed = 0
    for part in key:
        if not hasattr(part, "__index__"):
            raise MulticamError(f"seed must be a whole number, not {part!r}")
        seed = (seed * 1_000_003 + int(part)) % 2**63
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], key: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of a shape, on the CPU; the global random state is not used.

    Example:
        >>> torch.equal(normal((2, 3), (0, 1)), normal((2, 3), (0, 1)))
        True
    """
    return torch.randn(tuple(shape), generator=seeded(*key), dtype=dtype, device="cpu")


def spread(leaf: Tensor) -> Tensor:
    """The range of values of each sample, on axes that broadcast against the input `(b …)`; of complex ones, of their size.

    Example:
        >>> spread(torch.tensor([[1.0, 4.0], [2.0, 2.0]]))
        tensor([[3.],
                [0.]])
    """
    flat = (leaf.abs() if leaf.is_complex() else leaf).reshape(len(leaf), -1)
    return (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (leaf.ndim - 1))
