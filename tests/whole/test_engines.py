"""Other people's engines, unchanged, on models with several inputs; and our maps against theirs on models with one.

Where an engine is right, its map is ours up to its own normalisation. Where it is not, the test says by how much.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import captum.attr as captum
import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
import torch.nn.functional as F
import torchcam.methods as torchcam
import torchvision
from einops import einsum
from pytorch_grad_cam.ablation_layer import AblationLayer
from torch import Tensor, nn

import multicam as mc
from tests.helpers.engines import (
    CLASS,
    SUBJECTS,
    Subject,
    as_pgc_scales,
    assert_close,
    every_subject,
    pgc_raw,
    phases,
    score_of_class,
)  # fmt: skip
from tests.helpers.models import Captioned, Fusion, Siamese, fusion_inputs, seeded

# pytorch-grad-cam


@every_subject
@pytest.mark.parametrize(
    ("engine", "method"),
    [
        (pgc.GradCAM, mc.GradCAM),
        (pgc.HiResCAM, mc.HiResCAM),
        (pgc.GradCAMElementWise, mc.GradCAMElementWise),
        (pgc.XGradCAM, mc.XGradCAM),
        (pgc.LayerCAM, mc.LayerCAM),
    ],
    ids=lambda value: value.__name__,
)
def test_pytorch_grad_cam_through_the_proxy(
    subject: Callable[[], Subject], engine: type[pgc.base_cam.BaseCAM], method: type[mc.CAM]
) -> None:
    it = subject()
    packed, x = it.packed()
    with engine(packed, packed.target_layers) as cam:
        found = cam(x, [score_of_class()] * len(x))
    expected = it.saliency(method)
    # The cross-attention's map is nearly flat, and scaling to 0 … 1 enlarges its rounding.
    np.testing.assert_allclose(found, as_pgc_scales(expected, x), atol=1e-5 if it.layer != "attn" else 1e-4)
    assert_close(pgc_raw(engine, packed, packed.target_layers[0], x), expected)
    on_inputs = packed.maps(found)
    assert {name: m.shape[1:] for name, m in on_inputs.items()} == {k: v.shape[-2:] for k, v in it.inputs.items()}


@every_subject
@pytest.mark.parametrize(
    ("engine", "method"),
    [(pgc.EigenCAM, mc.EigenCAM), (pgc.EigenGradCAM, mc.EigenGradCAM)],
    ids=lambda value: value.__name__,
)
def test_eigen_maps_agree_but_for_the_sign_that_pytorch_grad_cam_leaves_to_chance(
    subject: Callable[[], Subject], engine: type[pgc.base_cam.BaseCAM], method: type[mc.CAM]
) -> None:
    it = subject()
    packed, x = it.packed()
    found, expected = pgc_raw(engine, packed, packed.target_layers[0], x), it.saliency(method)
    flip = torch.where((found * expected).sum((1, 2), keepdim=True) < 0, -1, 1)
    assert_close(flip * found, expected, 1e-4)


@every_subject
def test_grad_cam_plus_plus_of_pytorch_grad_cam_needs_large_gradients(subject: Callable[[], Subject]) -> None:
    it = subject()
    packed, x = it.packed()
    (tap,) = packed.target_layers

    def error(factor: float) -> float:
        expected = it.saliency(mc.GradCAMPlusPlus, lambda output: factor * output[:, CLASS])
        found = pgc_raw(pgc.GradCAMPlusPlus, packed, tap, x, factor)
        return float((found - expected).abs().max() / expected.abs().max())

    # Its epsilon of 1e-6 stands beside the squares and cubes of gradients, here of 1e-3.
    assert error(1) > 1e-2
    assert error(1e4) < 1e-4


@contextmanager
def without_channel(module: nn.Module, channel: int) -> Iterator[None]:
    def ablate(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([channel]), 0)

    handle = module.register_forward_hook(ablate)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", ["rgb", "depth", "texture"])
def test_ablation_cam_through_the_proxy(layer: str) -> None:
    it = Subject(seeded(Fusion), fusion_inputs(), layer)
    packed, x = it.packed()
    found = []
    for sample in range(2):
        with pgc.AblationCAM(packed, packed.target_layers, ablation_layer=AblationLayer()) as cam:
            weights = cam.get_cam_weights(x[sample : sample + 1], packed.target_layers[0], [score_of_class()],
                                          it.site().acts[sample : sample + 1].numpy(), None)  # fmt: skip
        found.append(torch.as_tensor(weights))
    with torch.no_grad():
        whole = it.model(**it.inputs)[:, CLASS]
        ablated = []
        for channel in range(16):
            with without_channel(it.model.get_submodule(layer), channel):
                ablated.append(it.model(**it.inputs)[:, CLASS])
    expected = (whole[:, None] - torch.stack(ablated, 1)) / whole[:, None]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


def score_cam(it: Subject, align_corners: bool) -> Tensor:
    """Score-CAM of a model whose inputs all have the canvas' size: every input is masked by each channel."""
    acts = it.site().acts
    masks = F.interpolate(acts, (32, 32), mode="bilinear", align_corners=align_corners)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    masks = (masks - low) / (high - low + 1e-8)
    with torch.no_grad():
        scores = [it.model(*(x * masks[:, c : c + 1] for x in it.inputs.values()))[:, CLASS] for c in range(16)]
    return einsum(torch.stack(scores, 1).softmax(1), acts, "b c, b c h w -> b h w")


