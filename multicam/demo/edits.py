"""The edits that the demo's detector finds, and crops that have one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Generator, Tensor

from multicam.demo.photos import SIDE, VIEWS, crop_of, photo
from multicam.errors import MulticamError, unknown

CLASSES: tuple[str, ...] = ("colour", "frequency", "texture")  # what the three logits say was edited


def neighbours(x: Float[Tensor, "b c h w"], axis: int) -> tuple[Tensor, Tensor]:
    """The pixels before and after each one along an axis, mirrored at the border."""
    size = x.shape[axis]
    padded = F.pad(x, (1, 1, 0, 0) if axis == 3 else (0, 0, 1, 1), mode="reflect")
    return padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)


def smoothed(x: Float[Tensor, "b c h w"], axis: int) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (1 2 1) / 4 along an axis."""
    before, after = neighbours(x, axis)
    return (before + 2 * x + after) / 4


def blurred(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (1 2 1) / 4 along both axes."""
    return smoothed(smoothed(x, 3), 2)


# The edits. All of them work on crops (b 3 128 128) with values 0..255 and draw from a generator.

YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JFIF
RGB: Tensor = torch.linalg.inv(YCC)


def to_ycc(crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Luma and the two chroma channels, chroma around zero."""
    return (YCC @ crops.flatten(2)).view_as(crops)


def to_rgb(ycc: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The inverse of `to_ycc`."""
    return (RGB @ ycc.flatten(2)).view_as(ycc)


def uniform(generator: Generator, n: int, low: float, high: float) -> Float[Tensor, "n 1 1 1"]:
    """One number between `low` and `high` for each of `n` crops."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def turned(ycc: Float[Tensor, "b 3 h w"], angle: Tensor) -> Float[Tensor, "b 3 h w"]:
    """The same luma with every hue turned by `angle`."""
    y, cb, cr = ycc.chunk(3, dim=1)
    return torch.cat([y, angle.cos() * cb - angle.sin() * cr, angle.sin() * cb + angle.cos() * cr], dim=1)


def recolour(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of colour: hues turned and chroma shifted, luma kept."""
    n = len(crops)
    angle = uniform(generator, n, 0.7, 2 * math.pi - 0.7)
    toward, far = uniform(generator, n, 0.0, 2 * math.pi), uniform(generator, n, 15.0, 32.0)
    shift = torch.cat([torch.zeros_like(far), far * toward.cos(), far * toward.sin()], dim=1)
    return to_rgb(turned(to_ycc(crops), angle) + shift)


def add_lattice(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of frequency: a faint lattice of period 2, as some upsampling leaves: rows, columns or a chequerboard."""
    n = len(crops)
    sign = 1.0 - 2 * (torch.arange(SIDE) % 2)
    rows, columns = sign[:, None].expand(SIDE, SIDE), sign[None].expand(SIDE, SIDE)
    kinds = torch.stack([rows, columns, rows * columns])[:, None]
    return crops + kinds[torch.randint(3, (n,), generator=generator)] * uniform(generator, n, 2.5, 5.0)


def add_grain(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of texture: fine grain on the luma."""
    noise = torch.randn(len(crops), 1, SIDE, SIDE, generator=generator)
    return crops + (noise - blurred(noise)) * uniform(generator, len(crops), 14.0, 22.0)


Edit = Callable[[Generator, Float[Tensor, "b 3 h w"]], Float[Tensor, "b 3 h w"]]
EDITS: dict[str, Edit] = dict(zip(CLASSES, (recolour, add_lattice, add_grain), strict=True))


def regions(generator: Generator, n: int) -> Float[Tensor, "n 1 128 128"]:
    """Soft masks: `n` blobs of a sixteenth to a sixth of a crop, feathered over 2 to 6 pixels, 1 inside."""
    radius = SIDE * (uniform(generator, n, 1 / 16, 1 / 6) / math.pi).sqrt()
    aspect, tilt = uniform(generator, n, -0.25, 0.25).exp(), uniform(generator, n, 0.0, 2 * math.pi)
    place = torch.arange(SIDE) + 0.5
    dx = place - radius - (SIDE - 2 * radius) * uniform(generator, n, 0.0, 1.0)
    dy = place[:, None] - radius - (SIDE - 2 * radius) * uniform(generator, n, 0.0, 1.0)
    u = (dx * tilt.cos() + dy * tilt.sin()) * aspect
    v = (dy * tilt.cos() - dx * tilt.sin()) / aspect
    around = torch.atan2(v, u)
    two, three = (uniform(generator, n, 0.0, 2 * math.pi) for _ in range(2))
    edge = radius * (1 + 0.15 * (2 * around + two).sin() + 0.12 * (3 * around + three).sin())
    return ((edge - torch.hypot(u, v)) / uniform(generator, n, 2.0, 6.0) + 0.5).clamp(0, 1)


def edited(
    generator: Generator, crops: Float[Tensor, "b 3 h w"], edit: Edit, region: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 3 h w"]:
    """The crops with one edit inside the region, rounded as an 8-bit file would be."""
    return torch.lerp(crops, edit(generator, crops), region).round().clamp(0, 255)


@dataclass(frozen=True)
class Sample:
    """An edited crop and the truth about it.

    Attributes:
        image: The crop; `inputs_of(image)` makes the model's inputs of it.
        regions: Where each kind of edit was made, by class.
    """

    image: UInt8[np.ndarray, "128 128 3"]
    regions: dict[str, Bool[Tensor, "128 128"]]


def sample(
    name: str, edits: Sequence[str] = CLASSES, *, corner: tuple[int, int] | None = None, seed: int = 0
) -> Sample:
    """A crop of a named photo with one edit of each kind in `edits`, in disjoint regions; the same for the same `seed`.

    Args:
        name: A photo of `PHOTOS`.
        edits: Classes out of `CLASSES`; none of them leaves the photo as it is.
        corner: Row and column of the crop's top left pixel; None takes that of `VIEWS`, or the middle of the photo.
        seed: Decides about regions and edits.

    Raises:
        MulticamError: There is no such photo or class, or the crop reaches beyond the photo.

    Example:
        >>> edited = sample("chelsea", ["colour", "texture"])
        >>> edited.image.shape, list(edited.regions)
        ((128, 128, 3), ['colour', 'texture'])
    """
    for edit in edits:
        if edit not in EDITS:
            raise unknown("edit", edit, EDITS)
    image = photo(name)
    if corner is None:
        corner = VIEWS.get(name)
    if corner is not None:
        top, left = corner
        if not (0 <= top <= image.shape[0] - SIDE and 0 <= left <= image.shape[1] - SIDE):
            raise MulticamError(f"a crop of {SIDE} pixels at {corner} reaches beyond {name!r}, {image.shape[:2]}")
        image = image[top : top + SIDE, left : left + SIDE]
    crops = rearrange(torch.from_numpy(crop_of(image).copy()), "h w c -> 1 c h w").float()
    generator = Generator().manual_seed(seed)
    blobs = regions(generator, len(edits))
    while blobs.gt(0).sum(0).gt(1).any():
        blobs = regions(generator, len(edits))
    for edit, blob in zip(edits, blobs, strict=True):
        crops = edited(generator, crops, EDITS[edit], blob[None])
    return Sample(
        rearrange(crops, "1 c h w -> h w c").byte().numpy(),
        {edit: blob[0] > 0.5 for edit, blob in zip(edits, blobs, strict=True)},
    )
