import inspect
import math

import numpy as np
import pytest
import pywt
import scipy.fft
import scipy.ndimage
import skimage.feature
import skimage.filters
import skimage.transform
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from multicam.call import modalities
from multicam.call.modalities import (
    MODALITIES,
    dct,
    dct_bands,
    difference_of_gaussians,
    fft_high_pass,
    fft_log_magnitude,
    gabor,
    grey,
    haar,
    local_binary_pattern,
    modality,
    phase_only,
    srm_residuals,
)
from multicam.errors import MulticamError

CHANNELS = {  # of the companion of a photo of c channels
    "fft_log_magnitude": lambda c: 1,
    "phase_only": lambda c: 1,
    "fft_high_pass": lambda c: c,
    "dct": lambda c: c,
    "dct_bands": lambda c: 3 * c,
    "srm_residuals": lambda c: 3,
    "local_binary_pattern": lambda c: 1,
    "haar": lambda c: 4 * c,
    "difference_of_gaussians": lambda c: c,
    "gabor": lambda c: 8,
}
REACH = {  # how far a pixel is felt, in pixels of the photo, for the companions with a window
    "srm_residuals": 2,
    "local_binary_pattern": 1,
    "haar": 1,
    "difference_of_gaussians": 6,
    "gabor": 14,
}
every = pytest.mark.parametrize("name", MODALITIES)


def names(*, aligned=None, differentiable=None):
    return [
        name
        for name, m in MODALITIES.items()
        if aligned in (None, m.aligned) and differentiable in (None, m.differentiable)
    ]


def photos(b=2, c=3, h=24, w=32, seed=0, dtype=torch.float64):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def luma(x):
    return x.mul(torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(3, 1, 1)).sum(1)


few = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.integers(2, 19)
any_photos = st.builds(
    photos, b=st.integers(1, 2), c=st.sampled_from([1, 3]), h=sides, w=sides, seed=st.integers(0, 99)
)


# What is known about each


def test_the_registry_lists_the_public_functions_themselves():
    assert set(MODALITIES) == set(CHANNELS)
    assert all(MODALITIES[name].make is getattr(modalities, name) for name in MODALITIES)


def test_lookup_by_name():
    assert modality("haar") is MODALITIES["haar"]
    with pytest.raises(
        MulticamError, match=r"no modality 'harr'; did you mean 'haar'\? There are: 'fft_log_magnitude'"
    ):
        modality("harr")


@every
def test_functions_keep_their_help(name):
    function = MODALITIES[name].make
    assert function.__name__ == name
    assert next(iter(inspect.signature(function).parameters)) == "x"
    assert ">>>" in inspect.getdoc(function)


@every
@few
@given(x=any_photos)
def test_shape_and_memory(name, x):
    before = x.clone()
    y = MODALITIES[name](x)
    b, c, h, w = x.shape
    size = (math.ceil(h / 2), math.ceil(w / 2)) if name == "haar" else (h, w)
    assert y.shape == (b, CHANNELS[name](c), *size)
    assert y.isfinite().all()
    y.zero_()
    assert x.equal(before)


@every
def test_dtype_is_kept_and_float32_is_enough(name):
    x = photos(dtype=torch.float32)
    single, double = MODALITIES[name](x), MODALITIES[name](x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, atol=2e-4, rtol=1e-5)


@every
def test_samples_do_not_mix(name):
    x = photos(b=3)
    torch.testing.assert_close(MODALITIES[name](x)[1:2], MODALITIES[name](x[1:2]))


@every
def test_memory_format_does_not_matter(name):
    x = photos()
    torch.testing.assert_close(MODALITIES[name](x.contiguous(memory_format=torch.channels_last)), MODALITIES[name](x))


