"""Maps, named: the result of explaining several inputs at once."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of axes


class Maps(dict[str, Tensor]):
    """One map per name, each `(b h w)` (or `(b d h w)`, `(b l)`), in units of the score.

    A plain dict otherwise. `comparable` tells whether the numbers of one map may be compared with those of
    another: pictures then share one scale, so that an input the model ignored looks ignored.
    """

    def __init__(self, maps: Mapping[str, Tensor], comparable: bool = True) -> None:
        super().__init__(maps)
        self.comparable = comparable

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}: {tuple(m.shape)} mean {m.mean().item():.4g} max {m.max().item():.4g}" for name, m in self.items()
        )
        return f"Maps({shown}, comparable={self.comparable})"

    def on_one_scale(self) -> "Maps":
        """The maps; several that do not compare each divided by the mean of its absolute values, so that all inputs count alike.

        Example:
            >>> import torch
            >>> maps = Maps({"rgb": torch.full((1, 2, 2), 3.0), "depth": torch.full((1, 4, 4), 1.0)}, comparable=False)
            >>> [m.mean().item() for m in maps.on_one_scale().values()]
            [1.0, 1.0]
        """
        if self.comparable or len(self) == 1:
            return self
        sizes = {name: m.abs().flatten(1).mean(1).view(-1, *[1] * (m.ndim - 1)) for name, m in self.items()}
        return Maps({name: m / sizes[name].where(sizes[name] > 0, 1) for name, m in self.items()}, comparable=False)

    @property
    def signed(self) -> bool:
        """Whether a value is below zero; in maps that were cut at zero none is, and they hold the positive evidence only.

        Example:
            >>> import torch
            >>> Maps({"rgb": torch.ones(1, 2, 2)}).signed, Maps({"rgb": -torch.ones(1, 2, 2)}).signed
            (False, True)
        """
        return any(bool((m < 0).any()) for m in self.values())

    def shares(self) -> Float[Tensor, "b k"]:
        """Each input's share of the evidence, with its sign, in the order of the keys; see `multicam.maps.shares`.

        A map is a density, so its mean is the evidence found on that input. Of maps that were cut at zero, the shares are those
        of the positive evidence.

        Raises:
            MulticamError: If the maps do not compare, or are not finite.

        Example:
            >>> import torch
            >>> Maps({"rgb": torch.full((1, 2, 2), 3.0), "depth": torch.full((1, 4, 4), -1.0)}).shares()
            tensor([[ 0.7500, -0.2500]])
        """
        if not self.comparable and len(self) > 1:
            raise MulticamError(
                f"the maps of {', '.join(map(repr, self))} do not compare (comparable is False), so none has a share of all: take a "
                "method whose maps are in units of the score, such as HiResCAM"
            )
        for name, m in self.items():
            bad = ~torch.isfinite(m).flatten(1).all(1)
            if bad.any():
                raise MulticamError(f"the map {name!r} has NaN or infinite values in sample {int(bad.nonzero()[0])}")
        return shares(torch.stack([_evidence(m) for m in self.values()], dim=1))


def shares_of(methods: Mapping[str, Maps], quantity: str = "evidence") -> str:
    """What the percentages beside maps are parts of, in words; nothing where there are no maps.

    Args:
        methods: The maps of each method.
        quantity: What the maps hold.

    Example:
        >>> import torch
        >>> shares_of({"GradCAM": Maps({"rgb": torch.ones(1, 2, 2)})})
        'percentages are shares of the positive evidence'
    """
    wholes = {False: f"of the positive {quantity}", True: f"of the {quantity}, with its sign"}
    of = {whole: [name for name, maps in methods.items() if maps.signed == signed] for signed, whole in wholes.items()}
    said = [whole + f" ({', '.join(names)})" * all(of.values()) for whole, names in of.items() if names]
    return f"percentages are shares {' and '.join(said)}" if said else ""


def _evidence(m: Float[Tensor, "b *size"]) -> Float[Tensor, " b"]:
    """The mean of each map; zero where what cancels leaves no more than the rounding of its values."""
    flat = m.flatten(1).double()
    mean, rounding = flat.mean(1), torch.finfo(m.dtype).eps * flat.abs().mean(1)
    return mean.where(mean.abs() > rounding, 0).to(m)


def shares(amounts: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """What each of `k` brings, divided by the sum of the absolute values of all, with its sign.

    Whatever the library calls a share of inputs or regions, in tables, captions and files, is this number. The sizes of all
    shares add up to one; where nobody brings anything, all are zero.

    Args:
        amounts: What each brings, such as the evidence found on each input, or the Shapley values.

    Raises:
        MulticamError: If an amount is NaN or infinite.

    Example:
        >>> import torch
        >>> shares(torch.tensor([[0.03, -0.39], [0.0, 0.0]]))
        tensor([[ 0.0714, -0.9286],
                [ 0.0000,  0.0000]])
    """
    if not torch.isfinite(amounts).all():
        raise MulticamError(f"what is NaN or infinite has no share: {amounts.tolist()}")
    exact = amounts.double()  # the sum of large numbers is infinite in single precision
    total = exact.abs().sum(-1, keepdim=True)
    return (exact / total.where(total > 0, 1)).to(amounts)


def resized(maps: Float[Tensor, "b *grid"], size: Sequence[int]) -> Float[Tensor, "b *size"]:
    """Maps of one to three axes at another size, linear between the middles of their cells.

    Example:
        >>> resized(torch.tensor([[0.0, 1.0]]), [4])
        tensor([[0.0000, 0.2500, 0.7500, 1.0000]])
    """
    return F.interpolate(maps[:, None], tuple(size), mode=_MODES[len(size)], align_corners=False)[:, 0]
