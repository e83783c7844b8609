"""Pictures, scaling and layers of the drop-in: theirs, or refused."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam.sobel_cam import sobel_cam
from pytorch_grad_cam.utils import find_layers
from pytorch_grad_cam.utils import image as peer_image
from torch import nn

from multicam import MulticamError, compat
from tests.helpers.drop_in import Net, images, seeded


@pytest.mark.parametrize("use_rgb", [False, True])
def test_the_pictures_are_theirs(use_rgb: bool) -> None:
    img, mask = np.abs(images(8, 9, 3).numpy()).clip(0, 1), np.abs(images(8, 9).numpy()).clip(0, 1)
    for weight in (0.5, 0.2):
        ours, theirs = (
            m.show_cam_on_image(img, mask, use_rgb=use_rgb, image_weight=weight) for m in (compat, peer_image)
        )
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(compat.deprocess_image(img), peer_image.deprocess_image(img))
    eight = (img * 255).astype(np.uint8)
    for picture in (eight, img):
        assert torch.allclose(compat.preprocess_image(picture), peer_image.preprocess_image(picture), atol=1e-6)
    assert np.array_equal(compat.sobel_cam(eight), sobel_cam(eight))
    concepts, colours = np.abs(images(3, 8, 9).numpy()).clip(0, 1), list(np.eye(3))
    ours = compat.show_factorization_on_image(img, concepts, colours)
    theirs = peer_image.show_factorization_on_image(img, concepts.copy(), list(colours))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    scores = images(2, 4).numpy()
    labels = dict(enumerate(["a, b, c, d", "e", "f", "g"]))
    assert compat.create_labels_legend(scores, labels) == peer_image.create_labels_legend(scores, labels)
    legend = compat.show_factorization_on_image(img, concepts, concept_labels=["x", "y", "z"])
    assert legend.shape == (8, 18, 3)


def test_the_scaling_is_theirs() -> None:
    x = images(2, 3, 5, 6).numpy()
    assert np.allclose(compat.scale_cam_image(x[0], (12, 7)), peer_image.scale_cam_image(x[0], (12, 7)), atol=1e-5)
    assert np.allclose(compat.scale_cam_image(x), peer_image.scale_cam_image(x), atol=1e-6)
    ours, theirs = (m.scale_accross_batch_and_channels(x, (12, 7)) for m in (compat, peer_image))
    assert np.allclose(ours, theirs, atol=1e-5)


def test_the_helpers_for_layers_are_theirs() -> None:
    model = seeded(Net)
    assert compat.find_layer_types_recursive(model, [nn.ReLU]) == find_layers.find_layer_types_recursive(
        model, [nn.ReLU]
    )
    identity = nn.Identity()
    assert compat.replace_layer_recursive(model, model.third[1], identity)
    assert model.third[1] is identity
    assert not compat.replace_layer_recursive(model, nn.ReLU(), identity)
    compat.replace_all_layer_type_recursive(model, nn.ReLU, identity)
    assert compat.find_layer_types_recursive(model, [nn.ReLU]) == []


def test_the_pictures_refuse_what_they_cannot_show() -> None:
    img, mask = np.ones((4, 4, 3), np.float32), np.ones((4, 4), np.float32)
    for wrong in ((2 * img, mask), (-img, mask), (img, 2 * mask), (img, mask[:2])):
        with pytest.raises(MulticamError):
            compat.show_cam_on_image(*wrong)
    with pytest.raises(MulticamError, match="image_weight"):
        compat.show_cam_on_image(img, mask, image_weight=2.0)
    assert not compat.show_cam_on_image(0 * img, mask, image_weight=1.0).any()
    concepts = np.ones((2, 4, 4), np.float32)
    compat.show_factorization_on_image(img, concepts)
    assert concepts.all()
