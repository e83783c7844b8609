"""Does a map point where it should, and is it sharp: measures of maps alone, which run no model."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multicam.errors import MulticamError
from multicam.maps import shares


def pointing_game(maps: Float[Tensor, "b h w"], regions: Bool[Tensor, "..."]) -> Bool[Tensor, " b"]:
    """Whether the peak of each map lies in its region. Zhang et al. 2016, arXiv:1608.00507, section 4.1, without a margin.

    Of several equal peaks all must lie inside, so that an even map never hits.

    Args:
        maps: The maps.
        regions: The regions, as masks of the same size.

    Raises:
        MulticamError: If the sizes differ, or a region is empty.

    Example:
        >>> region = torch.tensor([[[True, False]]])
        >>> pointing_game(torch.tensor([[[2.0, 1.0]]]), region), pointing_game(torch.tensor([[[1.0, 1.0]]]), region)
        (tensor([True]), tensor([False]))
    """
    _check(maps, regions)
    flat = maps.flatten(1)
    peaks = flat == flat.amax(1, keepdim=True)
    return peaks.any(1) & ~(peaks & ~regions.flatten(1)).any(1)  # a map with NaN has no peak


def energy_inside(maps: Float[Tensor, "b h w"], regions: Bool[Tensor, "..."]) -> Float[Tensor, " b"]:
    """The share of each map's positive evidence that lies in its region; zero for an empty map.

    Wang et al. 2020, arXiv:1910.01279, section 4.3, the energy-based pointing game.

    Args:
        maps, regions: As for `pointing_game`.

    Raises:
        MulticamError: As for `pointing_game`.

    Example:
        >>> energy_inside(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.7500])
    """
    _check(maps, regions)
    flat = maps.flatten(1).clamp(min=0)
    total = flat.sum(1)
    return (flat * regions.flatten(1)).sum(1) / total.where(total > 0, 1)


def names_input(maps: Mapping[str, Tensor], truth: str | Sequence[str]) -> Bool[Tensor, " b"]:
    """Whether the largest of the maps of each sample, by its positive evidence, is that of the input that is the `truth`.

    A map is a density, so its mean is the evidence on its input; this asks of maps that compare which input they name.

    Args:
        maps: The maps by input `(b h w)`.
        truth: The input that holds the evidence, or one for each sample.

    Raises:
        MulticamError: If there is no such map, or not one name for each sample.

    Example:
        >>> maps = {"rgb": torch.ones(2, 2, 2), "depth": 2 * torch.ones(2, 4, 4)}
        >>> names_input(maps, "depth"), names_input(maps, ["depth", "rgb"])
        (tensor([True, True]), tensor([ True, False]))
    """
    names = list(maps)
    mass = torch.stack([m.clamp(min=0).flatten(1).mean(1) for m in maps.values()], 1)
    truths = [truth] * len(mass) if isinstance(truth, str) else list(truth)
    if len(truths) != len(mass):
        raise MulticamError(f"{len(truths)} names of inputs for {len(mass)} samples; give one, or one for each sample")
    for name in truths:
        if name not in maps:
            raise MulticamError(f"there is no map of input {name!r}; there are: {', '.join(map(repr, maps))}")
    named = torch.tensor([[name == true for name in names] for true in truths], device=mass.device)
    own = mass[named]
    return (own > 0) & (mass < own[:, None]).logical_or(named).all(1)


def sparseness(maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The Gini index of each map's absolute values: 0 if all are alike, near 1 if one place holds everything.

    Chalasani et al. 2020, arXiv:1810.06583, section 5.

    Args:
        maps: As for `pointing_game`.

    Example:
        >>> sparseness(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]))
        tensor([0.0000, 0.5000])
    """
    rising = _shares(maps).sort(1).values
    n = rising.shape[1]
    ranks = torch.arange(1, n + 1, device=maps.device)
    return ((2 * ranks - n - 1) * rising).sum(1) / n


def complexity(maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The entropy of each map's absolute values as shares of their sum, in nats: 0 if one place holds everything.

    Bhatt et al. 2020, arXiv:2005.00631, definition 4.

    Args:
        maps: As for `pointing_game`.

    Example:
        >>> complexity(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]))
        tensor([0.6931, 0.0000])
    """
    entropy: Tensor = torch.special.entr(_shares(maps)).sum(1)
    return entropy


def _shares(maps: Float[Tensor, "b *grid"]) -> Float[Tensor, "b n"]:
    """The size of each place's share, see `multicam.maps.shares`; zero in an empty map."""
    return shares(maps.flatten(1)).abs()


def agreement(maps: Float[Tensor, "b *grid"], others: Float[Tensor, "..."]) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of two maps of each sample, from -1 to 1; equal values share their mean rank.

    Zero where a map is the same everywhere, which agrees with nothing. Adebayo et al. 2018, arXiv:1810.03292, compare maps of a trained
    and of a randomised model in this way.

    Args:
        maps: The maps of one method, or model.
        others: Those of another.

    Raises:
        MulticamError: If their shapes differ.

    Example:
        >>> agreement(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[10.0, 20.0, 50.0]]]))
        tensor([1.])
    """
    if maps.shape != others.shape:
        raise MulticamError(f"maps of one shape can agree, not {tuple(maps.shape)} and {tuple(others.shape)}")
    return correlation(*(_mean_ranks(m.flatten(1).double()) for m in (maps, others)))


def correlation(values: Float[Tensor, "b n"], others: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Pearson's correlation of two rows of each sample; zero where either is the same everywhere.

    Args:
        values: The numbers of one kind.
        others: Those of another.

    Example:
        >>> correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 7.0, 5.0]]))
        tensor([-1.])
    """
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (values, others))
    sizes = a.norm(dim=1) * b.norm(dim=1)
    found: Tensor = (a * b).sum(1) / sizes.where(sizes > 0, 1)
    return found.float()


def _mean_ranks(values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """For each value the mean of the first and the last rank that it could have."""
    ordered = values.sort(1).values
    first = torch.searchsorted(ordered, values.contiguous(), side="left")
    last = torch.searchsorted(ordered, values.contiguous(), side="right")
    return (first + last - 1).double() / 2


def _check(maps: Tensor, regions: Tensor) -> None:
    if maps.shape != regions.shape:
        raise MulticamError(f"the regions {tuple(regions.shape)} are not as large as the maps {tuple(maps.shape)}")
    empty = ~regions.flatten(1).any(1)
    if empty.any():
        raise MulticamError(f"the region of sample {int(empty.nonzero()[0])} is empty: nothing can point into it")
