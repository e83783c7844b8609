"""Nothing of the user's is changed: after success, and after whatever is raised halfway."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_grad_cam import GradCAM as PeerGradCAM
from torch import Tensor, nn

from multicam import CAM, HiResCAM, Layer, PackedModel, list_layers
from multicam.cam.catalogue import ONE_PASS
from multicam.cam.weighted import OriginalCAM, ShapleyCAM
from multicam.saliency.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.saliency.captum_bridge import captum_attribution
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient
from multicam.saliency.occluding import occlusion
from tests.helpers.hygiene import LAYERS, Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Overwriting, fusion_inputs, seeded


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("method", [*ONE_PASS, ShapleyCAM, OriginalCAM], ids=lambda m: m.__name__)
@pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")
def test_every_method_leaves_everything_as_it_was(method: type[CAM], when: str) -> None:
    model = dirty()
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    target = raising(Stop) if when == "target raises" else 1
    before = state(model, inputs)
    cam = method(model, {"attn": "attn"} if method is OriginalCAM else LAYERS)
    if when == "normal":
        cam(inputs, target)
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            cam(inputs, target)
    assert_unchanged(before, state(model, inputs))


GRADIENTS = ("gradient", "input_x_gradient", "guided_backprop", "deconvnet")
IN_INPUTS: dict[str, Callable[..., Any]] = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "guided_backprop": guided_backprop,
    "deconvnet": deconvnet,
    "guided_gradcam": lambda model, x, target: guided_gradcam(
        model, x, LAYERS | {"attn": Layer("attn", onto="rgb")}, target
    ),
    "smoothgrad": lambda *call: smoothgrad(*call, samples=2),
    "vargrad": lambda *call: vargrad(*call, samples=2),
    "integrated_gradients": lambda *call: integrated_gradients(*call, steps=3, baseline="blur"),
    "expected_gradients": lambda model, x, target: expected_gradients(model, x, x, target, samples=2),
    "occlusion": lambda *call: occlusion(*call, patch=16),
    **{
        f"captum {name}": partial(captum_attribution, name)
        for name in ("Saliency", "IntegratedGradients", "DeepLift", "GuidedBackprop", "GradientShap")
    },
    "captum FeatureAblation": lambda model, x, target: captum_attribution(
        "FeatureAblation",
        model,
        x,
        target,
        feature_mask={n: torch.zeros(1, *v.shape[1:], dtype=int) for n, v in x.items()},
    ),
    "captum LayerGradCam": lambda *call: captum_attribution("LayerGradCam", *call, layer="rgb.net.0"),
}


def once(model: nn.Module) -> nn.Module:
    """With a ReLU for each use, as DeepLift needs it."""
    for branch in model.branches:
        branch.net[2].inplace = branch.act.inplace = False
    return model


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("name", IN_INPUTS)
@pytest.mark.filterwarnings("ignore:the GradCAM map of layer:UserWarning")
@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting .*hooks:UserWarning")
def test_every_explanation_in_the_inputs_leaves_everything_as_it_was(name: str, when: str) -> None:
    model = once(dirty())
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    passes = iter(range(10**6))

    def after(quiet: int, what: type[BaseException]) -> Callable[..., Any]:
        """Raises in the first pass that is not the one that the call begins with."""
        return lambda *_: raising(what)() if next(passes) >= quiet else None

    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    late = int(name not in GRADIENTS)  # these have one pass only
    if when in stops:
        model.head.register_forward_hook(after(late, stops[when]))
    target: Any = 1
    if when == "target raises":

        def target(output: Tensor) -> Tensor:
            return after(late, Stop)() or output[:, 1]

    options = (
        {"baselines": {n: torch.zeros_like(x) for n, x in inputs.items()}} if name == "captum GradientShap" else {}
    )
    before = state(model, inputs)
    if when == "normal":
        IN_INPUTS[name](model, inputs, target, **options)
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            IN_INPUTS[name](model, inputs, target, **options)
    assert_unchanged(before, state(model, inputs))


def random_model() -> nn.Module:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + torch.randn(1)).mean((2, 3))

    return Random()


def test_a_model_that_draws_random_numbers_does_not_move_the_rng() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    HiResCAM(random_model_once, "conv")(torch.rand(1, 3, 8, 8, generator=torch.Generator()), 0, signed=True)
    assert torch.equal(torch.rand(3), expected)


with torch.random.fork_rng():
    random_model_once = random_model()


@pytest.mark.parametrize("raises", [False, True])
def test_the_proxy_leaves_everything_as_it_was(raises: bool) -> None:
    model, inputs = dirty(), fusion_inputs()
    if raises:
        model.head.register_forward_hook(raising(Stop))
    before = state(model, inputs)
    if raises:
        with pytest.raises(Stop):
            PackedModel(model, inputs, list(LAYERS.values()))
        packed = PackedModel(model, inputs)
        with pytest.raises(Stop):
            packed(packed.pack(inputs))
    else:
        packed = PackedModel(model, inputs, list(LAYERS.values()))
        x = packed.pack(inputs)
        packed.zero_grad()
        packed.train()
        packed.eval()
        PeerGradCAM(packed, packed.target_layers)(x, None)
    assert_unchanged(before, state(model, inputs))


@pytest.mark.parametrize("raises", [False, True])
def test_listing_layers_leaves_everything_as_it_was(raises: bool) -> None:
    model, inputs = dirty(), fusion_inputs()
    if raises:
        model.head.register_forward_hook(raising(Stop))
    before = state(model, inputs)
    if raises:
        with pytest.raises(Stop):
            list_layers(model, inputs)
    else:
        list_layers(model, inputs)
    assert_unchanged(before, state(model, inputs))


def test_a_model_may_write_into_its_inputs_without_reaching_the_users() -> None:
    views, mask = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)], torch.ones(1, 4)
    kept = [v.clone() for v in views]
    first = HiResCAM(seeded(Overwriting), "branch")((views, mask), 1, signed=True)
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True))
    assert mask.all()
    assert torch.equal(first, HiResCAM(seeded(Overwriting), "branch")((views, mask), 1, signed=True))
    packed = PackedModel(seeded(Overwriting), (views, mask))
    packed(packed.pack((views, mask)))
    assert mask.all()
