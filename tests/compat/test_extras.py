"""Guided backpropagation and factorisation of the drop-in: theirs, and nothing of the model's changed."""

import numpy as np
import pytorch_grad_cam as peer
from torch import Tensor

from multicam import compat
from tests.helpers.drop_in import Net, images, resnet, seeded


def test_guided_backpropagation_is_theirs_and_leaves_the_model_alone() -> None:
    model, x = seeded(resnet), images(1, 3, 32, 32)
    before = list(model.modules())
    ours = compat.GuidedBackpropReLUModel(model)(x, target_category=3)
    assert list(model.modules()) == before
    assert not x.requires_grad
    again = compat.GuidedBackpropReLUModel(model)(x, target_category=3)
    theirs = peer.GuidedBackpropReLUModel(model)(x.clone(), target_category=3)
    assert np.array_equal(ours, again)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_guided_backpropagation_runs_the_model_as_a_subclass_says() -> None:
    found = []
    for m in (compat, peer):

        class Second(m.GuidedBackpropReLUModel):
            def forward(self, input_img: Tensor) -> Tensor:
                return super().forward(input_img.flip(3)).softmax(1)

        model, x = seeded(resnet), images(1, 3, 32, 32)
        found.append(Second(model)(x, 3))
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[1]).max()
    plain = compat.GuidedBackpropReLUModel(seeded(resnet))(images(1, 3, 32, 32), 3)
    assert np.abs(found[0] - plain).max() > 0.1 * np.abs(plain).max()


def test_deep_feature_factorization_finds_what_theirs_finds() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    concepts, maps, scores = compat.DeepFeatureFactorization(model, model.third, computation_on_concepts=model.head)(
        x, 2
    )
    theirs, their_maps, their_scores = peer.DeepFeatureFactorization(
        model, model.third, computation_on_concepts=model.head
    )(x, 2)
    assert (concepts.shape, scores.shape) == (theirs.shape, their_scores.shape)
    assert [m.shape for m in maps] == [m.shape for m in their_maps]
    assert all(m.min() >= 0 and m.max() <= 1 for m in maps)


def test_concepts_of_one_image_are_shown() -> None:
    class Named(Net):
        config = type("Config", (), {"id2label": {i: f"class {i}" for i in range(10)}})

    model, x = seeded(Named), images(3, 16, 16)
    shown = compat.run_dff_on_image(model, model.third, model.head, np.zeros((16, 16, 3), np.uint8), x, None, 2)
    assert shown.shape == (16, 48, 3)
