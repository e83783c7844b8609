import hashlib

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage import data
from skimage.color import rgb2lab

from multicam.errors import MulticamError
from multicam.figures.colours import colorize, normalize, overlay, to_rgb
from multicam.maps import Maps
from tests.helpers.pictures import golden


def ramp(low: float = 0.0, n: int = 256) -> torch.Tensor:
    return torch.linspace(low, 1, n)[None]


# normalize


def test_shared_divides_by_one_number_and_each_does_not() -> None:
    maps = {"rgb": torch.tensor([[[0.0, 8.0]], [[1.0, 2.0]]]), "depth": torch.tensor([[[0.0, 0.5]], [[-4.0, 4.0]]])}
    shared = normalize(maps)
    assert all(torch.equal(shared[name], maps[name] / 8) for name in maps)
    each = normalize(maps, "each")
    assert torch.equal(each["rgb"], torch.tensor([[[0.0, 1.0]], [[0.5, 1.0]]]))
    assert torch.equal(each["depth"], torch.tensor([[[0.0, 1.0]], [[-1.0, 1.0]]]))


def test_the_type_is_kept() -> None:
    x = torch.rand(2, 3, 3)
    assert isinstance(normalize(x), torch.Tensor)
    assert type(normalize({"a": x})) is dict
    assert isinstance(normalize(Maps({"a": x})), Maps)
    assert normalize({}) == {}


def test_what_cannot_be_compared_is_scaled_alone_by_default() -> None:
    pair = {"rgb": torch.full((1, 2, 2), 4.0), "depth": torch.full((1, 2, 2), 1.0)}
    assert normalize(Maps(pair, comparable=False))["depth"].max() == 1
    assert normalize(Maps(pair))["depth"].max() == 0.25
    assert normalize(Maps(pair, comparable=False), "shared")["depth"].max() == 0.25


def test_maps_divided_by_their_own_maxima_are_no_longer_comparable() -> None:
    maps = Maps({"rgb": torch.rand(1, 2, 2)})
    assert normalize(maps).comparable
    assert not normalize(maps, "each").comparable


finite = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=4), elements=finite), st.booleans())
def test_normalizing_keeps_zero_and_sign_within_one_and_twice_is_once(values: np.ndarray, shared: bool) -> None:
    maps, scale = torch.from_numpy(values), "shared" if shared else "each"
    once = normalize(maps, scale)
    assert once.shape == maps.shape and once.abs().max() <= 1
    assert (once[maps == 0] == 0).all() and (once * maps >= 0).all()
    assert torch.equal(normalize(once, scale), once)


def test_maps_without_evidence_stay_empty() -> None:
    for scale in ("shared", "each"):
        assert not normalize({"a": torch.zeros(2, 3, 3), "b": torch.zeros(2, 1, 1)}, scale)["a"].any()
    mixed = normalize(torch.stack([torch.zeros(2, 2), torch.full((2, 2), 3.0)]), "each")
    assert mixed[0].max() == 0 and mixed[1].min() == 1


