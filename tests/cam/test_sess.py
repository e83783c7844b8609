"""SESS against pytorch-grad-cam, on images whose map is known, and what it refuses."""

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
from torch import nn

from multicam import CAM, SESS, GradCAM, HiResCAM, LayerCAM, MulticamError
from tests.helpers.classifier import EARLY, minmax, net, photos, theirs


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("method", [LayerCAM, GradCAM], ids=lambda m: m.__name__)
def test_sess_is_pytorch_grad_cams(method: type[CAM], smooth: bool) -> None:
    """At scales that interpolation meets exactly; what is next to nothing may count on one side only."""
    model, x = net(), photos(size=(32, 32))
    engine = pgc.SESS(
        model, [model[2]], base_method=getattr(pgc, method.__name__), scales=[32, 48, 64, 96], smooth=smooth, theta=1e-4
    )
    ours = minmax(SESS(method(model, EARLY), scales=(1.0, 1.5, 2.0, 3.0), smooth=smooth)(x, 1))
    difference = np.abs(ours - engine(x, theirs(x)))
    assert (difference > 1e-5).mean() < (0.2 if smooth else 0.005)
    assert difference.max() < (0.01 if smooth else 0.1)


def test_the_default_scales_of_sess_are_pytorch_grad_cams() -> None:
    """Which rounds the step between scales to pixels: they are the same where the size is a multiple of seven."""
    model, x = net(), photos(1, size=(28, 28))
    ours = minmax(SESS(LayerCAM(model, EARLY), smooth=False)(x, 1))
    # By default it counts what interpolation leaves beside a window, 1e-6 or so, as evidence.
    engine, careless = (
        pgc.SESS(model, [model[2]], base_method=pgc.LayerCAM, smooth=False, theta=theta) for theta in (1e-4, 0.0)
    )
    counted, miscounted = (np.abs(ours - one(x, theirs(x))) for one in (engine, careless))
    assert (counted > 1e-4).mean() < 0.005
    assert (miscounted > 1e-4).mean() > 0.5


def test_sess_of_an_even_image_is_even() -> None:
    """Windows put back cover every pixel once a scale, wherever they were cut."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.ones_(model[0].weight)
    found = SESS(HiResCAM(model, "0"), scales=(1.0, 1.4, 2.0, 3.0), step=0.5)(torch.ones(1, 1, 20, 30), 0)
    assert found.shape == (1, 20, 30)
    assert found.min() > 0.7  # the rims of the windows of a broken scale
    assert found.max() <= 1 + 1e-6
    whole = SESS(HiResCAM(model, "0"), scales=(1.0, 2.0, 3.0))(torch.ones(1, 1, 20, 30), 0)
    torch.testing.assert_close(whole, torch.ones(1, 20, 30))


def test_sess_finds_each_of_several_small_objects() -> None:
    """The weaker one is next to nothing on the whole map, and fills windows of its own."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    nn.init.ones_(model[0].weight)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 4:7, 4:7], x[..., 25:28, 25:28] = 1.0, 0.6
    plain = HiResCAM(model, "1")(x, 0)[0]
    enhanced = SESS(HiResCAM(model, "1"), scales=(1.0, 2.0), smooth=False)(x, 0)[0]
    assert plain[26, 26] == 0
    assert enhanced[26, 26] > 0.1 * enhanced.max()


def test_sess_says_when_no_window_has_a_positive_score() -> None:
    model, x = net(), photos()
    with pytest.warns(UserWarning, match="SESS map of '2' for 2 of 2 samples is empty: no window has a positive score"):
        found = SESS(LayerCAM(model, EARLY), scales=(1.0, 2.0))(x, lambda out: -out.exp()[:, 1])
    assert (found == 0).all()


def test_options_that_make_no_sense_are_refused() -> None:
    cam = GradCAM(net(), EARLY)
    with pytest.raises(MulticamError, match="each is at least 1"):
        SESS(cam, scales=(0.5, 1.0))
    with pytest.raises(MulticamError, match="step is a part of the window"):
        SESS(cam, step=1.5)
    with pytest.raises(MulticamError, match="batch_size is at least 1, not 0"):
        SESS(cam, batch_size=0)
