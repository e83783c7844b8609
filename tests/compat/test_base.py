"""What every method of the drop-in does alike: which layers, which inputs, what it leaves alone, and what many passes take."""

import contextlib

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
from torch import Tensor, nn

from multicam import Layer, MulticamError, compat
from tests.helpers.drop_in import METHODS, Net, ViT, hires, images, seeded
from tests.helpers.hygiene import Stop, assert_unchanged, raising, state
from tests.helpers.models import Branch, Fusion, fusion_inputs

pytestmark = pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM"])
def test_the_size_of_a_batch_may_change_between_calls(name: str) -> None:
    sizes: list[int] = []  # not the model's, whose attributes a pass leaves as they were

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Branch(3, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            features = self.encoder(x).mean((2, 3))
            sizes.append(len(features))
            return self.head(features)

    model, x = seeded(Counted), torch.rand(1, 3, 16, 16)
    cam = getattr(compat, name)(model, [model.encoder])
    beside = int(name == "AblationCAM")  # the unchanged sample runs with its channels
    for size, largest in ((32, 12 + beside), (5, 5)):
        cam.batch_size = size
        sizes.clear()
        cam(x)
        assert max(sizes) == largest and cam.batch_size == size
    cam.batch_size = 0
    with pytest.raises(MulticamError, match="batch_size must be a whole number of at least 1, not 0"):
        cam(x)


def test_operations_in_place_do_not_reach_the_map() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)))
    writing = nn.Sequential(plain[0], nn.ReLU(inplace=True), *plain[2:])
    x = images(1, 3, 8, 8)
    a, b = (compat.GradCAM(model, [model[0]])(x) for model in (plain, writing))
    assert np.array_equal(a, b)
    a, b = (peer.GradCAM(model, [model[0]])(x, None) for model in (plain, writing))
    assert np.abs(a - b).max() > 0.1


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            (self.third(self.second(self.first(x))) + self.third(self.second(self.first(x.flip(3))))).mean((2, 3))
        )


def test_a_shared_layer_needs_the_number_of_its_call() -> None:
    model, x = seeded(Twice), images(2, 3, 16, 16)
    with pytest.raises(MulticamError, match="called 2 times"):
        hires(model, model.third)(x)
    first = hires(model, "third#0")(x)
    assert np.abs(first - peer.HiResCAM(model, [model.third])(x, None)).max() < 1e-4
    assert np.abs(first - hires(model, Layer(model.third, call=1))(x)).max() > 0.1


def test_a_sequential_is_one_layer_with_its_own_output() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    assert np.array_equal(compat.HiResCAM(model, model.third)(x), hires(model, model.third)(x))
    assert np.array_equal(hires(model, "third")(x), hires(model, model.third[1])(x))


def test_aug_smooth_explains_one_class_and_takes_any_transforms() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    cam = hires(model, model.third)
    top = int(model(x).argmax())
    assert np.array_equal(cam(x, aug_smooth=True), cam(x, [compat.ClassifierOutputTarget(top)], aug_smooth=True))

    class Same:
        def augment_image(self, x: Tensor) -> Tensor:
            return x

        deaugment_mask = augment_image

    cam.tta_transforms = [Same()]
    assert np.array_equal(cam(x, aug_smooth=True), cam(x))


def test_multi_input_models_say_on_which_input_a_map_lies() -> None:
    model = seeded(Fusion)
    inputs = fusion_inputs()
    with pytest.raises(MulticamError, match="onto"):
        hires(model, "rgb")(inputs)
    found = hires(model, Layer("depth", onto="depth"))(inputs)
    assert found.shape == tuple(inputs["depth"][:, 0].shape)
    with pytest.raises(MulticamError, match="several sizes"):
        hires(model, Layer("depth", onto="depth"), Layer("rgb", onto="rgb"))(inputs)
    with pytest.raises(MulticamError, match="one image input"):
        hires(model, Layer("depth", onto="depth"))(inputs, aug_smooth=True)


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("name", [*METHODS, "FinerCAM", "RefineCAM", "SESS"])
def test_everything_is_left_as_it_was(name: str, when: str) -> None:
    model = seeded(Net).train()
    model.second.eval()
    model(images(2, 3, 16, 16)).sum().backward()
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    targets = [raising(Stop)] * 2 if when == "target raises" else [compat.ClassifierOutputTarget(3)] * 2
    inputs = {"x": images(2, 3, 16, 16).requires_grad_()}
    before = state(model, inputs)
    options = {"scales": [16, 24]} if name == "SESS" else {}
    silent = when == "normal" or (when == "target raises" and name in ("EigenCAM", "KPCA_CAM", "FEM"))
    with getattr(compat, name)(model, [model.third], **options) as cam, contextlib.ExitStack() as stack:
        if not silent:
            stack.enter_context(pytest.raises((Stop, KeyboardInterrupt)))
        cam(inputs["x"], targets)
    cam.activations_and_grads.release()
    assert_unchanged(before, state(model, inputs))


def test_a_with_block_swallows_nothing() -> None:
    model = seeded(Net)
    with pytest.raises(IndexError), hires(model, model.third):
        [][0]


def test_the_outputs_of_the_last_call_hold_no_graph() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    cam = hires(model, model.third)
    cam(x)
    assert torch.equal(cam.outputs, model(x).detach())
    assert not cam.outputs.requires_grad
    assert torch.equal(cam.activations_and_grads(x), model(x))


@pytest.mark.parametrize("name", ["ShapleyCAM", "LayerCAM"])
def test_transformers_need_no_reshape_where_the_model_proves_the_grid(name: str) -> None:
    model, x = seeded(ViT), images(2, 3, 32, 40)
    found = getattr(compat, name)(model, [model.blocks[0], model.blocks[1].norm1])(x)
    said = getattr(compat, name)(
        model, [model.blocks[0], model.blocks[1].norm1], lambda t: compat.vit_reshape_transform(t, 4, 5)
    )(x)
    assert found.shape == (2, 32, 40)
    np.testing.assert_allclose(found, said, rtol=1e-4, atol=1e-6)


def test_frozen_weights_inference_mode_and_half_precision_work() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    expected = hires(model, model.third)(x)
    with torch.inference_mode():
        assert np.array_equal(hires(model, model.third)(x), expected)
    model.requires_grad_(False)
    assert np.array_equal(hires(model, model.third)(x), expected)
    half = hires(model.bfloat16(), model.third)(x.bfloat16())
    assert half.dtype == np.float32
    assert np.corrcoef(half.ravel(), expected.ravel())[0, 1] > 0.9
    model.head.weight.data[:] = torch.nan
    with pytest.raises(MulticamError, match="NaN"):
        hires(model, model.third)(x.bfloat16(), [compat.ClassifierOutputTarget(1)] * 2)
