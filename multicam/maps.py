"""Maps, named: the result of explaining several inputs at once."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

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

    def shares(self) -> Tensor:
        """Each sample's positive evidence per map as a share of all of it: `(b k)` in the order of the keys.

        A map is a density, so its mean is the evidence found on that input. A sample without any positive evidence
        has shares of zero.

        Example:
            >>> import torch
            >>> Maps({"rgb": torch.full((1, 2, 2), 3.0), "depth": torch.full((1, 4, 4), 1.0)}).shares()
            tensor([[0.7500, 0.2500]])
        """
        mass = torch.stack([m.clamp(min=0).flatten(1).mean(1) for m in self.values()], dim=1)
        total = mass.sum(1, keepdim=True)
        return mass / total.where(total > 0, 1)


def resized(maps: Float[Tensor, "b *grid"], size: Sequence[int]) -> Float[Tensor, "b *size"]:
    """Maps of one to three axes at another size, linear between the middles of their cells.

    Example:
        >>> resized(torch.tensor([[0.0, 1.0]]), [4])
        tensor([[0.0000, 0.2500, 0.7500, 1.0000]])
    """
    return F.interpolate(maps[:, None], tuple(size), mode=_MODES[len(size)], align_corners=False)[:, 0]