@pytest.mark.parametrize("call", ["encoder#0", "encoder#1"])
def test_score_cam_of_pytorch_grad_cam_through_the_proxy(call: str) -> None:
    it = Subject(seeded(Siamese), phases(), call)
    packed, x = it.packed()
    found = pgc_raw(pgc.ScoreCAM, packed, packed.target_layers[0], x)
    assert_close(found, score_cam(it, align_corners=True))


def test_all_branches_come_from_one_pass() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    packed = mc.PackedModel(model, inputs, ["depth", "attn", "rgb"])
    x = packed.pack(inputs)
    targets = [score_of_class()] * 2
    with pgc.GradCAM(packed, packed.target_layers) as cam:
        cam(x, targets)
        per_layer = cam.compute_cam_per_layer(x, targets, False)
    # The engine lists layers in the order in which they ran.
    for layer, found in zip(["rgb", "depth", "attn"], per_layer, strict=True):
        expected = as_pgc_scales(Subject(model, inputs, layer).saliency(mc.GradCAM), x)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


# torchcam


@every_subject
@pytest.mark.parametrize(
    ("engine", "method"),
    [
        (torchcam.GradCAM, mc.GradCAM),
        (torchcam.LayerCAM, mc.LayerCAM),
        (torchcam.XGradCAM, mc.XGradCAM),
    ],
    ids=lambda value: value.__name__,
)
def test_torchcam_through_the_proxy(subject: Callable[[], Subject], engine: Any, method: type[mc.CAM]) -> None:
    it = subject()
    packed, x = it.packed()
    with engine(packed, packed.target_layers[0]) as extract:
        (found,) = extract(CLASS, packed(x), normalized=False)
    assert_close(found, it.saliency(method).relu())


@every_subject
def test_grad_cam_plus_plus_of_torchcam_weighs_by_cubed_gradients(subject: Callable[[], Subject]) -> None:
    it = subject()
    packed, x = it.packed()
    with torchcam.GradCAMpp(packed, packed.target_layers[0]) as extract:
        (found,) = extract(CLASS, packed(x), normalized=False)
    # Its division works on a copy, so that alpha stays G² instead of eq. 19.
    site = it.site()
    assert_close(found, einsum(site.grads.relu() ** 3, site.acts, "b c i j, b c h w -> b h w").relu())


# Signed activations, as in front of a ReLU, bring the denominator of eq. 19 close to zero.
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "in place behind"])
def test_smooth_grad_cam_plus_plus_without_noise_is_grad_cam_plus_plus(name: str) -> None:
    it = SUBJECTS[name]()
    packed, x = it.packed()
    with torchcam.SmoothGradCAMpp(packed, packed.target_layers[0], num_samples=1, std=1e-9) as extract:
        packed(x)
        (found,) = extract(targets=score_of_class(100), normalized=False)
    assert_close(found, it.saliency(mc.GradCAMPlusPlus, lambda output: 100 * output[:, CLASS]).relu(), 1e-3)


@pytest.mark.parametrize("call", ["encoder#0", "encoder#1"])
def test_score_cam_of_torchcam_through_the_proxy(call: str) -> None:
    it = Subject(seeded(Siamese), phases(), call)
    packed, x = it.packed()
    with torchcam.ScoreCAM(packed, packed.target_layers[0]) as extract, torch.no_grad():
        packed(x)
        (found,) = extract(CLASS, normalized=False)
    assert_close(found, score_cam(it, align_corners=False), 1e-3)