@every
def test_autocast_does_not_lower_the_precision(name):
    x = photos(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = MODALITIES[name](x)
    assert inside.dtype == torch.float32
    assert inside.equal(MODALITIES[name](x))


@pytest.mark.parametrize("name", names(differentiable=True))
@pytest.mark.parametrize("c", [1, 3])
def test_gradients_reach_the_photo(name, c):
    contrast = 0.004 if name == "srm_residuals" else 0.6  # residuals between the cuts
    x = (0.3 + contrast * photos(b=1, c=c, h=5, w=6)).requires_grad_()
    assert torch.autograd.gradcheck(MODALITIES[name], x, fast_mode=True)
    assert torch.autograd.grad(MODALITIES[name](x).square().sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("name", names(differentiable=True))
def test_gradients_are_finite_on_a_flat_photo(name):
    x = torch.full((1, 3, 6, 8), 0.5, requires_grad=True)
    assert torch.autograd.grad(MODALITIES[name](x).square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", names(differentiable=False))
def test_no_gradient_where_none_is_promised(name):
    assert not MODALITIES[name](photos().requires_grad_()).requires_grad


def change(name, row, column):
    """How much each place of the companion changes, at the photo's size, when one pixel of the photo does."""
    x = 0.25 + 0.02 * photos(b=1, c=3, h=40, w=48)
    bumped = x.clone()
    bumped[..., row, column] += 0.5
    y = (MODALITIES[name](bumped) - MODALITIES[name](x)).abs().sum(1)[0]
    return y.repeat_interleave(x.shape[-2] // len(y), 0).repeat_interleave(x.shape[-2] // len(y), 1)


@pytest.mark.parametrize("name", names(aligned=True))
@pytest.mark.parametrize("place", [(20, 30), (33, 16), (8, 9)])
def test_aligned_companions_change_where_the_photo_does(name, place):
    y = change(name, *place)
    peak = divmod(y.argmax().item(), y.shape[1])
    assert max(abs(a - b) for a, b in zip(peak, place, strict=True)) <= 1


@pytest.mark.parametrize("name", REACH)
def test_windows_end_where_they_should(name):
    row, column, reach = 20, 24, REACH[name]
    y = change(name, row, column)
    y[row - reach : row + reach + 1, column - reach : column + reach + 1] = 0
    assert not y.any()


@pytest.mark.parametrize("name", names(aligned=False))
def test_spectra_change_everywhere(name):
    y = change(name, 20, 24)
    assert y[10:30, 14:34].sum() < 0.4 * y.sum()


# Luma


def test_grey_is_the_luma_and_leaves_grey_photos_alone():
    x = photos()
    torch.testing.assert_close(grey(x)[:, 0], luma(x))
    assert grey(x[:, :1]).equal(x[:, :1])
    torch.testing.assert_close(grey(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


@few
@given(h=st.integers(2, 60), w=st.integers(2, 60), seed=st.integers(0, 99))
def test_grey_gives_equal_pixels_equal_values(h, w, seed):
    colour = photos(h=1, w=1, seed=seed, dtype=torch.float32)
    flat = grey(colour.expand(-1, -1, h, w).contiguous())
    assert (flat == flat[..., :1, :1]).all()


# Fourier


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


# Cosine


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


# Texture


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


@pytest.mark.parametrize("companion", [srm_residuals, difference_of_gaussians, fft_high_pass])
def test_flat_photos_leave_no_residual(companion):
    flat = photos(b=5, h=2, w=2, dtype=torch.float32)[:, :, :1, :1].expand(-1, -1, 17, 20)
    torch.testing.assert_close(companion(flat), torch.zeros_like(companion(flat)), atol=1e-4, rtol=0)


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


# Messages


@pytest.mark.parametrize("function", [grey, *(m.make for m in MODALITIES.values())], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8), r"got torch\.uint8: .* x\.float\(\) / 255 for 8-bit"),
        (torch.rand(1, 3, 8, 8).half(), r"got torch\.float16: x\.float\(\) for half precision"),
        (torch.rand(3, 8, 8), r"\(b c h w\), got shape \(3, 8, 8\): x\[None\] adds the batch axis"),
        (torch.rand(1, 8, 8, 3), r"1 or 3 channels, got shape \(1, 8, 8, 3\): .* x\.permute\(0, 3, 1, 2\)"),
        (torch.rand(1, 3, 1, 8), r"got shape \(1, 3, 1, 8\): at least one photo of at least 2 x 2 pixels"),
        (torch.rand(0, 3, 8, 8), r"got shape \(0, 3, 8, 8\): at least one photo"),
        (torch.full((1, 3, 8, 8), 200.0), r"0\.\.1, got values from 200 to 200: divide 8-bit values by 255"),
        (torch.full((1, 3, 8, 8), -2.1), r"got values from -2\.1 to -2\.1: .* before the mean and standard deviation"),
        (torch.full((1, 3, 8, 8), math.nan), r"got values from nan to nan"),
    ],
    ids=["uint8", "half", "one photo", "channels last", "thin", "empty", "0..255", "normalised", "nan"],
)
def test_photos_are_checked(function, x, message):
    with pytest.raises(MulticamError, match=message):
        function(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dct(x, block=5), r"blocks of 5 x 5 do not tile a photo of 24 x 32: crop or pad"),
        (lambda x: dct(x, block=0), r"blocks of 0 x 0 do not tile"),
        (lambda x: fft_high_pass(x, cutoff=0.5), r"got cutoff 0\.5: frequencies lie in 0\.\.0\.5 cycles per pixel"),
        (lambda x: fft_high_pass(x, cutoff=-0.1), r"got cutoff -0\.1"),
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
