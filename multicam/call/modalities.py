"""A photo's frequency and texture companions: the other inputs that manipulation, texture and camera models take.

Every function takes photos `(b c h w)` with values in 0..1, grey or RGB, float32 or float64, and gives a tensor of the
same dtype on the same device. Compute companions before a model's mean and standard deviation are taken off the photo.
A flipped or resized photo needs its companions computed again: most of them do not commute with either.

`MODALITIES` lists them by name, with what a picture or an engine has to know about each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

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
    _check(x)
    if x.shape[1] == 1:
        return x
    # Elementwise: einsum rounds equal pixels differently at times, and local binary patterns would see texture there.
    r, g, b = x.chunk(3, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def _check(x: Tensor) -> None:
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


def _companion(*, aligned: bool, differentiable: bool) -> Callable[[Function], Function]:
    """A decorator that lists a function in `MODALITIES` and checks its photos."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def checked(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            _check(x)
            # Models that make their companions themselves do it under autocast, which would halve the precision.
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *args, **kwargs)

        MODALITIES[function.__name__] = Modality(checked, aligned, differentiable)
        return cast(Function, checked)

    return register


@_companion(aligned=False, differentiable=True)
def fft_log_magnitude(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The log spectrum of the luma, `(b 1 h w)`, zero frequency at `(h // 2, w // 2)`.

    log(1 + |F|) with the unitary Fourier transform F. Up-sampling leaves a grid of peaks in it (Zhang et al. 2019,
    "Detecting and Simulating Artifacts in GAN Fake Images").

    Example:
        >>> import torch
        >>> fft_log_magnitude(torch.full((1, 3, 4, 4), 0.5))[0, 0].argmax().item()  # (2, 2)
        10
    """
    h, w = x.shape[-2:]
    magnitude: Tensor = torch.fft.fft2(grey(x), norm="ortho").abs()
    return magnitude.log1p().roll((h // 2, w // 2), dims=(-2, -1))


@_companion(aligned=True, differentiable=True)
def phase_only(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The luma rebuilt from its phases alone, `(b 1 h w)`: every frequency has magnitude 1.

    The inverse of F / |F|, unitary, so the mean square is 1 at every size. Edges and texture stay in place (Oppenheim
    and Lim 1981, "The Importance of Phase in Signals"); an input of SPSL (Liu et al. 2021, "Spatial-Phase Shallow
    Learning"). A frequency that the photo lacks has no phase and stays 0; gradients grow as 1 / |F| near it.

    Example:
        >>> import torch
        >>> phase_only(torch.rand(1, 3, 8, 8)).square().mean().round(decimals=4)
        tensor(1.)
    """
    spectrum = torch.fft.rfft2(grey(x), norm="ortho")
    magnitude = spectrum.abs()
    # Below the rounding error of the transform a phase is noise, and scaled to magnitude 1 it would fill the picture.
    present = magnitude > torch.finfo(x.dtype).eps * magnitude.amax((-2, -1), keepdim=True)
    rebuilt: Tensor = torch.fft.irfft2(torch.where(present, spectrum, 0).sgn(), s=x.shape[-2:], norm="ortho")
    return rebuilt


@_companion(aligned=True, differentiable=True)
def fft_high_pass(x: Float[Tensor, "b c h w"], cutoff: float = 0.1) -> Float[Tensor, "b c h w"]:
    """The photo without its low frequencies, `(b c h w)`.

    The ideal high-pass filter: keeps the frequencies beyond `cutoff` cycles per pixel in any direction (Gonzalez and
    Woods, "Digital Image Processing", section 4.9).

    Args:
        x: Photos.
        cutoff: In cycles per pixel, from 0 (only the mean goes) to below 0.5 (two pixels a cycle).

    Raises:
        MulticamError: The cutoff is outside 0..0.5, or `x` is not a batch of photos in 0..1.

    Example:
        >>> import torch
        >>> stripes = torch.tensor([0.25, 0.75]).repeat(1, 1, 4, 2)
        >>> fft_high_pass(stripes)[0, 0, 0]
        tensor([-0.2500,  0.2500, -0.2500,  0.2500])
    """
    if not 0 <= cutoff < 0.5:
        raise MulticamError(f"got cutoff {cutoff}: frequencies lie in 0..0.5 cycles per pixel")
    h, w = x.shape[-2:]
    rows = torch.fft.fftfreq(h, dtype=x.dtype, device=x.device)[:, None]
    columns = torch.fft.rfftfreq(w, dtype=x.dtype, device=x.device)
    kept = torch.hypot(rows, columns) > cutoff
    passed: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * kept, s=(h, w))
    return passed


