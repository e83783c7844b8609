"""How sure a mean over samples is."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError, at_least_one


def mean_interval(
    values: Float[Tensor, "n *k"], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*k"], Float[Tensor, "*k"]]:
    """The ends of the interval in which the mean over `n` samples lies, by a percentile bootstrap over the samples.

    All quantities are resampled together, so those of one sample stay together. Efron 1979; of one sample both ends are its value.

    Args:
        values: Any quantities `(*k)` of each sample.
        confidence: Of the interval.
        resamples: How often `n` samples are drawn, with replacement.
        seed: Of the draws; the global random state is not used.

    Raises:
        MulticamError: If there is no such confidence, or no resample.

    Example:
        >>> low, high = mean_interval(torch.arange(100.0))
        >>> 43 < low < 44, 55 < high < 56
        (tensor(True), tensor(True))
    """
    if not 0 < confidence < 1:
        raise MulticamError(f"confidence lies between 0 and 1, not {confidence!r}")
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    # One at a time: the draws of all resamples would be a large tensor for a data set.
    means = torch.stack(
        [
            values[torch.randint(n, (n,), generator=generator, device="cpu")].mean(0)
            for _ in range(at_least_one("resamples", resamples))
        ]
    )
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=means.dtype, device=means.device)
    low, high = means.quantile(tails, dim=0)
    return low, high


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


def value_range(leaf: Tensor) -> Tensor:
    """The range of values of each sample, on axes that broadcast against the input `(b …)`; of complex ones, of their size.

    Example:
        >>> value_range(torch.tensor([[1.0, 4.0], [2.0, 2.0]]))
        tensor([[3.],
                [0.]])
    """
    flat = (leaf.abs() if leaf.is_complex() else leaf).reshape(len(leaf), -1)
    return (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (leaf.ndim - 1))
