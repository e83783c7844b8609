"""What is promised of every companion of a photo, and its luma."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multicam.call.modalities import MODALITIES, grey, modality
from multicam.errors import MulticamError
from tests.helpers.photos import any_photos, few, luma, photos

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