@_companion(aligned=False, differentiable=True)
def dct(x: Float[Tensor, "b c h w"], block: int | None = None) -> Float[Tensor, "b c h w"]:
    """The orthonormal two-dimensional DCT-II of each channel, `(b c h w)`, frequency 0 at the top left.

    With `block`, of each block in its own place, as in JPEG at 8. One channel for each frequency, on a grid of blocks
    that is aligned with the photo (Xu et al. 2020, "Learning in the Frequency Domain"), is then one step away:
    `rearrange(y, "b c (h p) (w q) -> b (c p q) h w", p=block, q=block)`.

    Args:
        x: Photos.
        block: Side of the blocks in pixels; None transforms the whole photo.

    Raises:
        MulticamError: The blocks do not tile the photo, or `x` is not a batch of photos in 0..1.

    Example:
        >>> import torch
        >>> dct(torch.full((1, 1, 4, 4), 0.5), block=2)[0, 0].round(decimals=4) + 0.0
        tensor([[1., 0., 1., 0.],
                [0., 0., 0., 0.],
                [1., 0., 1., 0.],
                [0., 0., 0., 0.]])
    """
    h, w = x.shape[-2:]
    if block is None:
        return _cosines(h, x) @ x @ _cosines(w, x).T
    if block < 1 or h % block or w % block:
        raise MulticamError(f"blocks of {block} x {block} do not tile a photo of {h} x {w}: crop or pad the photo")
    D = _cosines(block, x)
    blocks = rearrange(x, "b c (h p) (w q) -> b c h w p q", p=block, q=block)
    return rearrange(D @ blocks @ D.T, "b c h w p q -> b c (h p) (w q)")


def _cosines(n: int, like: Tensor) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II matrix: D[k, j] = s_k cos(pi (2 j + 1) k / 2 n), s_0^2 = 1 / n, s_k^2 = 2 / n."""
    index = torch.arange(n, device=like.device)
    # The product reaches 2 n^2: its full turns come off as integers, or float32 would lose the angle.
    angle = index[:, None] * (2 * index + 1) % (4 * n)
    D = math.sqrt(2 / n) * torch.cos(angle.to(like.dtype) * (math.pi / (2 * n)))
    D[0] = math.sqrt(1 / n)
    return D


@_companion(aligned=True, differentiable=True)
def dct_bands(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3*c h w"]:
    """The photo split into low, middle and high frequencies, `(b (3 c) h w)` band by band; the bands sum to the photo.

    The fixed filters of F3-Net's frequency-aware decomposition (Qian et al. 2020, "Thinking in Frequency", section
    3.1, eq. 1): the anti-diagonals of the DCT that hold the first sixteenth of the spectrum, then up to an eighth, then
    the rest. Here no coefficient falls in two bands, and photos need not be square.

    Example:
        >>> import torch
        >>> x = torch.rand(1, 3, 16, 24)
        >>> low, middle, high = dct_bands(x).chunk(3, dim=1)
        >>> torch.allclose(low + middle + high, x, atol=1e-5)
        True
    """
    h, w = x.shape[-2:]
    rows, columns = _cosines(h, x), _cosines(w, x)
    # Row i / h plus column j / w, times h w to stay whole. The corner of the unit square below a diagonal t has area
    # t^2 / 2: a sixteenth at t = sqrt(1 / 8), an eighth at t = 1 / 2.
    diagonal = torch.arange(h, device=x.device)[:, None] * w + torch.arange(w, device=x.device) * h
    band = (8 * diagonal**2 >= (h * w) ** 2).long() + (2 * diagonal >= h * w).long()
    spectrum = rows @ x @ columns.T
    return torch.cat([rows.T @ (spectrum * (band == k)) @ columns for k in range(3)], dim=1)


def _correlate(x: Tensor, kernels: Tensor) -> Tensor:
    """Photos `(b c h w)` seen through kernels `(k p q)` of odd sides: `(b k h w)`, one of c and k being 1 or both equal.

    Shifted sums and not `conv2d`: on recent GPUs cuDNN rounds float32 convolutions to ten bits by default, which is as
    much as the residuals that these filters look for. Borders are replicated, so they show no edge.
    """
    h, w = x.shape[-2:]
    p, q = kernels.shape[-2:]
    padded = pad(x, (q // 2, q // 2, p // 2, p // 2), mode="replicate")
    total = x.new_zeros(())
    for i in range(p):
        for j in range(q):
            total = total + kernels[:, i, j, None, None] * padded[..., i : i + h, j : j + w]
    return total


SRM_KERNELS = (
    (4, ((0, 0, 0, 0, 0), (0, -1, 2, -1, 0), (0, 2, -4, 2, 0), (0, -1, 2, -1, 0), (0, 0, 0, 0, 0))),
    (12, ((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1))),
    (2, ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, -2, 1, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0))),
)


@_companion(aligned=True, differentiable=True)
def srm_residuals(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Three noise residuals of the luma in 8-bit grey levels, cut at +-3: `(b 3 h w)`.

    The second difference in both directions / 4, the 5 x 5 "KV" kernel / 12 and the horizontal second difference / 2:
    three filters of the steganalysis rich model (Fridrich and Kodovsky 2012, "Rich Models for Steganalysis of Digital
    Images") that image forensics settled on (Zhou et al. 2018, "Learning Rich Features for Image Manipulation
    Detection", section 3.2). Cut without rounding, so that gradients pass where nothing was cut.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> x[0, 0, 2, 2] = 1 / 255
        >>> srm_residuals(x)[0, :, 2, 2]
        tensor([-1., -1., -1.])
    """
    kernels = torch.stack([x.new_tensor(kernel) / q for q, kernel in SRM_KERNELS])
    return _correlate(255 * grey(x), kernels).clamp(-3, 3)


