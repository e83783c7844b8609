"""Texture companions, against SciPy, scikit-image and PyWavelets."""

import math

import numpy as np
import pytest
import pywt
import scipy.ndimage
import skimage.feature
import skimage.filters
import skimage.transform
import torch
from einops import rearrange
from hypothesis import given

from multicam.call.modalities import difference_of_gaussians, gabor, haar, local_binary_pattern, srm_residuals
from multicam.errors import MulticamError
from tests.helpers.photos import any_photos, few, luma, photos


def test_srm_residuals_are_correlations_with_the_published_kernels():
    x = 0.5 + 0.02 * photos()
    second = np.array([1.0, -2.0, 1.0])
    fourth = np.array([[-1, 2, -2], [2, -6, 8], [-2, 8, -12]])
    kernels = [
        -np.outer(second, second) / 4,
        np.pad(fourth, (0, 2), mode="reflect") / 12,
        second[None] / 2,
    ]
    for k, kernel in enumerate(kernels):
        for b in range(len(x)):
            expected = scipy.ndimage.correlate(255 * luma(x)[b].numpy(), kernel, mode="nearest").clip(-3, 3)
            np.testing.assert_allclose(srm_residuals(x)[b, k], expected, atol=1e-10)
    assert srm_residuals(x).abs().amax() == 3


def test_srm_residuals_of_a_ramp_vanish_inside():
    ramp = torch.linspace(0.1, 0.9, 20, dtype=torch.float64).expand(1, 1, 15, 20)
    assert srm_residuals(ramp)[..., 2:-2].abs().amax() < 1e-10


def test_lbp_is_the_multi_block_lbp_of_single_pixels():
    levels = photos(b=1, c=1, h=10, w=12).mul(255).round()
    code = local_binary_pattern(levels / 255)[0, 0, 1:-1, 1:-1].long().numpy()
    integral = skimage.transform.integral_image(levels[0, 0].numpy())
    theirs = np.array(
        [[skimage.feature.multiblock_lbp(integral, i, j, 1, 1) for j in range(10)] for i in range(8)], dtype=int
    )
    # Their bits run clockwise from the top left neighbour, the highest first.
    reordered = sum((theirs >> bit & 1) << p for p, bit in enumerate([4, 5, 6, 7, 0, 1, 2, 3]))
    np.testing.assert_array_equal(code, reordered)


def test_lbp_shares_its_even_bits_with_the_interpolated_lbp():
    levels = photos(b=1, c=1).mul(255).round()
    ours = local_binary_pattern(levels / 255)[0, 0, 1:-1, 1:-1].long().numpy()
    theirs = skimage.feature.local_binary_pattern(levels[0, 0].byte().numpy(), 8, 1).astype(int)[1:-1, 1:-1]
    np.testing.assert_array_equal(ours & 0b01010101, theirs & 0b01010101)
    assert (ours != theirs).any()


def test_lbp_sees_order_only():
    x = photos(c=1)
    assert local_binary_pattern(x).equal(local_binary_pattern(x**3))
    assert (local_binary_pattern(torch.full((1, 3, 7, 9), 0.3)) == 255).all()


@few
@given(x=any_photos)
def test_haar_is_pywavelets(x):
    a, details = pywt.dwt2(x.numpy(), "haar", mode="symmetric")
    np.testing.assert_allclose(haar(x), np.concatenate([a, *details], axis=1), atol=1e-12)


def test_haar_keeps_the_energy_and_can_be_undone():
    x = photos()
    y = haar(x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    a, *details = (band.numpy() for band in y.chunk(4, dim=1))
    np.testing.assert_allclose(pywt.idwt2((a, tuple(details)), "haar"), x, atol=1e-12)


@pytest.mark.parametrize(("sigma", "ratio"), [(1.0, 1.6), (0.5, 2.0), (2.0, 1.3), (1.625, 1.6)])
@pytest.mark.parametrize("size", [(24, 32), (5, 6)])
def test_difference_of_gaussians_is_scikit_images(sigma, ratio, size):
    x = photos(h=size[0], w=size[1])
    for b in range(len(x)):
        expected = skimage.filters.difference_of_gaussians(
            x[b].numpy(), sigma, ratio * sigma, mode="nearest", channel_axis=0
        )
        np.testing.assert_allclose(difference_of_gaussians(x, sigma, ratio)[b], expected, atol=1e-12)


def test_gabor_responds_to_a_point_with_scikit_images_kernels():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    frequencies, orientations = (0.3, 0.15), 6
    y = rearrange(gabor(point, frequencies, orientations), "1 (f o) h w -> f o h w", o=orientations)
    for f, frequency in enumerate(frequencies):
        for o in range(orientations):
            kernel = skimage.filters.gabor_kernel(frequency, theta=o * math.pi / orientations)
            p, q = (n // 2 for n in kernel.shape)
            np.testing.assert_allclose(y[f, o, 20 - p : 21 + p, 20 - q : 21 + q], kernel.real, atol=1e-12)


def test_gabor_borders_are_replicated():
    x = photos(b=1, c=1, h=12, w=9)
    kernel = skimage.filters.gabor_kernel(0.25, theta=0).real
    expected = scipy.ndimage.correlate(x[0, 0].numpy(), kernel, mode="nearest")
    np.testing.assert_allclose(gabor(x, [0.25], 1)[0, 0], expected, atol=1e-12)


def test_gabor_names_the_wave():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for f, frequency in enumerate((0.25, 0.125)):
        for o in range(4):
            t = o * math.pi / 4
            wave = torch.cos(2 * math.pi * frequency * (columns * math.cos(t) + rows * math.sin(t)))
            energy = gabor((0.5 + 0.5 * wave).expand(1, 1, -1, -1)).square().mean((0, 2, 3))
            assert energy.argmax() == 4 * f + o


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: difference_of_gaussians(x, sigma=0.0), r"got sigma 0\.0 and ratio 1\.6: sigma is above 0"),
        (lambda x: difference_of_gaussians(x, ratio=1.0), r"ratio above 1"),
        (lambda x: gabor(x, frequencies=[0.6]), r"got frequencies \(0\.6,\) and 4 orientations: .* 0\.\.0\.5 cycles"),
        (lambda x: gabor(x, frequencies=[]), r"got frequencies \(\) .* a bank has at least one of each"),
        (lambda x: gabor(x, orientations=0), r"0 orientations: a bank has at least one of each"),
    ],
)
def test_options_are_checked(call, message):
    with pytest.raises(MulticamError, match=message):
        call(photos())
