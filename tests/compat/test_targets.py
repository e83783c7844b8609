"""Targets and reshapes of the drop-in: theirs, one for each image, or refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils import model_targets, reshape_transforms
from torch import Tensor

from multicam import MulticamError, compat
from tests.helpers.drop_in import Net, hires, images, seeded

OUTPUTS = torch.tensor([1.0, -2.0, 3.0])
TARGETS: dict[str, Callable[[Any], Any]] = {
    "ClassifierOutputTarget": lambda module: module.ClassifierOutputTarget(2),
    "ClassifierOutputSoftmaxTarget": lambda module: module.ClassifierOutputSoftmaxTarget(1),
    "ClassifierOutputReST": lambda module: module.ClassifierOutputReST(0),
    "BinaryClassifierOutputTarget": lambda module: module.BinaryClassifierOutputTarget(0),
    "SoftmaxOutputTarget": lambda module: module.SoftmaxOutputTarget(),
    "RawScoresOutputTarget": lambda module: module.RawScoresOutputTarget(),
    "FinerWeightedTarget": lambda module: module.FinerWeightedTarget(0, [1, 2], 0.5),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("output", [OUTPUTS, torch.stack([OUTPUTS, -OUTPUTS])], ids=["image", "batch"])
def test_the_targets_are_theirs(name: str, output: Tensor) -> None:
    make = TARGETS[name]
    assert torch.allclose(make(compat)(output), make(model_targets)(output))


def test_the_targets_of_segmentation_and_detection_are_theirs() -> None:
    mask = np.array([[1.0, 0.0], [1.0, 1.0]])
    out = images(3, 2, 2)
    ours, theirs = (m.SemanticSegmentationTarget(1, mask)(out) for m in (compat, model_targets))
    assert torch.allclose(ours.double(), theirs.double())
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [3.0, 3.0, 9.0, 9.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.6]),
    }
    boxes = [np.array(box, np.float32) for box in ([0, 0, 4, 3], [3, 3, 9, 8], [0, 0, 4, 4])]
    ours, theirs = (m.FasterRCNNBoxScoreTarget([1, 2, 2], boxes)(found) for m in (compat, model_targets))
    assert ours.shape == (1,) and torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", ["vit_reshape_transform", "swinT_reshape_transform"])
def test_the_reshapes_are_theirs(name: str) -> None:
    tokens = images(2, 6 + (name[0] == "v"), 4)
    assert torch.equal(getattr(compat, name)(tokens, 2, 3), getattr(reshape_transforms, name)(tokens, 2, 3))


def test_the_pyramid_reshape_is_theirs_and_no_reshape_for_a_gradient() -> None:
    levels = {"0": images(1, 2, 8, 8), "pool": images(1, 2, 4, 4)}
    assert torch.equal(
        compat.fasterrcnn_reshape_transform(levels), reshape_transforms.fasterrcnn_reshape_transform(levels)
    )
    model = seeded(Net)
    with pytest.raises(MulticamError, match="computes new ones"):
        compat.EigenCAM(model, [model.third], lambda x: 2 * x)(images(1, 3, 16, 16))


def test_targets_fit_the_images_or_are_refused() -> None:
    model, x = seeded(Net), images(3, 3, 16, 16)
    cam = hires(model, model.third)
    with pytest.raises(MulticamError, match="1 targets for 3 images"):
        cam(x, [compat.ClassifierOutputTarget(1)])
    with pytest.raises(MulticamError, match="class 5000 does not exist"), cam:
        cam(x, [compat.ClassifierOutputTarget(5000)] * 3)
    with pytest.raises(MulticamError, match=r"returned shape \(10,\)"):
        cam(x, [compat.RawScoresOutputTarget()] * 3)


def test_outputs_that_are_no_tensor_are_given_to_each_target_by_image() -> None:
    class Heads(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.third(self.second(self.first(x)))
            return {"logits": self.head(features.mean((2, 3))), "features": features}

    model, plain, x = seeded(Heads), seeded(Net), images(2, 3, 16, 16)
    expected = hires(plain, plain.third)(x, [compat.ClassifierOutputTarget(c) for c in (3, 4)])
    named = [lambda out: out["logits"][3], lambda out: out["logits"][4]]
    assert np.array_equal(hires(model, model.third)(x, named), expected)
    picked = hires(model, model.third, output="logits")
    assert np.array_equal(picked(x, [compat.ClassifierOutputTarget(c) for c in (3, 4)]), expected)
    with pytest.raises(MulticamError, match="output"):
        hires(model, model.third)(x)

    class Detector(Net):
        def forward(self, x: Tensor) -> Any:
            return [{"scores": row} for row in super().forward(x)]

    detector = seeded(Detector)
    found = hires(detector, detector.third)(x, [lambda out: out["scores"][3], lambda out: out["scores"][4]])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["EigenCAM", "KPCA_CAM", "FEM"])
def test_methods_without_a_target_take_any_output(name: str) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return "boxes", [1, 2]

    model, plain, x = seeded(Odd), seeded(Net), images(2, 3, 16, 16)
    expected = getattr(compat, name)(plain, [plain.third])(x)
    assert np.array_equal(getattr(compat, name)(model, [model.third])(x), expected) and expected.any()


def test_as_many_heads_as_images_are_no_list_of_images() -> None:
    class Heads(Net):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return [scores, -scores]

    model, x = seeded(Heads), images(3, 3, 16, 16)
    plain = seeded(Net)
    found = hires(model, model.third)(x[:2], [lambda heads: heads[0][3], lambda heads: heads[0][4]])
    expected = hires(plain, plain.third)(x[:2], [lambda row: row[3], lambda row: row[4]])
    np.testing.assert_allclose(found, expected, atol=1e-6)
