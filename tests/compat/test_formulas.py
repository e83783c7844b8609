"""What the steps of the drop-in's methods say, array by array, against pytorch-grad-cam's."""

from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
from torch import nn

from multicam import Layer, MulticamError, compat
from multicam.cam import weighted
from multicam.compat.formulas import Asked, Given, as_cam
from tests.helpers.drop_in import Net, images, seeded

pytestmark = pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")
CHANNELS = ["GradCAM", "GradCAMPlusPlus", "XGradCAM"]
CELLS = ["HiResCAM", "GradCAMElementWise", "LayerCAM", "FEM"]


def arrays(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    return np.abs(images(*shape).numpy()), 10 * images(*shape, seed=1).numpy()


@pytest.mark.parametrize("shape", [(2, 12, 4, 5), (2, 12, 3, 4, 5)])
@pytest.mark.parametrize("name", [*CHANNELS, *CELLS])
def test_the_steps_say_what_theirs_say_of_any_arrays(name: str, shape: tuple[int, ...]) -> None:
    model, (acts, grads) = seeded(Net), arrays(*shape)
    cams = [getattr(m, name)(model, [model.third]) for m in (compat, peer)]
    given = None, model.third, None, acts, grads
    if name in CHANNELS:
        ours, theirs = (cam.get_cam_weights(*given) for cam in cams)
        assert np.allclose(ours, theirs, atol=1e-4) and ours.shape == (2, 12)
    ours, theirs = (cam.get_cam_image(*given, False) for cam in cams)
    assert np.allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_arrays_of_double_precision_stay_so() -> None:
    acts, grads = (x.astype(np.float64) for x in arrays(2, 12, 4, 5))
    model = seeded(Net)
    for name in ("GradCAM", "HiResCAM"):
        image = getattr(compat, name)(model, [model.third]).get_cam_image(None, model.third, None, acts, grads)
        assert image.dtype == np.float64
        weights = grads if name == "HiResCAM" else grads.mean((2, 3), keepdims=True)
        assert np.allclose(image, (weights * acts).sum(1), rtol=1e-12)


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM"])
def test_weights_that_take_passes_are_theirs_of_activations_that_a_step_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score-CAM's masks are of what it is given, Ablation-CAM's channels of what the layer returned."""
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))
    target, found = compat.ClassifierOutputTarget(2), []
    for m in (compat, peer):

        class Changed(getattr(m, name)):  # type: ignore[misc]
            def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
                acts[:, 3] = acts[:, 4] ** 2
                found.append(super().get_cam_weights(x, layer, targets, acts[:, ::-1].copy(), grads))
                return found[-1]

        model, x = seeded(Net), images(2, 3, 16, 16)
        Changed(model, [model.third])(x, [target] * 2)
    ours, theirs = found
    # Theirs is divided by the score.
    scale = target(model(x)).detach().numpy()[:, None] if name == "AblationCAM" else 1
    assert np.allclose(ours, theirs * scale, atol=1e-5) and np.ptp(ours) > 1e-4


def test_a_method_without_gradients_is_given_none_and_says_so() -> None:
    class Reading(compat.EigenCAM):
        def get_cam_image(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any, eigen_smooth: bool) -> Any:
            assert grads is None
            return as_cam(compat.GradCAM(self.model, self.target_layers), False).saliency(
                Given("", Layer("third"), torch.from_numpy(acts), torch.zeros(1), None, None)
            )

    model = seeded(Net)
    with pytest.raises(MulticamError, match="reads gradients, but there are none: leave uses_gradients=True"):
        Reading(model, [model.third])(images(1, 3, 16, 16))


def test_a_method_is_the_one_of_multicam_unless_a_subclass_says_otherwise() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)

    class Mine(compat.GradCAM):
        def get_cam_weights(self, *given: Any) -> Any:
            return 2 * super().get_cam_weights(*given)

    plain = as_cam(compat.GradCAM(model, [model.third]), False)
    mine = as_cam(Mine(model, [model.third]), False)
    assert type(plain) is weighted.GradCAM and type(mine) is Asked
    (a,), (b,) = (cam(x, 3, signed=True).values() for cam in (plain, mine))
    assert torch.allclose(2 * a, b, rtol=1e-4, atol=1e-6)