# captum


@every_subject
def test_captum_layer_attribution_through_the_proxy(subject: Callable[[], Subject]) -> None:
    it = subject()
    packed, x = it.packed()
    (tap,) = packed.target_layers
    found = captum.LayerGradCam(packed, tap).attribute(x, CLASS)
    assert_close(found[:, 0].detach(), it.saliency(mc.GradCAM))
    torch.testing.assert_close(captum.LayerActivation(packed, tap).attribute(x), it.site().acts, rtol=0, atol=0)
    products = captum.LayerGradientXActivation(packed, tap).attribute(x, CLASS)
    assert_close(products.sum(1).detach(), it.saliency(mc.HiResCAM))


def attributed(
    engine: Callable[[nn.Module], Any], model: nn.Module, **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """The same attribution of each input, through the proxy and by captum's own support for several inputs."""
    inputs = fusion_inputs()
    packed = mc.PackedModel(model, inputs)
    x = packed.pack(inputs).requires_grad_()
    through = engine(packed).attribute(x, target=CLASS, **options).detach()
    several = tuple(leaf.clone().requires_grad_() for leaf in inputs.values())
    own = engine(model).attribute(several, target=CLASS, **options)
    return dict(zip(inputs, zip(packed.unpack(through).leaves.values(), own, strict=True), strict=True))


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (captum.Saliency, {}),
        (captum.InputXGradient, {}),
        (captum.IntegratedGradients, {"n_steps": 8}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_captum_input_attribution_is_the_same_packed(
    engine: Callable[[nn.Module], Any], options: dict[str, Any], batch_first: bool, frozen: bool
) -> None:
    model = seeded(Fusion, batch_first=batch_first).requires_grad_(not frozen)
    for through, own in attributed(engine, model, **options).values():
        assert_close(through, own.detach())


def out_of_place(model: nn.Module) -> nn.Module:
    """captum's guided backpropagation cannot hook activations in place, with or without the proxy."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations:UserWarning")  # what the method is
def test_guided_backpropagation_is_the_same_packed() -> None:
    model = out_of_place(seeded(Fusion))
    for through, own in attributed(captum.GuidedBackprop, model).values():
        assert_close(through, own.detach())


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations:UserWarning")  # what the method is
def test_guided_grad_cam_is_the_same_packed() -> None:
    model = out_of_place(seeded(Fusion))
    inputs = fusion_inputs()
    packed = mc.PackedModel(model, inputs)  # without taps the model's own modules can be hooked
    found = captum.GuidedGradCam(packed, model.texture).attribute(packed.pack(inputs).requires_grad_(), target=CLASS)
    guided, _ = attributed(captum.GuidedBackprop, model)["texture"]
    cam = Subject(model, inputs, "texture").saliency(mc.GradCAM).relu()
    # captum lays the map on the canvas with its default, the nearest cell.
    on_canvas = F.interpolate(cam[:, None], packed.spec.pack(packed.inputs).shape[-2:])
    assert_close(packed.unpack(found.detach()).leaves["texture"], guided * on_canvas[..., : guided.shape[-1]])


@pytest.mark.parametrize("engine", [pgc.GradCAM, torchcam.GradCAM], ids=["pytorch-grad-cam", "torchcam"])
def test_without_taps_an_engine_keeps_what_its_hooks_on_the_models_own_modules_see(engine: Any) -> None:
    model, inputs = out_of_place(seeded(Fusion)), fusion_inputs()
    expected = Subject(model, inputs, "texture").saliency(mc.GradCAM)
    packed = mc.PackedModel(model, inputs)
    x = packed.pack(inputs)
    if engine is pgc.GradCAM:
        assert_close(pgc_raw(engine, packed, model.texture, x), expected)
        return
    with engine(packed, model.texture) as extract:
        (found,) = extract(CLASS, packed(x), normalized=False)
    assert_close(found, expected.relu())


@pytest.mark.filterwarnings("ignore:Setting (forward|backward hooks)")  # what the method is
@pytest.mark.parametrize("tapped", [False, True])
def test_deep_lift_is_the_same_packed(tapped: bool) -> None:
    """Its hooks leave what they see in attributes of the model's modules until the backward pass, and take it away then."""
    model, inputs = out_of_place(seeded(Fusion)), fusion_inputs()
    several = tuple(leaf.clone().requires_grad_() for leaf in inputs.values())
    own = captum.DeepLift(copy.deepcopy(model)).attribute(several, target=CLASS)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    packed = mc.PackedModel(model, inputs, ["rgb"] if tapped else None)
    found = captum.DeepLift(packed).attribute(packed.pack(inputs).requires_grad_(), target=CLASS).detach()
    for through, expected in zip(packed.unpack(found).leaves.values(), own, strict=True):
        assert_close(through, expected.detach())
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before


# The user's model after somebody else's engine


def state(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "values": {name: t.tolist() for name, t in model.state_dict().items()},
    }


def with_torchcam(engine: Any) -> Callable[[mc.PackedModel, Tensor], Any]:
    def drive(packed: mc.PackedModel, x: Tensor) -> Any:
        with engine(packed, packed.target_layers[0]) as extract:
            return extract(CLASS, packed(x))

    return drive


def with_pgc(engine: Any) -> Callable[[mc.PackedModel, Tensor], Any]:
    def drive(packed: mc.PackedModel, x: Tensor) -> Any:
        with engine(packed, packed.target_layers) as cam:
            return cam(x, [score_of_class()] * len(x))

    return drive


DRIVES: dict[str, Callable[[mc.PackedModel, Tensor], Any]] = {
    **{f"pytorch-grad-cam {e.__name__}": with_pgc(e) for e in
       (pgc.GradCAM, pgc.HiResCAM, pgc.GradCAMPlusPlus, pgc.EigenCAM, pgc.ScoreCAM, pgc.AblationCAM)},
    **{f"torchcam {e.__name__}": with_torchcam(e) for e in
       (torchcam.GradCAM, torchcam.LayerCAM, torchcam.SmoothGradCAMpp, torchcam.ScoreCAM)},
    "captum LayerGradCam": lambda packed, x: captum.LayerGradCam(packed, packed.target_layers[0]).attribute(x, CLASS),
}  # fmt: skip


@pytest.mark.parametrize("engine", DRIVES)
def test_the_users_model_is_as_it_was(engine: str) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    model.rgb.requires_grad_(False)
    model.depth.train()
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    model.attn.register_forward_hook(lambda module, args, output: None)
    before, kept = state(model), {name: x.clone() for name, x in inputs.items()}
    packed = mc.PackedModel(model, inputs, ["texture"])
    DRIVES[engine](packed, packed.pack(inputs))
    assert state(model) == before
    for name, x in kept.items():
        assert torch.equal(inputs[name], x)
        assert inputs[name].grad is None


@pytest.mark.parametrize("engine", DRIVES)
def test_the_users_model_is_as_it_was_when_it_raises(engine: str) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    model.train()
    packed = mc.PackedModel(model, inputs, ["texture"])
    x = packed.pack(inputs)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("out of luck")

    handle = model.head.register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        DRIVES[engine](packed, x)
    assert state(model) == before
    handle.remove()


# Held leaves and engines that grow the batch


def captioned(b: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(b)
    ids = torch.randint(0, 50, (b, 5), generator=g)
    return {"image": torch.rand(b, 3, 32, 32, generator=g), "ids": ids, "mask": torch.tensor([[1, 1, 1, 1, 0]] * b)}


GROWING = {
    "pytorch-grad-cam ScoreCAM": DRIVES["pytorch-grad-cam ScoreCAM"],
    "pytorch-grad-cam AblationCAM": DRIVES["pytorch-grad-cam AblationCAM"],
    "torchcam ScoreCAM": DRIVES["torchcam ScoreCAM"],
}


@pytest.mark.parametrize("engine", GROWING)
def test_held_leaves_follow_a_batch_that_grows(engine: str) -> None:
    model, inputs = seeded(Captioned), captioned(1)
    packed = mc.PackedModel(model, inputs, "image", output="logits")
    read: list[Tensor] = []
    model.words.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    found = GROWING[engine](packed, packed.pack(inputs))
    assert max(len(ids) for ids in read) > 1
    for ids in read:
        assert ids.dtype == torch.int64
        assert torch.equal(ids, inputs["ids"].expand_as(ids))
    assert np.isfinite(np.asarray(found[0])).all()


@pytest.mark.parametrize("samples", [2, 16])
@pytest.mark.parametrize("engine", [name for name in GROWING if "Score" in name])
def test_changed_samples_that_differ_in_what_is_held_are_refused(engine: str, samples: int) -> None:
    """The layer has 16 channels, so the rows are 16 variants of one sample: also where there are 16 captions."""
    inputs = captioned(samples)
    packed = mc.PackedModel(seeded(Captioned), inputs, "image", output="logits")
    with pytest.raises(mc.MulticamError, match="explain one sample at a time"):
        GROWING[engine](packed, packed.pack(inputs))


@pytest.mark.parametrize("samples", [2, 16])
def test_unchanged_samples_are_recognised_by_their_rows(samples: int) -> None:
    """AblationCAM repeats one sample for all channels; each row finds the caption of its own sample."""
    inputs = captioned(samples)
    packed = mc.PackedModel(seeded(Captioned), inputs, "image", output="logits")
    together = with_pgc(pgc.AblationCAM)(packed, packed.pack(inputs))
    for i in range(samples):
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        packed = mc.PackedModel(seeded(Captioned), one, "image", output="logits")
        alone = with_pgc(pgc.AblationCAM)(packed, packed.pack(one))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-4)


# One input: our maps are theirs times the number of grid cells


NETWORKS = {
    "resnet18": "layer4",
    "squeezenet1_1": "features",
    "mobilenet_v3_small": "features",
    "shufflenet_v2_x0_5": "conv5",
    "regnet_y_400mf": "trunk_output",
}


def network(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
        return model, model.get_submodule(NETWORKS[name]), torch.rand(2, 3, 96, 64)


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_is_captums_times_the_number_of_cells(name: str) -> None:
    model, layer, x = network(name)
    theirs = captum.LayerGradCam(model, layer).attribute(x, CLASS).detach()
    cells = theirs[0, 0].numel()
    assert cells > 1
    expected = captum.LayerAttribution.interpolate(theirs, x.shape[-2:], "bilinear")[:, 0] * cells
    assert_close(mc.GradCAM(model, layer)(x, CLASS, signed=True), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_those_of_pytorch_grad_cam_times_the_number_of_cells(name: str) -> None:
    model, layer, x = network(name)
    methods = {
        pgc.GradCAM: mc.GradCAM,
        pgc.HiResCAM: mc.HiResCAM,
        pgc.GradCAMElementWise: mc.GradCAMElementWise,
        pgc.LayerCAM: mc.LayerCAM,
    }
    ours = mc.explain_methods(model, x, layer, methods.values(), CLASS, signed=True)
    for engine, method in methods.items():
        theirs = pgc_raw(engine, model, layer, x)
        expected = F.interpolate(theirs[:, None], x.shape[-2:], mode="bilinear")[:, 0] * theirs[0].numel()
        assert_close(ours[method.__name__], expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_x_grad_cam_of_pytorch_grad_cam_needs_large_activations(name: str) -> None:
    model, layer, x = network(name)
    site = mc.Trace(model, x, {"it": layer}, CLASS).sites["it"]
    G, A = site.grads, site.acts

    def formula(epsilon: float) -> Tensor:
        weights = (G * A).sum((2, 3)) / (A.sum((2, 3)) + epsilon)  # 0 / 0 where a channel is silent
        return einsum(weights.nan_to_num(), A, "b c, b c h w -> b h w")

    # Its epsilon decides where activations cancel to less than 1e-7, as those of a network that was never trained may.
    theirs, ours = pgc_raw(pgc.XGradCAM, model, layer, x), mc.XGradCAM(model, layer).saliency(site)
    assert_close(theirs, formula(1e-7), 1e-4)
    assert_close(ours, formula(0), 1e-4)


def test_the_proxy_repairs_what_an_activation_in_place_does_to_pytorch_grad_cam() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        x = torch.randn(2, 3, 16, 16)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 4)]
        model = nn.Sequential(*layers).eval()
    packed = mc.PackedModel(model, x, "0")
    expected = mc.GradCAM(model, "0").saliency(mc.Trace(model, x, {"it": "0"}, CLASS).sites["it"])
    assert_close(pgc_raw(pgc.GradCAM, packed, packed.target_layers[0], packed.pack(x)), expected)
    # On its own the engine keeps the tensor that the activation then overwrites.
    alone = pgc_raw(pgc.GradCAM, model, model[0], x)
    assert (alone - expected).abs().max() > 0.1 * expected.abs().max()
