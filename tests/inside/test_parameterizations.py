"""How optimised images are written, bounded and moved: by numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from multicam import MulticamError
from multicam.inside.parameterizations import Bounds, Motion, fourier, pixel, total_variation


def example(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pixels_of_standard_normal_parameters_have_variance_one_and_colours_of_the_example() -> None:
    g = torch.Generator().manual_seed(0)
    grey = torch.randn(1, 1, 64, 48, generator=g)
    x = torch.cat(
        [grey, grey + 0.1 * torch.randn(1, 1, 64, 48, generator=g), torch.randn(1, 1, 64, 48, generator=g)], 1
    )
    for make in (fourier, pixel):
        written = make(x)
        pixels = written.pixels(torch.randn(500, *written.shape, generator=g))
        assert pixels.shape == (500, 3, 64, 48)
        assert abs(pixels.square().mean() - 1) < 0.05
    drawn = fourier(x).pixels(torch.randn(500, 3, 64, 25, 2, generator=g))
    correlation = torch.corrcoef(drawn.movedim(1, 0).flatten(1))
    wanted = 0.95 * torch.corrcoef(x[0].flatten(1))
    assert torch.allclose(
        correlation[~torch.eye(3, dtype=torch.bool)], wanted[~torch.eye(3, dtype=torch.bool)], atol=0.05
    )
    # Amplitudes fall as 1 / frequency: the power at 2 / side is a quarter of that at 1 / side.
    power = torch.fft.rfft2(drawn).abs().square().mean((0, 1))
    assert abs(power[1, 0] / power[2, 0] - 4) < 0.6
    assert abs(power[8, 0] / power[16, 0] - 4) < 0.6


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (9, 5), (6, 7)])
def test_one_parameter_is_one_wave_as_large_as_its_frequency_is_low(h: int, w: int) -> None:
    """A coefficient a at (u, v) is the wave 2 a cos(2 pi (u y / h + v x / w)) / sqrt(h w), or half of it without a mirror image."""
    written = fourier(example(4, 1, h, w))
    y, x = torch.arange(h)[:, None], torch.arange(w)[None]
    waves = {}
    for u, v in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (h - 1, 1)]:
        parameters = torch.zeros(1, *written.shape)
        parameters[0, 0, u, v, 0] = 1
        wave = torch.cos(2 * math.pi * (u * y / h + v * x / w))
        pixels = written.pixels(parameters)[0, 0]
        waves[u, v] = float((pixels * wave).sum() / wave.square().sum())
        torch.testing.assert_close(pixels, waves[u, v] * wave, atol=1e-5, rtol=1e-4)

    def frequency(u: int, v: int) -> float:
        return max(math.hypot(min(u, h - u) / h, v / w), 1 / max(h, w))

    reference = waves[1, 1] * frequency(1, 1)
    for (u, v), size in waves.items():
        alone = v == 0 and (h - u) % h == u  # its own mirror image
        column = v == 0 and not alone  # the transform takes the real part of what has no other half
        assert size * frequency(u, v) == pytest.approx(reference / (2 if alone or column else 1), rel=1e-3)


def test_what_is_made_of_one_channel_alone_is_that_channel_for_independent_channels() -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 0], x[0, 0, 1], x[0, 1, :, 0], x[0, 1, :, 1] = 1, -1, 1, -1  # without any correlation
    parameters = torch.zeros(1, 2, 4, 3, 2)
    parameters[0, 0] = torch.randn(4, 3, 2)
    pixels = fourier(x).pixels(parameters)
    assert pixels[0, 0].abs().max() > 0.1
    torch.testing.assert_close(pixels[0, 1], torch.zeros(4, 4), atol=1e-6, rtol=0)


def test_channels_that_are_alike_stay_within_reach_of_every_colour() -> None:
    grey = example(1, 1, 8, 8).expand(1, 3, 8, 8)
    parameters = torch.zeros(3, 3, 8, 5, 2)
    parameters[range(3), range(3), 1, 1, 0] = 1
    mixing = fourier(grey).pixels(parameters).flatten(2)[:, :, 0]
    assert torch.linalg.matrix_rank(mixing) == 3
    spread = mixing.T @ mixing
    torch.testing.assert_close(spread / spread[0, 0], torch.full((3, 3), 0.95).fill_diagonal_(1), atol=1e-4, rtol=0)


def test_pixels_are_their_own_parameters() -> None:
    x = torch.rand(2, 5, 4, 6)
    assert pixel(x).shape == (5, 4, 6)
    assert torch.equal(pixel(x).pixels(x), x)


def test_bounds_are_the_range_of_each_channel_of_all_samples() -> None:
    x = torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]], [[[-2.0, 1.0]], [[5.0, 5.0]]]])
    bounds = Bounds.of(None, x)
    assert bounds.low.flatten().tolist() == [-2, 5] and bounds.high.flatten().tolist() == [2, 5]
    shares = torch.tensor([[[[0.0, 1.0]], [[0.3, 1.0]]], [[[0.25, 0.5]], [[0.0, 0.0]]]])
    values = bounds.at(shares)
    assert values[:, 0].flatten().tolist() == [-2, 2, -1, 0] and (values[:, 1] == 5).all()
    torch.testing.assert_close(bounds.shares(values)[:, 0], shares[:, 0])
    assert (bounds.shares(values)[:, 1] == 0).all()
    own = Bounds.of(([0, -1], 3.0), x)
    assert own.low.flatten().tolist() == [0, -1] and own.high.flatten().tolist() == [3, 3]
    with pytest.raises(MulticamError, match="the example input is constant"):
        Bounds.of(None, torch.ones(2, 3, 4, 4))


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), ([0, 0], [1, 1]), ("a", "b")], ids=str)
def test_bounds_that_are_none_are_refused(bounds: Any) -> None:
    with pytest.raises(MulticamError, match=r"bounds are \(low, high\)"):
        Bounds.of(bounds, example(1, 3, 4, 4))


def test_moves_are_whole_pixels_turns_and_sizes_and_can_be_off() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 24, generator=g)
    assert Motion(0.0, 0.0, 0.0)(x, g) is x
    found = set()
    for _ in range(30):
        moved = Motion(1 / 8, 0.0, 0.0)(x, g)
        shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-3, 4)
                  if torch.allclose(moved[:, :, 3:-3, 4:-4], x.roll((-dy, -dx), (2, 3))[:, :, 3:-3, 4:-4], atol=1e-4)]  # fmt: skip
        assert len(shifts) == 1
        found.add(shifts[0])
    assert len(found) > 10
    # A disc stays where it is when the picture is turned, also in one that is not square.
    rows, columns = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = (8 - torch.hypot(rows, columns)).sigmoid()[None, None]
    turned = Motion(0.0, 0.0, 90.0)(disc, g)
    assert torch.allclose(turned[..., 8:32, 20:44], disc[..., 8:32, 20:44], atol=0.02)
    areas = [Motion(0.0, 0.3, 0.0)(disc, g).sum() / disc.sum() for _ in range(20)]
    assert min(areas) < 0.9 and max(areas) > 1.1 and max(areas) < 1.3**2 + 0.05


def test_images_of_a_batch_are_moved_alike_and_what_comes_in_is_mirrored() -> None:
    x = example(3, 2, 9, 12)
    motion = Motion(0.2, 0.1, 20.0)
    together, alone = (motion(images, torch.Generator().manual_seed(5)) for images in (x, x[1:2]))
    assert torch.equal(together[1:2], alone)
    ramp = torch.arange(10.0).expand(1, 1, 4, 10)
    for seed in range(10):
        moved = Motion(0.3, 0.0, 0.0)(ramp, torch.Generator().manual_seed(seed))[0, 0, 0]
        by = next(by for by in range(-3, 4) if torch.allclose(moved[3:-3], ramp[0, 0, 0, 3 + by : 7 + by], atol=1e-4))
        mirrored = [min(max(i, -1 - i), 19 - i) if i > 9 else max(i, -1 - i) for i in range(by, by + 10)]
        torch.testing.assert_close(moved, torch.tensor(mirrored, dtype=torch.float32), atol=1e-4, rtol=0)


def test_total_variation_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0, 3.0], [0.0, 5.0, 3.0]]]])
    across, down = (1 + 2 + 5 + 2) / 4, (0 + 4 + 0) / 3
    assert total_variation(torch.cat([x, -2 * x])).tolist() == pytest.approx([across + down, 2 * (across + down)])
    assert total_variation(x[..., :1, :]).tolist() == [1.5]
    assert total_variation(torch.rand(2, 1, 1, 1)).tolist() == [0, 0]
