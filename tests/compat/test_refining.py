"""The methods around others of the drop-in: theirs, and what differs."""

from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer

from multicam import compat
from tests.helpers.drop_in import Large, Net, images, seeded

pytestmark = pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")


@pytest.mark.parametrize("categories", [None, [1, 4]])
def test_finer_cam_is_theirs(categories: list[int] | None) -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    call = {"alpha": 0.6, "comparison_categories": categories}
    ours = compat.FinerCAM(model, [model.third], base_method=compat.HiResCAM)(x, **call)
    theirs = peer.FinerCAM(model, [model.third], base_method=peer.HiResCAM)(x, **call)
    assert np.abs(ours - theirs).max() < 1e-4


def test_refine_cam_is_theirs() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    layers = [model.second, model.third]
    ours = compat.RefineCAM(model, layers, base_method=compat.LayerCAM)(x, [Large(3), Large(4)])
    theirs = peer.RefineCAM(model, layers, base_method=peer.LayerCAM)(x, [Large(3), Large(4)])
    assert np.abs(ours - theirs).max() < 1e-4


def test_sess_is_nearly_theirs() -> None:
    model, x = seeded(Net), images(2, 3, 24, 24)
    targets = [compat.ClassifierOutputTarget(3)] * 2
    options = {"base_method": compat.LayerCAM, "scales": [24, 36, 50], "step_size": 12}
    ours = compat.SESS(model, [model.third], **options)(x, targets)
    theirs = peer.SESS(model, [model.third], **options | {"base_method": peer.LayerCAM})(x, targets)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.95


def test_refine_cam_smooths_as_it_says() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    cam = compat.RefineCAM(model, [model.second, model.third], base_method=compat.HiResCAM)
    plain, eigen, augmented = cam(x), cam(x, None, True), cam(x, aug_smooth=True)
    assert np.abs(plain - eigen).max() > 1e-3 < np.abs(eigen - augmented).max()


def test_finer_cam_explains_the_class_that_is_asked_for() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    found = [m.FinerCAM(model, [model.third])(x, target_idx=4, comparison_categories=[2]) for m in (compat, peer)]
    assert np.abs(found[0] - found[1]).max() < 1e-4
    given = [m.FinerCAM(model, [model.third])(x, [Large(4)] * 2) for m in (compat, peer)]
    assert np.abs(given[0] - given[1]).max() < 1e-4 < np.abs(found[0] - given[0]).max()


def test_finer_cam_smooths_the_classes_of_the_image() -> None:
    model, x = seeded(Net), images(1, 3, 24, 28)

    class Same:
        @staticmethod
        def augment_image(x: object) -> object:
            return x

        deaugment_mask = augment_image

    cam = compat.FinerCAM(model, [model.third])
    plain, smooth = cam(x), cam(x, aug_smooth=True)
    assert np.abs(plain - smooth).max() > 1e-3
    cam.base_cam.tta_transforms = [Same()] * 2
    assert np.allclose(cam(x, aug_smooth=True), plain, atol=1e-6)


def test_refine_cam_has_a_method_for_each_layer() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    cam = compat.RefineCAM(model, [model.second, model.third], base_method=compat.XGradCAM)
    each = [method(x, [Large(1)] * 2) for method in cam.base_cam_per_layer]
    assert np.allclose(cam(x, [Large(1)] * 2), compat.scale_cam_image(each[0] * each[1]), atol=1e-6)


@pytest.mark.parametrize("name", ["FinerCAM", "RefineCAM", "SESS"])
def test_a_forward_of_a_subclass_is_called(name: str) -> None:
    class Half(getattr(compat, name)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            return super().forward(*given, **named) / 2

    model, x = seeded(Net), images(1, 3, 16, 16)
    options = {"scales": [16]} if name == "SESS" else {}
    expected = getattr(compat, name)(model, ["third"], **options)(x)
    assert np.array_equal(Half(model, ["third"], **options)(input_tensor=x), expected / 2)
