"""Saliency enhancing with scaling and sliding: the maps of many enlarged parts, put back together."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import floor
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multicam.call.targets.scores import ClassScore, Probability
from multicam.cam.base import CAM, L
from multicam.cam.wrappers import FinerContrast, Moving, at_most_one
from multicam.errors import MulticamError
from multicam.maps import Maps, resized
from multicam.printing import progress
from multicam.watch.finite import How
from multicam.watch.trace import Trace

SCALES = tuple(1 + 2 * i / 7 for i in range(12))  # the paper's: 224, 288 … pixels for a model of 224
RADIUS, SIGMA = 5, 5.0  # of the final blur, in pixels, as in pytorch-grad-cam
CUT = How("enlarged and cut", "the model is not defined there; take other scales=…, or the CAM as it is")
ROUNDING = 1e-4  # less than this next to a window is what interpolation leaves there, not evidence
Corner = tuple[float, float]


class SESS(Moving[L]):
    """SESS: the inputs are enlarged to several scales and cut into windows of their own size, whose maps are fused.

    `map = mean over windows p of w_p CAM(p) / max |CAM(p)|`, each put back where it was cut, over the windows in which a
    pixel has evidence; `w_p` is the probability of the class in the window, or the score cut at zero where the target
    is not a class. Tursun et al. 2022, arXiv:2207.01769. Small and repeated objects fill a window of their own. Takes
    122 passes with the default scales, `batch_size` of them at once; the scale of the map means nothing.

    Args:
        cam: The CAM to refine.
        inputs: The image inputs that are pictures of one scene, and enlarged and cut together; all else stays as it is,
            and maps on it are averaged over the windows. Needed where there are several image inputs.
        scales: How many times larger; each at least 1.
        step: From one window to the next, in windows.
        smooth: Blur the result, with a Gaussian of 11 pixels.
        batch_size: How many windows the model is given at once.

    Example:
        >>> from torch import nn
        >>> from multicam import GradCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> SESS(GradCAM(model, "1"), scales=(1.0, 1.5))(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        cam: CAM[L],
        inputs: str | Sequence[str] | None = None,
        *,
        scales: Sequence[float] = SCALES,
        step: float = 1.0,
        smooth: bool = True,
        batch_size: int = 32,
    ) -> None:
        super().__init__(cam, inputs)
        if not isinstance(scales, Sequence) or not scales or min(scales) < 1:
            raise MulticamError(f"scales enlarge: each is at least 1, as in (1, 1.5, 2), not {scales!r}")
        if not 0 < step <= 1:
            raise MulticamError(f"step is a part of the window, above 0 and at most 1, not {step!r}")
        if batch_size < 1:
            raise MulticamError(f"batch_size is at least 1, not {batch_size!r}")
        self.scales = tuple(scales)
        self.step = step
        self.smooth = smooth
        self.batch_size = batch_size
        self.comparable = False

    def maps(self, trace: Trace, *, signed: bool = False) -> Maps:
        """The fused maps of all windows; the trace decides the target only."""
        pictures = self.pictures(trace.inputs)
        for name, leaf in pictures.items():
            if not leaf.is_floating_point():
                raise MulticamError(
                    f"input {name!r} is {leaf.dtype}, which cannot be enlarged; give floating-point values"
                )
        follows = self.follows(trace)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for scale, part, windows in self._passes(trace, pictures):
            weights = _confidence(windows)
            with warnings.catch_warnings():
                # Most windows do not show the class; a result that is empty is told below.
                warnings.filterwarnings("ignore", "the .* map of .* is empty", UserWarning)
                found = self.cam.maps(windows, signed=signed)
            for name, maps in found.items():
                shape = (trace.inputs.batch, *maps.shape[1:])
                total, count = (kept.setdefault(name, maps.new_zeros(shape)) for kept in (sums, counts))
                for (b, corner), m, weight in zip(part, at_most_one(maps), weights, strict=True):
                    whole = _pasted(m, corner, scale) if follows[name] else m
                    total[b] += weight * whole
                    count[b] += (weight > 0) & (whole.abs() > ROUNDING)
        fused = {name: total / counts[name].clamp(min=1) for name, total in sums.items()}
        for name, m in fused.items():
            empty = (m == 0).flatten(1).all(1)
            if empty.any():
                warnings.warn(
                    f"the SESS map of {name or trace.paths[name]!r} for {int(empty.sum())} of {len(m)} samples is empty: no window "
                    "has a positive score, which weighs it, as well as evidence to show; a class is weighed by its "
                    "probability, and signed=True keeps negative evidence",
                    stacklevel=3,
                )
        return Maps({name: _blurred(m) if self.smooth else m for name, m in fused.items()}, False)

    def _passes(
        self, trace: Trace, pictures: Mapping[str, Tensor]
    ) -> Iterator[tuple[float, list[tuple[int, Corner]], Trace]]:
        """The passes of all windows, some of them at a time: their scale, the sample and the corner of each, and the pass."""
        for scale in progress(self.scales, len(self.scales), type(self).__name__):
            large = {name: _resized(leaf, _sizes(leaf, scale)) for name, leaf in pictures.items()}
            starts = _starts(scale, self.step)
            rows = [(b, (y, x)) for b in range(trace.inputs.batch) for y in starts for x in starts]
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                samples = [b for b, _ in part]
                cut = {
                    name: torch.stack([large[name][b][_window(leaf, corner, scale)] for b, corner in part])
                    for name, leaf in pictures.items()
                }
                yield scale, part, trace.again(trace.take(samples).replace(cut), samples, how=CUT)


