"""How the pixels of an optimised image are written, and moved, so that gradient ascent finds a picture and not noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from multicam.errors import MulticamError


@dataclass(frozen=True)
class Parameterization:
    """What is optimised instead of the pixels of an image.

    Attributes:
        shape: The shape of one image's parameters.
        pixels: From parameters `(n *shape)` to pixels `(n c h w)`. Standard normal parameters give pixels of mean 0 and
            variance 1, so that a step means the same in every parameterisation and at every size.
    """

    shape: tuple[int, ...]
    pixels: Callable[[Tensor], Float[Tensor, "n c h w"]]


def pixel(example: Float[Tensor, "b c h w"]) -> Parameterization:
    """The pixels themselves.

    Example:
        >>> pixel(torch.rand(1, 3, 8, 8)).shape
        (3, 8, 8)
    """
    return Parameterization(tuple(example.shape[1:]), lambda parameters: parameters)


def fourier(example: Float[Tensor, "b c h w"]) -> Parameterization:
    """The Fourier coefficients, each divided by its frequency, of channels that are made independent.

    In natural images amplitudes fall with frequency and channels go together. Written this way, each parameter has an
    effect of the size that it has in such images, and gradient ascent does not run into high frequencies first. Olah et
    al. 2017, "Feature Visualization", distill.pub, section "Preconditioning and Parameterization". There the colours of
    ImageNet are built in; here the root of the correlation matrix of the example's own channels takes their place, so any
    number of channels will do.

    Example:
        >>> parameterization = fourier(torch.rand(1, 3, 8, 8))
        >>> parameterization.shape, parameterization.pixels(torch.randn(2, 3, 8, 5, 2)).shape
        ((3, 8, 5, 2), torch.Size([2, 3, 8, 8]))
    """
    c, h, w = example.shape[1:]
    frequencies = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None])
    amplitudes = 1 / frequencies.clamp(min=1 / max(h, w))
    halves = torch.full((w // 2 + 1,), 4.0)  # what a unit of power adds to the variance of the pixels
    halves[:: w if w % 2 else w // 2] = 1.0  # these columns have no other half
    amplitudes *= ((h * w) / (amplitudes.square() * halves).sum()).sqrt()
    kept = amplitudes[..., None].to(example)
    together = _root(_correlation(example))

    def pixels(parameters: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(parameters * kept)
        return torch.einsum("d c, n c h w -> n d h w", together, torch.fft.irfft2(spectrum, (h, w), norm="ortho"))

    return Parameterization((c, h, w // 2 + 1, 2), pixels)


PARAMETERIZATIONS = {"fourier": fourier, "pixel": pixel}


def _correlation(example: Float[Tensor, "b c h w"]) -> Float[Tensor, "c c"]:
    """How the channels go together; a twentieth of independence keeps every colour within reach."""
    x = example.movedim(1, 0).flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    return (0.95 * x @ x.mT).fill_diagonal_(1)


def _root(matrix: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root


@dataclass(frozen=True)
class Bounds:
    """The range of each channel `(c 1 1)`."""

    low: Float[Tensor, "c 1 1"]
    high: Float[Tensor, "c 1 1"]

    @classmethod
    def of(cls, bounds: tuple[Any, Any] | None, example: Float[Tensor, "b c h w"]) -> "Bounds":
        """The range that the caller gave, as numbers or one value for each channel; None: that of the example.

        Raises:
            MulticamError: They are no bounds, or the example is constant.
        """
        if bounds is None:
            low, high = example.amin((0, 2, 3)), example.amax((0, 2, 3))
            if not (low < high).any():
                raise MulticamError(
                    "the example input is constant, which says nothing about the range of its values; give bounds=(low, high)"
                )
        else:
            try:
                low, high = (torch.as_tensor(bound).to(example).flatten().expand(example.shape[1]) for bound in bounds)
            except (TypeError, ValueError, RuntimeError):
                low = high = example.new_zeros(1)
            if not ((low <= high).all() and (low < high).any()):
                raise MulticamError(
                    f"bounds are (low, high), each a number or one value for each of the {example.shape[1]} channels, with "
                    f"low below high; not {bounds!r}"
                )
        return cls(low[:, None, None], high[:, None, None])

    def at(self, shares: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """The values that lie this far between low (0) and high (1)."""
        return torch.lerp(self.low, self.high, shares)

    def shares(self, values: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """The inverse of `at`; 0 in a channel without a range."""
        return (values - self.low) / torch.where(self.high > self.low, self.high - self.low, 1)


@dataclass(frozen=True)
class Motion:
    """Small random moves of an image, which what is found has to survive.

    Attributes:
        jitter: The largest translation, in whole pixels, as a share of the side.
        scale: The largest change of size, as a share of it.
        rotate: The largest rotation, in degrees.
    """

    jitter: float
    scale: float
    rotate: float

    def __call__(self, images: Float[Tensor, "n c h w"], generator: Generator) -> Float[Tensor, "n c h w"]:
        """All images moved alike by one resampling; what comes in at the border is mirrored."""
        if not (self.jitter or self.scale or self.rotate):
            return images
        h, w = images.shape[-2:]
        down, right, larger, turn = (2 * torch.rand(4, generator=generator) - 1).tolist()
        zoom, angle = 1 + self.scale * larger, math.radians(self.rotate * turn)
        dy, dx = (2 * round(self.jitter * side * by) / side for side, by in ((h, down), (w, right)))
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        theta = torch.tensor([[[cos, -sin * h / w, dx], [sin * w / h, cos, dy]]]).to(images)
        places = F.affine_grid(theta, [1, 1, h, w], align_corners=False).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, places, padding_mode="reflection", align_corners=False)


def total_variation(images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """The mean absolute difference of neighbouring pixels, along both axes together, of each image.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([1.])
    """
    differences = [images.diff(dim=axis).abs().flatten(1) for axis in (2, 3)]
    return sum((d.mean(1) for d in differences if d.shape[1]), start=images.new_zeros(len(images)))