def test_the_gradient_passes_and_the_maps_are_not_touched() -> None:
    maps = torch.rand(1, 2, 2, requires_grad=True)
    before = maps.detach().clone()
    normalize(maps).sum().backward()
    assert maps.grad is not None and torch.equal(maps.detach(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    maps = torch.zeros(3, 2, 2)
    maps[1, 0, 1] = bad
    with pytest.raises(MulticamError, match="the map 'rgb' has NaN or infinite values in sample 1"):
        normalize({"rgb": maps})
    with pytest.raises(MulticamError, match="the map has NaN"):
        normalize(maps, "each")


def test_an_empty_tensor_is_named() -> None:
    with pytest.raises(MulticamError, match=r"'rgb' is empty: \(0, 2, 2\)"):
        normalize({"rgb": torch.zeros(0, 2, 2)})


# colorize


@pytest.mark.parametrize("name", ["inferno", "viridis"])
def test_the_colours_are_matplotlibs(name: str) -> None:
    table = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3].astype(int)
    assert np.abs(colorize(ramp(), name)[0] - table).max() <= 2


def test_jet_goes_from_blue_to_red_in_rgb_order() -> None:
    low, high = colorize(torch.tensor([[0.0, 1.0]]), "jet")[0].astype(int)
    assert low[2] > low[0] and high[0] > high[2]


def test_the_default_follows_the_sign() -> None:
    assert np.array_equal(colorize(ramp()), colorize(ramp(), "inferno"))
    assert np.array_equal(colorize(ramp(-1)), colorize(ramp(-1), "diverging"))
    assert not np.array_equal(colorize(ramp()), colorize(ramp(), "diverging"))


def test_diverging_is_neutral_at_zero_and_balanced_about_it() -> None:
    colours = colorize(ramp(-1, 255), "diverging")
    lab = rgb2lab(colours)[0]
    blue, middle, red = colours[0, 0].astype(int), colours[0, 127].astype(int), colours[0, -1].astype(int)
    assert np.ptp(middle) <= 1 and blue.argmax() == 2 and red.argmax() == 0
    negative, positive = lab[127::-1], lab[127:]
    assert np.abs(negative[:, 0] - positive[:, 0]).max() < 1  # lightness
    assert np.abs(np.hypot(*negative[:, 1:].T) - np.hypot(*positive[:, 1:].T)).max() < 2  # chroma


def test_equal_steps_of_evidence_are_equal_steps_of_colour() -> None:
    lab = rgb2lab(colorize(ramp(-1, 9), "diverging"))[0]
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.1


def test_leading_axes_are_kept() -> None:
    map = torch.rand(2, 3, 4, 5)
    assert colorize(map).shape == (2, 3, 4, 5, 3)
    assert np.array_equal(colorize(map)[1, 2], colorize(map[1, 2]))


def test_rounding_beyond_one_is_forgiven_and_nothing_else() -> None:
    assert np.array_equal(colorize(torch.tensor([[1 + 1e-6]])), colorize(torch.tensor([[1.0]])))
    for values in ([0.0, 1.5], [-3.0, 0.0], [0.0, float("nan")]):
        with pytest.raises(MulticamError, match="use normalize first"):
            colorize(torch.tensor([values]))


def test_a_signed_map_needs_a_diverging_colour_map() -> None:
    with pytest.raises(MulticamError, match=r"'jet' shows 0..1 but the map goes down to -1.*colormap='diverging'"):
        colorize(ramp(-1), "jet")


# to_rgb


def test_displayable_values_are_shown_as_they_are() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = pixels.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(to_rgb(pixels), expected)
    assert np.array_equal(to_rgb(pixels.float() / 255), expected)
    assert np.array_equal(to_rgb(pixels[0]), expected[0])
    assert to_rgb(torch.tensor([[[True, False]]])).tolist() == [[[255] * 3, [0] * 3]]


def test_an_imagenet_normalised_photo_looks_like_the_photo() -> None:
    photo = torch.from_numpy(data.astronaut()[::4, ::4].copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    shown, truth = to_rgb((photo - mean) / std).astype(int), to_rgb(photo).astype(int)
    assert np.abs(shown - truth).mean() < 8


def test_outliers_do_not_darken_an_image_and_holes_are_black() -> None:
    depth = torch.linspace(2, 10, 1000).view(1, 20, 50)
    depth[0, 0, 0], depth[0, 10, 10] = 1e6, float("nan")
    shown = to_rgb(depth)[..., 0]
    assert shown[0, 0] == 255 and shown[10, 10] == 0 and 110 < np.median(shown) < 145


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_each_image_of_a_batch_is_scaled_alone(scale: float) -> None:
    batch = torch.randn(3, 3, 6, 5) * torch.tensor([1.0, 10.0, scale]).view(3, 1, 1, 1)
    assert all(np.array_equal(to_rgb(batch)[i], to_rgb(batch[i])) for i in range(3))


def test_other_channel_counts() -> None:
    two, many = torch.rand(2, 4, 4), torch.rand(7, 4, 4)
    red, cyan = (two * 255).round().byte().numpy()
    assert np.array_equal(to_rgb(two), np.stack([red, cyan, cyan], axis=-1))
    assert np.array_equal(to_rgb(many), to_rgb(many.mean(0, keepdim=True)))


def test_clips_show_their_middle_frame_and_spectra_their_magnitude() -> None:
    clip = torch.rand(2, 3, 5, 4, 4)
    assert np.array_equal(to_rgb(clip), to_rgb(clip[:, :, 2]))
    spectrum = torch.fft.fft2(torch.rand(1, 1, 8, 8))
    assert np.array_equal(to_rgb(spectrum), to_rgb(spectrum.abs().log1p()))


def test_constant_and_hopeless_images_are_black_or_grey() -> None:
    assert to_rgb(torch.full((1, 2, 2), 0.5)).min() == 128
    assert to_rgb(torch.full((1, 2, 2), 7.0)).max() == 0
    assert to_rgb(torch.full((1, 2, 2), float("nan"))).max() == 0


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1, 1, 4, 4), (0, 3, 4, 4)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MulticamError, match="is no image: give"):
        to_rgb(torch.zeros(shape))


