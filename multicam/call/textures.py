"""Companions of a photo by its texture."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from multicam.call.companion import companion, grey
from multicam.errors import MulticamError


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


@companion(aligned=True, differentiable=True)
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


@companion(aligned=True, differentiable=False)
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


@companion(aligned=True, differentiable=True)
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


@companion(aligned=True, differentiable=True)
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


@companion(aligned=True, differentiable=True)
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
