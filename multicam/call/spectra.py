"""Companions of a photo by its frequencies."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from multicam.call.companion import companion, grey
from multicam.errors import MulticamError


@companion(aligned=False, differentiable=True)
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


@companion(aligned=True, differentiable=True)
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


@companion(aligned=True, differentiable=True)
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


@companion(aligned=False, differentiable=True)
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


@companion(aligned=True, differentiable=True)
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
