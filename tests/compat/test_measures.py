"""The metrics of the drop-in, against those of pytorch-grad-cam."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam.metrics import arcc, cam_mult_image, perturbation_confidence, road
from torch import Tensor

from multicam import compat
from tests.helpers.drop_in import Net, images, seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # theirs
TARGETS = [compat.ClassifierOutputSoftmaxTarget(3), compat.ClassifierOutputSoftmaxTarget(5)]


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road.NoisyLinearImputer.__init__, "__defaults__", (0.0, road.neighbors_weights))
    monkeypatch.setattr(compat.NoisyLinearImputer.__init__, "__defaults__", (0.0,), raising=False)
    monkeypatch.setattr("multicam.compat.measures.NoisyLinearImputer", lambda: compat.NoisyLinearImputer(0.0))


def maps(b: int = 2) -> np.ndarray:
    return torch.rand(b, 16, 18, generator=torch.Generator().manual_seed(1)).numpy()


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