def _confidence(trace: Trace) -> Float[Tensor, " b"]:
    """How sure the model is of the target: the probability of a class, the positive part of any other score."""
    if isinstance(trace.target, ClassScore | FinerContrast):
        return Probability(trace.target.index)(trace.output)
    return trace.scores.relu()


def _starts(scale: float, step: float) -> list[float]:
    """Where windows of length 1 start to cover the length `scale`; the last is shifted back to end with it."""
    starts: list[float] = []
    while len(starts) * step + 1 < scale:
        starts.append(len(starts) * step)
    return [*starts, scale - 1]


def _rounded(x: float) -> int:
    return floor(x + 0.5)  # unlike `round`, the same for x + 1


def _sizes(x: Tensor, scale: float) -> tuple[int, int]:
    return _rounded(x.shape[-2] * scale), _rounded(x.shape[-1] * scale)


def _window(x: Tensor, corner: Corner, scale: float) -> tuple[Any, slice, slice]:
    """The window of the size of `x` in the enlarged `x`, as an index."""
    starts = [
        min(_rounded(start * length), large - length)
        for start, length, large in zip(corner, x.shape[-2:], _sizes(x, scale), strict=True)
    ]
    rows, columns = (slice(start, start + length) for start, length in zip(starts, x.shape[-2:], strict=True))
    return ..., rows, columns


def _pasted(window: Float[Tensor, "*grid"], corner: Corner, scale: float) -> Float[Tensor, "*grid"]:
    """The map of a window where it lies on the whole, at the size of the window."""
    sizes = _sizes(window, scale)
    whole = window.new_zeros(*window.shape[:-2], *sizes)
    whole[_window(window, corner, scale)] = window
    return _resized(whole, (window.shape[-2], window.shape[-1]))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The last two axes at another size, all others as they are."""
    return resized(x.reshape(-1, *x.shape[-2:]), size).reshape(*x.shape[:-2], *size)


def _blurred(maps: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
    """Blurred along the last two axes, mirrored at the borders."""
    planes = maps.reshape(-1, 1, *maps.shape[-2:])
    for axis in (2, 3):
        radius = min(RADIUS, planes.shape[axis] - 1)
        offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
        kernel = (-(offsets**2) / (2 * SIGMA**2)).exp()
        along = [1, 1, 1, 1]
        along[axis] = len(kernel)
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        planes = F.conv2d(F.pad(planes, padding, mode="reflect"), (kernel / kernel.sum()).reshape(along))
    return planes.reshape(maps.shape)
