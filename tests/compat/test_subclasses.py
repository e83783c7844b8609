"""Subclasses of the drop-in's classes: each body, made of pytorch-grad-cam's class and of the one here, has the same maps."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
from torch import Tensor, nn

from multicam import Layer, MulticamError, compat
from tests.helpers.drop_in import METHODS, Large, Net, Soft, ViT, images, linear_zoom, resnet, seeded
from tests.helpers.hygiene import Stop, assert_unchanged, state
from tests.helpers.subclasses import BODIES, Body, base_of, second_derivatives, weights_of_a_method, what_ifs_of_its_own

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning"),
    # What pytorch-grad-cam leaves behind where a call failed.
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]
CASES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...], Any]] = {
    "a layer": (Net, ["third"], (2, 3, 24, 28), None),
    "two layers": (Net, ["second", "third"], (2, 3, 24, 28), None),
    "tokens": (ViT, ["blocks.0"], (2, 3, 32, 40), lambda t: compat.vit_reshape_transform(t, 4, 5)),
    "volumes": (lambda: Net(3), ["second", "third"], (2, 3, 12, 16, 16), None),
    "residuals": (resnet, ["layer3.1", "layer4.1"], (2, 3, 32, 32), None),
}


def both(body: Body, case: str, targets: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    make, paths, shape, reshape = CASES[case]
    found = []
    for m in (compat, peer):
        model, x = seeded(make), images(*shape)
        cam = body(m)(model, [model.get_submodule(path) for path in paths], reshape)
        found.append(cam(input_tensor=x, targets=targets, **call))
    ours, theirs = found
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ours, theirs


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.parametrize("case", ["a layer", "two layers", "tokens", "volumes"])
def test_a_subclass_has_the_maps_that_it_has_there(body: Body, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if body is second_derivatives and case != "a layer":
        pytest.skip("pytorch-grad-cam reshapes nothing that has a history, and has one for a single layer only")
    monkeypatch.setattr("pytorch_grad_cam.utils.image.zoom", linear_zoom)
    ours, theirs = both(body, case, [Soft(3), Soft(7)])
    assert np.abs(ours - theirs).max() < 1e-4 and np.ptp(ours) > 0.1


@pytest.mark.parametrize("targets", [None, [Large(2), Large(5)]])
@pytest.mark.parametrize("aug_smooth", [False, True])
def test_the_arguments_of_a_call_reach_a_subclass(targets: Any, aug_smooth: bool) -> None:
    if targets is None and aug_smooth:
        pytest.skip("pytorch-grad-cam explains another class in each copy")
    ours, theirs = both(weights_of_a_method, "residuals", targets, aug_smooth=aug_smooth)
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_classes_that_a_call_chooses_are_told() -> None:
    told: list[list[int]] = []

    def body(m: ModuleType) -> Any:
        class Telling(m.GradCAM):
            def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
                told.append([int(target.category) for target in targets])
                return super().get_cam_weights(x, layer, targets, acts, grads)

        return Telling

    both(body, "a layer", None)
    assert told[0] == told[1] and len(told) == 2


@pytest.mark.parametrize("refinement", ["FinerCAM", "RefineCAM"])
def test_a_refinement_asks_a_subclass(refinement: str) -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    found = [
        getattr(m, refinement)(model, [model.second, model.third], base_method=weights_of_a_method(m))(x, None)
        for m in (compat, peer)
    ]
    plain = getattr(compat, refinement)(model, [model.second, model.third], base_method=compat.GradCAM)(x)
    assert np.abs(found[0] - found[1]).max() < 1e-4 < np.abs(found[0] - plain).max()


def test_sess_asks_a_subclass_for_its_formula() -> None:
    class Same(compat.BaseCAM):
        def get_cam_image(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any, eigen_smooth: bool) -> Any:
            return (grads * acts).sum(1)

    class Reduced(compat.HiResCAM):
        def aggregate_multi_layers(self, maps: Any) -> Any:
            return maps[0][:, 0]

    model, x = seeded(Net), images(1, 3, 16, 16)
    options = {"scales": [16, 20], "step_size": 16}
    expected = compat.SESS(model, [model.third], base_method=compat.HiResCAM, **options)(x)
    assert np.abs(compat.SESS(model, [model.third], base_method=Same, **options)(x) - expected).max() < 1e-5
    with pytest.raises(MulticamError, match="only get_cam_image and get_cam_weights of Reduced would be asked"):
        compat.SESS(model, [model.third], base_method=Reduced, **options)(x)


def test_weights_may_be_of_channels_or_cells() -> None:
    class Weighing(compat.BaseCAM):
        shape = "channels"

        def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
            mean = grads.mean((2, 3))
            return {
                "channels": mean,
                "kept axes": mean[:, :, None, None],
                "cells": grads,
                "tensor": torch.tensor(mean),
            }[self.shape]

    model, x = seeded(Net), images(2, 3, 16, 16)
    channels, cells = (cam(model, [model.third])(x) for cam in (compat.GradCAM, compat.HiResCAM))
    cam = Weighing(model, [model.third])
    for shape in ("channels", "kept axes", "cells", "tensor"):
        cam.shape = shape
        assert np.allclose(cam(x), cells if shape == "cells" else channels, atol=1e-5), shape


def test_a_step_may_be_put_on_one_object() -> None:
    found = []
    for m in (compat, peer):
        model, x = seeded(Net), images(2, 3, 16, 16)
        cam = m.GradCAM(model, [model.third])
        cam.get_cam_weights = lambda x, layer, targets, acts, grads: grads.max((2, 3))
        found.append(cam(x, [Large(1), Large(2)]))
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_steps_see_a_model_that_evaluates_and_leave_it_training() -> None:
    make, x = (
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))),
        images(2, 3, 8, 8),
    )
    model, trained = seeded(make), seeded(make).train()
    expected = what_ifs_of_its_own(compat)(model, [model[1]])(x, [Large(1)] * 2)
    trained.zero_grad(set_to_none=True)
    before = state(trained, {"x": x})
    assert np.array_equal(what_ifs_of_its_own(compat)(trained, [trained[1]])(x, [Large(1)] * 2), expected)
    assert_unchanged(before, state(trained, {"x": x}))


@pytest.mark.parametrize("step", ["get_cam_weights", "get_cam_image", "aggregate_multi_layers", "forward"])
def test_a_step_that_fails_leaves_everything_as_it_was(step: str) -> None:
    def stop(self: Any, *given: Any) -> Any:
        raise Stop

    model, x = seeded(Net).train(), images(2, 3, 16, 16)
    cam = type("Failing", (compat.GradCAM,), {step: stop})(model, [model.third])
    before = state(model, {"x": x})
    with pytest.raises(Stop):
        cam(x)
    assert_unchanged(before, state(model, {"x": x}))


def test_a_step_draws_from_the_random_state_of_the_script() -> None:
    class Random(compat.BaseCAM):
        def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
            return np.random.uniform(-1, 1, acts.shape[:2])  # noqa: NPY002 (what such scripts write)

    model, x = seeded(Net), images(2, 3, 16, 16)
    found = []
    for cam in (Random(model, [model.third]), peer.RandomCAM(model, [model.third])):
        np.random.seed(3)  # noqa: NPY002
        found.append([cam(x, [Large(1)] * 2) for _ in range(2)])
    assert np.allclose(found[0], found[1], atol=1e-4)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1


def test_attributes_may_be_set_anew() -> None:
    a, b, x = seeded(Net), seeded(Net, 1), images(2, 3, 16, 16)
    cam = weights_of_a_method(compat)(a, [a.third])
    cam.model, cam.target_layers = b, [b.second]
    assert np.array_equal(cam(x), weights_of_a_method(compat)(b, [b.second])(x))
    kernel = compat.KPCA_CAM(a, [a.third], kernel="linear")
    kernel.kernel, kernel.gamma = "sigmoid", 0.1
    assert np.array_equal(kernel(x), compat.KPCA_CAM(a, [a.third], gamma=0.1)(x))


@pytest.mark.parametrize("name", [*METHODS, "RandomCAM"])
def test_a_subclass_may_use_any_name_that_is_free_there(name: str) -> None:
    """Such as `layers`, `engine` or `options`: what the drop-in needs besides begins with an underscore."""
    model, x = seeded(Net), images(1, 3, 16, 16)
    ours, theirs = (getattr(m, name)(model, [model.third]) for m in (compat, peer))
    assert {attribute for attribute in dir(ours) if not attribute.startswith("_")} <= {*dir(theirs)} | {
        "output",
        "outputs",
        "cuda",
    } | {"batch_size"}
    expected = ours(x)
    for attribute in ("cuda", "device", "layers", "engine", "options", "bound", "given"):
        setattr(ours, attribute, None)
    assert np.array_equal(ours(x), expected)


def test_calls_of_a_shared_layer_are_told_apart() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (self.third(self.second(self.first(y))) for y in (x, x.flip(3)))
            return self.head((a + b).mean((2, 3)))

    class Each(compat.AblationCAM):
        def get_cam_image(self, *given: Any) -> Any:
            asked.append(given[1])
            return super().get_cam_image(*given)

        def aggregate_multi_layers(self, maps: Any) -> Any:
            return np.concatenate(maps, axis=1)

    asked: list[Any] = []
    model, x = seeded(Twice), images(2, 3, 16, 16)
    layers = [Layer("third", call=1), "third#0"]
    found = Each(model, layers)(x)
    assert asked == layers
    alone = np.concatenate([Each(model, [layer])(x) for layer in layers], axis=1)
    assert np.allclose(found, alone, atol=1e-5) and np.abs(alone[:, 0] - alone[:, 1]).max() > 0.1


def step(name: str, returned: Any = None) -> dict[str, Any]:
    return {name: lambda self, *given, **named: returned}


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (compat.ShapleyCAM, "get_cam_weights"),
        (compat.ShapleyCAM, "get_cam_image"),
        (compat.AblationCAM, "save_activation"),
        (compat.AblationCAM, "assemble_ablation_scores"),
        (compat.FullGrad, "get_bias_data"),
        (compat.FullGrad, "get_cam_image"),
        (compat.SESS, "forward_single_image"),
        (compat.SESS, "get_scores"),
        (compat.GuidedBackpropReLUModel, "recursive_replace_relu_with_guidedrelu"),
    ],
)
@pytest.mark.parametrize("how", ["here", "in a mixin", "below"])
def test_a_class_with_a_step_that_is_never_asked_is_refused_when_it_is_made(cls: type, name: str, how: str) -> None:
    below = type("Below", (cls,), {}) if how == "below" else cls
    bases = (type("Mixin", (), step(name)), below) if how == "in a mixin" else (below,)
    with pytest.raises(MulticamError, match=f"Mine defines {name}, which would never be called here: "):
        type("Mine", bases, {} if how == "in a mixin" else step(name))


@pytest.mark.parametrize(
    ("cls", "body", "message"),
    [
        (compat.HiResCAM, step("get_cam_weights"), "HiResCAM's get_cam_image does not ask"),
        (compat.FEM, step("get_cam_weights"), "derive it from BaseCAM"),
        (compat.GradCAM, step("get_loss"), "nothing calls: say the score by targets"),
        (compat.BaseCAM, {}, "neither get_cam_weights nor get_cam_image"),
        (
            compat.GradCAM,
            {"get_cam_weights": lambda self, x, category, acts, grads: 0},
            r"called as get_cam_weights\(input",
        ),
        (compat.LayerCAM, {"get_cam_image": lambda self, x, category, acts, grads: 0}, "too many positional arguments"),
        (
            compat.GradCAM,
            step("get_cam_weights", np.ones(12)),
            r"the shape \(12,\); it is .* \(2, 12\), or .* \(2, 12, 4, 4\)",
        ),
        (compat.GradCAM, step("get_cam_weights", np.full((2, 12), np.nan)), "returned NaN or infinity"),
        (compat.BaseCAM, step("get_cam_image", np.full((2, 4, 4), np.inf)), "returned NaN or infinity"),
        (compat.BaseCAM, step("get_cam_image", np.float32(1)), r"shape \(\), not \(b \*grid\)"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(cls: Any, body: dict[str, Any], message: str) -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    with pytest.raises(MulticamError, match=message):
        type("Mine", (cls,), body)(model, [model.third])(x)


def test_a_helper_of_a_subclass_may_have_any_name() -> None:
    """Also one that nothing else would ask, where the subclass asks for it."""

    class Own(base_of(compat)):
        def get_loss(self, output: Tensor) -> Tensor:
            return output[:, 1].sum()

        def forward(self, x: Tensor, targets: Any, eigen_smooth: bool = False) -> Any:
            self.get_loss(self.activations_and_grads(x)).backward()
            return self.aggregate_multi_layers(self.compute_cam_per_layer(x, targets, eigen_smooth))

        def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
            return grads.mean((2, 3))

    model, x = seeded(Net), images(2, 3, 16, 16)
    assert np.allclose(Own(model, [model.third])(x), compat.GradCAM(model, [model.third])(x, 1), atol=1e-5)


def test_methods_that_run_passes_say_so_where_somebody_else_runs_the_model() -> None:
    class Own(compat.ScoreCAM):
        def forward(self, x: Tensor, targets: Any, eigen_smooth: bool = False) -> Any:
            self.activations_and_grads(x)
            return self.compute_cam_per_layer(x, targets, eigen_smooth)

    model, x = seeded(Net), images(2, 3, 16, 16)
    with pytest.raises(MulticamError, match="ScoreCAM runs passes of its own"):
        Own(model, [model.third])(x)
