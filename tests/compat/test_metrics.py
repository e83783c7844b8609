"""Scores of changed inputs, and pixels imputed from their neighbours: by value, and against pytorch-grad-cam."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam.metrics import arcc, cam_mult_image, perturbation_confidence, road
from torch import Tensor

from multicam import compat
from multicam.metrics.imputing import NEIGHBOURS, impute, score_change
from tests.helpers.drop_in import Net, images, seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # theirs
TARGETS = [compat.ClassifierOutputSoftmaxTarget(3), compat.ClassifierOutputSoftmaxTarget(5)]


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road.NoisyLinearImputer.__init__, "__defaults__", (0.0, road.neighbors_weights))
    monkeypatch.setattr(compat.NoisyLinearImputer.__init__, "__defaults__", (0.0,), raising=False)
    monkeypatch.setattr("multicam.compat.metrics.NoisyLinearImputer", lambda: compat.NoisyLinearImputer(0.0))


def maps(b: int = 2) -> np.ndarray:
    return torch.rand(b, 16, 18, generator=torch.Generator().manual_seed(1)).numpy()


def test_the_change_of_a_score_keeps_the_class_that_was_chosen() -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    top = model(x).argmax(1)
    expected = (model(3 * x) - model(x)).gather(1, top[:, None])[:, 0]
    assert torch.allclose(score_change(model, x, 3 * x), expected, atol=1e-6)


def test_an_imputed_pixel_is_the_weighted_mean_of_its_neighbours() -> None:
    known = torch.rand(2, 16, 18, generator=torch.Generator().manual_seed(2)) > 0.7
    filled = impute(images(2, 3, 16, 18), known, noise=0.0)
    padded = torch.nn.functional.pad(filled, (1, 1, 1, 1))
    inside = torch.nn.functional.pad(torch.ones(16, 18), (1, 1, 1, 1))

    def moved(x: Tensor, y: int, z: int) -> Tensor:
        return x[..., 1 + y : 17 + y, 1 + z : 19 + z]

    total = sum(w * moved(padded, y, z) for y, z, w in NEIGHBOURS)
    weights = sum(w * moved(inside, y, z) for y, z, w in NEIGHBOURS)
    assert torch.allclose(
        filled[:, :, :][~known[:, None].expand_as(filled)],
        (total / weights)[~known[:, None].expand_as(filled)],
        atol=1e-5,
    )
    assert torch.equal(filled[known[:, None].expand_as(filled)], images(2, 3, 16, 18)[known[:, None].expand_as(filled)])


def test_imputing_is_theirs_up_to_the_noise() -> None:
    x, known = images(1, 3, 16, 18), torch.rand(16, 18, generator=torch.Generator().manual_seed(2)) > 0.5
    theirs = road.NoisyLinearImputer(noise=0)(x[0], known.float())
    assert torch.allclose(impute(x, known[None], noise=0.0)[0], theirs, atol=1e-5)


def test_noise_is_repeatable_and_leaves_the_global_random_state_alone() -> None:
    x, known = images(2, 3, 16, 18), torch.zeros(2, 16, 18, dtype=torch.bool)
    known[:, :8] = True
    before = torch.get_rng_state()
    noisy = impute(x, known)
    assert torch.equal(noisy, impute(x, known))
    assert not torch.equal(noisy, impute(x, known, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.005 < (noisy - impute(x, known, noise=0.0))[:, :, 8:].std() < 0.02


def test_an_image_of_which_nothing_is_known_becomes_its_mean_colour() -> None:
    x = images(1, 3, 8, 8)
    filled = impute(x, torch.zeros(1, 8, 8, dtype=torch.bool), noise=0.0)
    assert torch.allclose(filled, x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6)


@pytest.mark.parametrize("name", ["CamMultImageConfidenceChange", "DropInConfidence", "IncreaseInConfidence"])
def test_the_confidence_metrics_are_theirs(name: str) -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    ours = getattr(compat, name)()(x, maps(), TARGETS, model)
    theirs = getattr(cam_mult_image, name)()(x, maps(), TARGETS, model)
    assert np.allclose(ours, theirs, atol=1e-6)


ROAD: dict[str, Callable[[Any], Any]] = {
    "most": lambda module: module.ROADMostRelevantFirst(60.0),
    "least": lambda module: module.ROADLeastRelevantFirst(30.0),
    "combined": lambda module: module.ROADCombined([30.0, 60.0]),
}


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", ROAD)
def test_road_is_theirs(name: str) -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    ours, theirs = (ROAD[name](module)(x, maps(), TARGETS, model) for module in (compat, road))
    assert np.allclose(ours, theirs, atol=1e-5)


def test_a_metric_shows_what_it_changed() -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    call = x, maps(), TARGETS, model
    score, changed = compat.CamMultImageConfidenceChange()(*call, return_visualization=True, return_diff=False)
    their_score, theirs = cam_mult_image.CamMultImageConfidenceChange()(
        *call, return_visualization=True, return_diff=False
    )
    assert torch.equal(changed, theirs)
    assert np.allclose(score, their_score, atol=1e-6)


@pytest.mark.usefixtures("no_noise")
def test_arcc_is_theirs() -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    cams = [module(model, [model.third]) for module in (compat.GradCAM, PeerGradCAM)]
    found = [
        module.ARCC(cam, [30.0, 60.0])(x, maps(), TARGETS, model)
        for module, cam in zip((compat, arcc), cams, strict=True)
    ]
    assert np.allclose(*found, atol=1e-5)


def test_auto_removes_the_most_relevant() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor, mask: Tensor) -> Tensor:
        kept.append(mask)
        return x

    values = torch.tensor([[0.0, 0.1], [0.8, 0.9]])
    for module in (compat, perturbation_confidence):
        module.RemoveMostRelevantFirst("auto", keep)(images(3, 2, 2), values)
    assert kept[0].tolist() == [[1, 1], [0, 0]]
    assert (kept[1] > 0).tolist() == [[False, False], [True, True]]
