"""What every companion of a photo has in common: its checks, and its place in the list."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from multicam.errors import MulticamError, unknown

Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Modality:
    """A companion's function with its default options, and two facts about what it gives.

    Attributes:
        make: From photos `(b c h w)` to the companion `(b k h w)`, or half as high and wide.
        aligned: Whether pixel `(i, j)` still describes place `(i, j)` of the photo, at full or half size, so that a map
            of the companion can be laid over the photo. A spectrum is not aligned: its axes are frequencies. Where a
            companion is made through a spectrum, a change of the photo shows at its place and, weakly, everywhere.
        differentiable: Whether gradients reach the photo through it.
    """

    make: Callable[[Tensor], Tensor]
    aligned: bool
    differentiable: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The companion of the photos `x`."""
        return self.make(x)


MODALITIES: dict[str, Modality] = {}


def modality(name: str) -> Modality:
    """The modality of that name.

    Raises:
        MulticamError: There is no such modality.

    Example:
        >>> modality("haar").aligned, modality("dct").aligned
        (True, False)
    """
    if name not in MODALITIES:
        raise unknown("modality", name, MODALITIES)
    return MODALITIES[name]


def grey(x: Tensor) -> Tensor:
    """The luma `(b 1 h w)` of photos `(b c h w)`: .299 R + .587 G + .114 B (ITU-R BT.601); grey photos as they are.

    Raises:
        MulticamError: `x` is not a batch of photos in 0..1.

    Example:
        >>> import torch
        >>> grey(torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2))[0, 0, 0, 0]
        tensor(0.3560)
    """
    check(x)
    if x.shape[1] == 1:
        return x
    # Elementwise: einsum rounds equal pixels differently at times, and local binary patterns would see texture there.
    r, g, b = x.chunk(3, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def check(x: Tensor) -> None:
    """Refuse what is no batch of photos in 0..1."""
    if x.dtype not in (torch.float32, torch.float64):
        raise MulticamError(
            f"photos are float32 or float64 in 0..1, got {x.dtype}: "
            "x.float() for half precision, x.float() / 255 for 8-bit values"
        )
    shape = tuple(x.shape)
    if x.ndim != 4:
        raise MulticamError(f"photos are (b c h w), got shape {shape}: x[None] adds the batch axis to one photo")
    if x.shape[1] not in (1, 3):
        raise MulticamError(
            f"photos (b c h w) have 1 or 3 channels, got shape {shape}: channels-last photos need x.permute(0, 3, 1, 2)"
        )
    if min(x.shape[2:]) < 2 or not len(x):
        raise MulticamError(f"got shape {shape}: at least one photo of at least 2 x 2 pixels is needed")
    low, high = (value.item() for value in x.detach().aminmax())
    # Wide enough for interpolation overshoot and added noise; photos on another scale fall outside. NaN fails too.
    if not (low >= -1 and high <= 2):
        raise MulticamError(
            f"photos lie in 0..1, got values from {low:.4g} to {high:.4g}: divide 8-bit values by 255, and compute "
            "companions before the mean and standard deviation are taken off"
        )


def companion(*, aligned: bool, differentiable: bool) -> Callable[[Function], Function]:
    """A decorator that lists a function in `MODALITIES` and checks its photos."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def checked(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            check(x)
            # Models that make their companions themselves do it under autocast, which would halve the precision.
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *args, **kwargs)

        MODALITIES[function.__name__] = Modality(checked, aligned, differentiable)
        return cast(Function, checked)

    return register
