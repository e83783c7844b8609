"""Attributions, named: a number for every entry of every explained input."""

from collections.abc import Mapping
from typing import Literal

import torch
from einops import reduce
from torch import Tensor

from multicam.call.inputs import frames_second
from multicam.errors import MulticamError, unknown
from multicam.maps import Maps

Channels = Literal["sum", "max", "norm"]


class Attributions(dict[str, Tensor]):
    """One tensor per input, each of the input's own shape.

    A plain dict otherwise, which knows what its numbers mean.

    Attributes:
        scores: What was explained, `(b)`.
        weights: How much an entry of each input counts in the evidence, so that its weighted sum is in units of the
            score; None where the numbers are of another kind (gradients, say) and those of two inputs do not compare.
        change: The score less that of the baseline `(b)`, which all evidence together should be; None where there is no
            such thing.

    Raises:
        MulticamError: If a number is NaN or infinite.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        scores: Tensor,
        *,
        weights: Mapping[str, float] | None = None,
        change: Tensor | None = None,
    ) -> None:
        for name, x in values.items():
            if not torch.isfinite(x).all():
                raise MulticamError(
                    f"the attribution of input {name!r} is NaN or infinite in sample {int((~torch.isfinite(x)).nonzero()[0, 0])}: the "
                    "input, its baseline or a gradient is, or numbers overflow"
                )
        super().__init__(values)
        self.scores, self.weights, self.change = scores, weights, change

    @property
    def comparable(self) -> bool:
        """Whether evidence in one input may be compared with evidence in another."""
        return self.weights is not None

    @property
    def evidence(self) -> dict[str, Tensor]:
        """The evidence in each input, in units of the score: `(b)`.

        Raises:
            MulticamError: If the numbers are not in units of the score.
        """
        if self.weights is None:
            raise MulticamError("these attributions are not in units of the score, so they do not add up to evidence")
        return {name: self.weights[name] * values.reshape(len(values), -1).sum(1) for name, values in self.items()}

    @property
    def error(self) -> Tensor:
        """How far all evidence together is from `change`, as a share of it: `(b)`, 0 is complete.

        Raises:
            MulticamError: If there is no change to compare with.
        """
        if self.change is None:
            raise MulticamError(
                "these attributions are not measured against a baseline, so nothing says what they should add up to"
            )
        missing = (torch.stack(list(self.evidence.values())).sum(0) - self.change).abs()
        return torch.where(missing == 0, missing, missing / self.change.abs())

    def maps(self, channels: Channels | None = None) -> Maps:
        """One map for each input that has places: `(b h w)`, `(b t h w)` or `(b l)`.

        Args:
            channels: `"sum"` of the evidence in each place, a density in units of the score like the maps of a `CAM`;
                `"max"`, the largest absolute value of the channels (Simonyan et al. 2013, arXiv:1312.6034, section 3.1), or
                `"norm"`, their Euclidean norm, neither of which compares between inputs. None: the sum if the
                numbers are in units of the score, else the largest.

        Raises:
            MulticamError: If there is no such way.

        Example:
            >>> values = {"rgb": torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]])}
            >>> Attributions(values, torch.zeros(1)).maps()["rgb"]
            tensor([[[3., 2.]]])
            >>> Attributions(values, torch.zeros(1), weights={"rgb": 1.0}).maps()["rgb"]
            tensor([[[ 8., -4.]]])
        """
        channels = channels or ("sum" if self.comparable else "max")
        ways = {"sum": self._density, "max": _largest, "norm": _norm}
        if channels not in tuple(ways):
            raise unknown("way to reduce channels", channels, ways)
        maps = {name: ways[channels](name, channels_second(x)) for name, x in self.items() if x.ndim > 2}
        return Maps(maps, self.comparable and channels == "sum")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {tuple(values.shape)}" for name, values in self.items())
        return f"Attributions({shown}, comparable={self.comparable})"

    def _density(self, name: str, values: Tensor) -> Tensor:
        on_grid = reduce(values, "b c ... -> b ...", "sum")
        return on_grid if self.weights is None else on_grid * (self.weights[name] * on_grid[0].numel())


def _largest(_: str, values: Tensor) -> Tensor:
    return reduce(values.abs(), "b c ... -> b ...", "max")


def _norm(_: str, values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=1)
    return norms


def channels_second(values: Tensor) -> Tensor:
    """An image, clip or signal with its channels on the second axis: a clip `(b t c h w)` as `(b c t h w)`."""
    return frames_second(values) if values.ndim == 5 else values