@_companion(aligned=True, differentiable=False)
def local_binary_pattern(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The local binary pattern of the luma, a code in 0..255 at each pixel: `(b 1 h w)`.

    sum_p 2^p [g_p >= g], with g_p the eight neighbours of g counted anticlockwise from the right (Ojala et al. 1996, "A
    Comparative Study of Texture Measures"). The neighbours are pixels, diagonals included. The LBP(8, 1) of Ojala et al.
    2002, as in scikit-image, takes diagonals from a circle by interpolation: its even bits are the same and its odd
    bits differ. Neighbours beyond the border equal the pixel at the border.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
        >>> local_binary_pattern(x[None, None])[0, 0, 1, 1]
        tensor(1.)
    """
    centre = grey(x)
    h, w = x.shape[-2:]
    padded = pad(centre, (1, 1, 1, 1), mode="replicate")
    offsets = ((1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2))
    bits = torch.cat([padded[..., i : i + h, j : j + w] >= centre for i, j in offsets], dim=1)
    weights = 2 ** torch.arange(8, device=x.device)[:, None, None]
    return (bits * weights).sum(1, keepdim=True).to(x.dtype)


@_companion(aligned=True, differentiable=True)
def haar(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 4*c (h+1)//2 (w+1)//2"]:
    """One level of the orthonormal Haar wavelet at half size, `(b (4 c) h/2 w/2)`, band by band.

    Half the sum of each 2 x 2 square, then half its differences: top - bottom, left - right, and of the diagonals
    (Mallat 1989, "A Theory for Multiresolution Signal Decomposition"); cA, cH, cV, cD in PyWavelets. An odd last row or
    column is doubled.

    Example:
        >>> import torch
        >>> haar(torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])).flatten()
        tensor([1., 1., 0., 0.])
    """
    h, w = x.shape[-2:]
    even = pad(x, (0, w % 2, 0, h % 2), mode="replicate")
    tl, tr, bl, br = rearrange(even, "b c (h p) (w q) -> (p q) b c h w", p=2, q=2)
    bands = (tl + tr + bl + br, tl + tr - bl - br, tl - tr + bl - br, tl - tr - bl + br)
    return torch.cat(bands, dim=1) / 2


@_companion(aligned=True, differentiable=True)
def difference_of_gaussians(
    x: Float[Tensor, "b c h w"], sigma: float = 1.0, ratio: float = 1.6
) -> Float[Tensor, "b c h w"]:
    """A narrow blur less a wide blur of each channel, `(b c h w)`: what has about the size of `sigma`.

    The ratio 1.6 comes closest to the Laplacian of a Gaussian (Marr and Hildreth 1980, "Theory of Edge Detection").
    The windows end at 4 standard deviations.

    Args:
        x: Photos.
        sigma: Standard deviation of the narrow Gaussian in pixels.
        ratio: That of the wide one, as a multiple.

    Raises:
        MulticamError: `sigma` is not positive, `ratio` not above 1, or `x` not a batch of photos in 0..1.

    Example:
        >>> import torch
        >>> spot = torch.zeros(1, 1, 9, 9)
        >>> spot[0, 0, 4, 4] = 1
        >>> difference_of_gaussians(spot)[0, 0, 4, 4:].round(decimals=3)
        tensor([ 0.0970,  0.0450, -0.0070, -0.0090, -0.0030])
    """
    if sigma <= 0 or ratio <= 1:
        raise MulticamError(f"got sigma {sigma} and ratio {ratio}: sigma is above 0 and ratio above 1")
    return _blur(x, sigma) - _blur(x, ratio * sigma)


def _blur(x: Tensor, sigma: float) -> Tensor:
    radius = int(4 * sigma + 0.5)
    distance = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = torch.softmax(-(distance**2) / (2 * sigma**2), dim=0)
    return _correlate(_correlate(x, taps[None, None]), taps[None, :, None])


@_companion(aligned=True, differentiable=True)
def gabor(
    x: Float[Tensor, "b c h w"], frequencies: Sequence[float] = (0.25, 0.125), orientations: int = 4
) -> Float[Tensor, "b k h w"]:
    """The luma through a bank of Gabor filters, `(b (frequencies orientations) h w)`.

    The even (cosine) part of exp(-(u^2 + v^2) / 2 s^2 + 2 pi i f (u cos t + v sin t)) / 2 pi s^2, u to the right and v
    down, at the angles t = k pi / orientations; s f = 0.56 gives a bandwidth of one octave (Daugman 1985, "Uncertainty
    relation for resolution in space, spatial frequency, and orientation"). The window ends at 3 s.

    Args:
        x: Photos.
        frequencies: In cycles per pixel, above 0 and up to 0.5.
        orientations: Number of angles in half a turn.

    Raises:
        MulticamError: A frequency is outside 0..0.5, nothing is in the bank, or `x` is not a batch of photos in 0..1.

    Example:
        >>> import torch
        >>> stripes = torch.tensor([1.0, 0.5, 0.0, 0.5]).repeat(1, 1, 32, 8)
        >>> gabor(stripes, frequencies=[0.25])[0, :, 16, 16].argmax().item()  # the wave runs to the right: angle 0
        0
    """
    if not frequencies or orientations < 1 or not all(0 < f <= 0.5 for f in frequencies):
        raise MulticamError(
            f"got frequencies {tuple(frequencies)} and {orientations} orientations: a bank has at least one of each, "
            "and frequencies lie in 0..0.5 cycles per pixel"
        )
    luma = grey(x)
    theta = torch.arange(orientations, dtype=x.dtype, device=x.device) * (math.pi / orientations)
    responses = []
    for frequency in frequencies:
        # With one width in every direction the filter is a product of two complex filters along the axes.
        across = _gabor_taps(frequency, theta.cos())[:, None, :]
        down = _gabor_taps(frequency, theta.sin())[:, :, None]
        responses.append(_correlate(_correlate(luma, across), down).real)
    return torch.cat(responses, dim=1)


def _gabor_taps(frequency: float, direction: Float[Tensor, " k"]) -> Complex[Tensor, "k n"]:
    sigma = 3 / math.pi * math.sqrt(math.log(2) / 2) / frequency
    radius = math.ceil(3 * sigma)
    distance = torch.arange(-radius, radius + 1, dtype=direction.dtype, device=direction.device)
    envelope = torch.exp(-(distance**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    return torch.polar(envelope.expand(len(direction), -1), 2 * math.pi * frequency * direction[:, None] * distance)
