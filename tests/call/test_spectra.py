"""Frequency companions, against NumPy and SciPy."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from multicam.call.modalities import dct, dct_bands, fft_high_pass, fft_log_magnitude, grey, phase_only
from multicam.errors import MulticamError
from tests.helpers.photos import any_photos, few, luma, photos


@pytest.mark.parametrize("size", [(24, 32), (15, 17), (2, 3)])
def test_fft_log_magnitude_is_the_centred_spectrum(size):
    x = photos(h=size[0], w=size[1])
    spectrum = np.fft.fftshift(np.fft.fft2(luma(x).numpy()), axes=(-2, -1)) / math.sqrt(math.prod(size))
    np.testing.assert_allclose(fft_log_magnitude(x)[:, 0], np.log1p(np.abs(spectrum)))


@few
@given(x=any_photos)
def test_phase_only_has_unit_magnitudes_and_the_photos_phases(x):
    ours = torch.fft.fft2(phase_only(x), norm="ortho")
    theirs = torch.fft.fft2(grey(x), norm="ortho")
    torch.testing.assert_close(ours.abs(), torch.ones_like(ours.abs()))
    torch.testing.assert_close(ours * theirs.abs(), theirs)


@pytest.mark.parametrize("size", [(2, 2), (31, 45), (64, 64), (101, 211), (3, 1009)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phase_only_leaves_absent_frequencies_absent(size, dtype):
    flat = torch.full((1, 1, *size), 0.3, dtype=dtype)
    torch.testing.assert_close(phase_only(flat), torch.full_like(flat, 1 / math.sqrt(math.prod(size))))
    assert not phase_only(torch.zeros(1, 1, *size, dtype=dtype)).any()


@few
@given(x=any_photos, rows=st.integers(0, 9), columns=st.integers(0, 9))
def test_fourier_images_shift_with_the_photo(x, rows, columns):
    shifted = x.roll((rows, columns), dims=(-2, -1))
    for companion in (phase_only, fft_high_pass):
        torch.testing.assert_close(companion(shifted), companion(x).roll((rows, columns), dims=(-2, -1)))


@pytest.mark.parametrize("size", [(40, 40), (21, 40)])
def test_high_pass_keeps_what_lies_beyond_the_cutoff(size):
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    slow = 0.2 * torch.sin(2 * math.pi * columns * 2 / 40)
    fast = 0.2 * torch.sin(2 * math.pi * (rows * 6 / size[0] + columns * 3 / 40))
    x = (0.5 + slow + fast).expand(1, 3, -1, -1)
    torch.testing.assert_close(fft_high_pass(x, cutoff=0.1), fast.expand(1, 3, -1, -1))
    torch.testing.assert_close(fft_high_pass(x, cutoff=0.0), (slow + fast).expand(1, 3, -1, -1))


@few
@given(x=any_photos)
def test_dct_is_scipys_and_keeps_the_energy(x):
    y = dct(x)
    np.testing.assert_allclose(y, scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(y.square().sum(), x.square().sum())


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_block_dct_transforms_each_block_in_place(block):
    x = photos(h=16, w=24)
    y = dct(x, block)
    for i in range(0, 16, block):
        for j in range(0, 24, block):
            at = (..., slice(i, i + block), slice(j, j + block))
            np.testing.assert_allclose(y[at], scipy.fft.dctn(x[at].numpy(), axes=(-2, -1), norm="ortho"), atol=1e-12)


def test_dct_of_a_large_photo_is_exact_in_float32():
    x = photos(b=1, c=1, h=2, w=4096)
    expected = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(dct(x.float()), expected, atol=2e-5 * math.sqrt(x.numel()))


@few
@given(x=any_photos)
def test_bands_share_the_spectrum_and_sum_to_the_photo(x):
    bands = rearrange(dct_bands(x.float()), "b (band c) h w -> band b c h w", band=3)
    torch.testing.assert_close(bands.sum(0), x.float(), atol=1e-5, rtol=0)
    spectra = torch.stack([dct(band) for band in rearrange(dct_bands(x / 2), "b (band c) h w -> band b c h w", band=3)])
    assert ((spectra.abs() > 1e-9).sum(0) <= 1).all()


@pytest.mark.parametrize(
    ("band", "start", "stop", "share"),
    [(0, 0, 64 / 8**0.5, 1 / 16), (1, 64 / 8**0.5, 32, 1 / 16), (2, 32, 128, 7 / 8)],
    ids=["low", "middle", "high"],
)
def test_bands_are_the_filters_of_f3_net(band, start, stop, share):
    x = photos(h=64, w=64)
    diagonal = np.add.outer(np.arange(64), np.arange(64))
    mask = (start <= diagonal) & (diagonal < stop)
    assert mask.mean() == pytest.approx(share, abs=0.01)
    spectrum = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    expected = scipy.fft.idctn(spectrum * mask, axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(dct_bands(x).chunk(3, dim=1)[band], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dct(x, block=5), r"blocks of 5 x 5 do not tile a photo of 24 x 32: crop or pad"),
        (lambda x: dct(x, block=0), r"blocks of 0 x 0 do not tile"),
        (lambda x: fft_high_pass(x, cutoff=0.5), r"got cutoff 0\.5: frequencies lie in 0\.\.0\.5 cycles per pixel"),
        (lambda x: fft_high_pass(x, cutoff=-0.1), r"got cutoff -0\.1"),
    ],
)
def test_options_are_checked(call, message):
    with pytest.raises(MulticamError, match=message):
        call(photos())