# overlay


@pytest.mark.parametrize("colormap", ["inferno", "jet", "diverging"])
def test_without_evidence_the_image_is_left_as_it_is(colormap: str) -> None:
    image = torch.rand(2, 3, 6, 5)
    assert np.array_equal(overlay(image, torch.zeros(2, 6, 5), colormap=colormap), to_rgb(image))


def test_the_blend_is_the_square_root_of_the_evidence() -> None:
    image, map = torch.rand(3, 6, 5), torch.rand(6, 5) * 2 - 1
    share = 0.5 * map.abs().sqrt().numpy()[..., None]
    expected = (1 - share) * to_rgb(image) + share * colorize(map)
    assert np.abs(overlay(image, map, opacity=0.5) - expected).max() <= 0.51


def test_a_batch_is_laid_over_image_by_image() -> None:
    images, maps = torch.randn(3, 1, 6, 5), torch.rand(3, 6, 5)
    assert all(np.array_equal(overlay(images, maps)[i], overlay(images[i], maps[i])) for i in range(3))


@pytest.mark.parametrize(
    ("image", "map"), [((3, 8, 8), (4, 4)), ((2, 3, 8, 8), (8, 8)), ((3, 8, 8), (1, 8, 8)), ((2, 3, 8, 8), (3, 8, 8))]
)
def test_nothing_is_resized_or_repeated(image: tuple[int, ...], map: tuple[int, ...]) -> None:
    with pytest.raises(MulticamError, match=r"does not lie on an image .* resize the map to the image, or show it"):
        overlay(torch.rand(image), torch.rand(map))


def test_a_raw_map_is_refused() -> None:
    with pytest.raises(MulticamError, match=r"not 0..7: use normalize first"):
        overlay(torch.rand(3, 1, 2), torch.tensor([[0.0, 7.0]]))


def test_inputs_stay_as_they_were() -> None:
    image, map = torch.randn(1, 3, 8, 8, requires_grad=True), torch.rand(1, 8, 8, dtype=torch.bfloat16)
    before = [hashlib.sha256(t.detach().float().numpy().tobytes()).digest() for t in (image, map)]
    overlay(image, map)
    assert before == [hashlib.sha256(t.detach().float().numpy().tobytes()).digest() for t in (image, map)]


def test_overlays_look_as_approved() -> None:
    photo = torch.from_numpy(data.astronaut()[:384:8, 64:448:8].copy()).permute(2, 0, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    positive, negative = torch.exp(-8 * (x**2 + y**2)), torch.exp(-8 * ((x - 0.6) ** 2 + (y - 0.6) ** 2))
    shown = [overlay(photo, positive), overlay(photo, normalize((positive - negative)[None])[0])]
    golden("overlay", np.concatenate(shown, axis=1), tolerance=1)
