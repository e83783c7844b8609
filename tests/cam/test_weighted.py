"""Each method against its paper, against other libraries away from their bugs, and against what must follow from it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
import torch.nn.functional as F
import torchcam.methods as torchcam
import torchvision
from torch import Tensor, nn

from multicam import CAM, Layer, MulticamError, Trace, as_it_is
from multicam.call.targets import Contrast, Probability
from multicam.cam.catalogue import METHODS
from multicam.cam.components import KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM
from multicam.cam.weighted import (
    FEM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    OriginalCAM,
    RandomCAM,
    ShapleyCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from tests.helpers.engines import CLASS, SUBJECTS, Subject, as_pgc_scales, assert_close, every_subject, pgc_raw
from tests.helpers.grids import every_grid, small
from tests.helpers.models import Fusion, fusion_inputs, seeded

HERE = [
    method
    for method in METHODS
    if method.__module__ in ("multicam.cam.weighted", "multicam.cam.components") and method is not SmoothGradCAMPlusPlus
]


@dataclass
class Sample:
    """What a paper's formula reads, for one sample: `(c n)` activations and gradients, the head, the Hessian."""

    acts: Tensor
    A: Tensor
    G: Tensor
    model: nn.Module

    @property
    def head(self) -> Tensor:
        return self.model.get_submodule("head").weight[3].detach()

    @cached_property
    def H(self) -> Tensor:
        def behind(acts: Tensor) -> Tensor:
            return self.model[1:](acts.view(1, *self.acts.shape))[0, 3]

        return torch.autograd.functional.hessian(behind, self.A.flatten(), vectorize=True)


def grad_cam_plus_plus(s: Sample) -> Tensor:
    alpha = [g**2 / (2 * g**2 + a.sum() * g**3) for a, g in zip(s.A, s.G, strict=True)]
    return sum((alpha[c] * s.G[c].clamp(min=0)).sum() * s.A[c] for c in range(len(s.A)))


def fem(s: Sample) -> Tensor:
    A = s.A.numpy()
    return torch.tensor(sum((a > np.mean(a) + 2 * np.std(a)).sum() / len(a) * a for a in A))


def random_cam(s: Sample) -> Tensor:
    shares = torch.rand(len(s.A), generator=torch.Generator().manual_seed(0))
    return sum((2 * float(share) - 1) * a for share, a in zip(shares, s.A, strict=True))


# The formula of each paper for one sample, in loops and NumPy's words.
PAPERS: dict[type[CAM], Callable[[Sample], Tensor]] = {
    GradCAM: lambda s: sum(g.mean() * a for a, g in zip(s.A, s.G, strict=True)),
    HiResCAM: lambda s: sum(g * a for a, g in zip(s.A, s.G, strict=True)),
    GradCAMElementWise: lambda s: sum((g * a).clamp(min=0) for a, g in zip(s.A, s.G, strict=True)),
    GradCAMPlusPlus: grad_cam_plus_plus,
    XGradCAM: lambda s: sum((g * a / a.sum()).sum() * a for a, g in zip(s.A, s.G, strict=True)),
    LayerCAM: lambda s: sum(g.clamp(min=0) * a for a, g in zip(s.A, s.G, strict=True)),
    ShapleyCAM: lambda s: (s.G - (s.H @ s.A.flatten()).view_as(s.A) / 2).mean(1) @ s.A,
    OriginalCAM: lambda s: sum(w * a for w, a in zip(s.head, s.A, strict=True)) / s.A.shape[1],
    FEM: fem,
    RandomCAM: random_cam,
}


def test_every_method_has_its_papers_formula() -> None:
    assert set(PAPERS) == {method for method in HERE if method.__module__ == "multicam.cam.weighted"}


@every_grid
@pytest.mark.parametrize("method", PAPERS, ids=lambda m: m.__name__)
def test_every_method_is_its_papers_formula(method: type[CAM], grid: tuple[int, ...]) -> None:
    """With more cells than channels and, in the last grid, fewer."""
    model, x = small(grid, c=4 if len(grid) != 2 else 8, pooled=method is OriginalCAM)
    site = Trace(model, x, {"conv": "conv"}, 3).sites["conv"]
    found = method(model, "conv").saliency(site).flatten(1)
    for b in range(2):
        expected = PAPERS[method](Sample(site.acts[b], site.acts[b].flatten(1), site.grads[b].flatten(1), model))
        assert torch.allclose(found[b], expected, rtol=1e-5, atol=1e-8 * expected.abs().max())


# Gradients


def test_gradcam_equals_hirescam_for_a_pooled_linear_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    x = torch.rand(2, 3, 9, 9)
    assert torch.allclose(GradCAM(model, "0")(x, 1, signed=True), HiResCAM(model, "0")(x, 1, signed=True), atol=1e-6)


def test_gradcam_plus_plus_has_no_epsilon() -> None:
    """Gradients a million times smaller leave the shape of the map alone, where an epsilon decides it elsewhere."""
    model, x = small((5, 7), 8)
    maps = [
        GradCAMPlusPlus(model, "conv")(x, lambda out, s=s: s * out[:, 3], signed=True).flatten() for s in (1e-9, 1e-15)
    ]
    assert torch.allclose(maps[0] * 1e-6, maps[1], rtol=1e-5)


LINEAR = [GradCAM, HiResCAM, GradCAMElementWise, XGradCAM, LayerCAM, ShapleyCAM, EigenGradCAM, SegEigenCAM]


@pytest.mark.parametrize("method", LINEAR, ids=lambda m: m.__name__)
def test_a_score_three_times_as_high_has_a_map_three_times_as_high(method: type[CAM]) -> None:
    model, x = small((5, 7), 8)
    once, thrice = (method(model, "conv")(x, lambda out, s=s: s * out[:, 3], signed=True) for s in (1, 3))
    assert_close(thrice, 3 * once, 1e-9)


BLIND = [EigenCAM, KPCACAM, FEM, RandomCAM]


@pytest.mark.parametrize("method", BLIND, ids=lambda m: m.__name__)
def test_methods_that_see_no_target_need_no_gradient(method: type[CAM]) -> None:
    class Under(nn.Module):
        """Nothing behind the layer has a gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.conv(x).mean((2, 3))

    torch.manual_seed(0)
    x, model = torch.rand(2, 3, 9, 9), Under()
    maps = [method(model, "conv")(x, target, signed=True) for target in (0, 3, None)]
    assert maps[0].any()
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])
    with pytest.raises(MulticamError, match=r"runs under the model's own torch\.no_grad\(\)"):
        SegEigenCAM(model, "conv")(x)


SCALELESS = [EigenCAM, EigenGradCAM, SegEigenCAM, KPCACAM, FEM, RandomCAM, GradCAMPlusPlus]


def test_methods_whose_scale_means_nothing_say_so() -> None:
    assert {method for method in HERE if not method.comparable} == set(SCALELESS)


@pytest.mark.parametrize("method", HERE, ids=lambda m: m.__name__)
def test_frozen_and_bfloat16_models(method: type[CAM]) -> None:
    """Frozen gives the same bits; bfloat16 weights the same map to their precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    x = torch.rand(2, 3, 12, 12).bfloat16().float()
    expected = method(model, "1")(x, 1, signed=True)
    assert torch.equal(method(model.requires_grad_(False), "1")(x, 1, signed=True), expected)
    half = method(model.bfloat16(), "1")(x.bfloat16(), 1, signed=True)
    assert half.dtype == torch.float32
    assert_close(half, expected, 0.05)


# Original CAM


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return torchvision.models.resnet18(weights=None, num_classes=10).eval()


def image() -> Tensor:
    return torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("target", [None, 4, [2, -1]], ids=str)
def test_cam_is_grad_cam_and_hirescam_in_front_of_a_pooled_head(resnet: nn.Module, target: Any) -> None:
    found = OriginalCAM(resnet, "layer4")(image(), target, signed=True)
    assert_close(found, GradCAM(resnet, "layer4")(image(), target, signed=True))
    assert_close(found, HiResCAM(resnet, "layer4")(image(), target, signed=True))


def test_the_mean_of_cam_is_the_logit_without_its_bias(resnet: nn.Module) -> None:
    cam = OriginalCAM(resnet, {"grid": Layer("layer4", onto=None)})
    trace = cam.trace(image(), 4)
    evidence = cam.saliency(trace.sites["grid"]).sum((1, 2))
    assert torch.allclose(evidence, trace.scores - resnet.fc.bias[4], atol=1e-5)


def test_cam_of_torchcam(resnet: nn.Module) -> None:
    with torchcam.CAM(resnet, "layer4", "fc") as extract:
        (found,) = extract(CLASS, resnet(image()), normalized=False)
    site = Trace(resnet, image(), {"it": "layer4"}, CLASS).sites["it"]
    ours = OriginalCAM(resnet, "layer4").saliency(site)
    assert_close(found, ours * ours[0].numel())


def test_cam_of_torchcam_through_the_proxy_on_cross_attention() -> None:
    """The attended values are added to the queries, averaged and read by the head: CAM of a fusion."""
    it = Subject(seeded(Fusion), fusion_inputs(), "attn")
    packed, x = it.packed()
    (head,) = (name for name, module in packed.named_modules() if module is it.model.head)
    with torchcam.CAM(packed, packed.target_layers[0], head) as extract:
        (found,) = extract(CLASS, packed(x), normalized=False)
    ours = it.saliency(OriginalCAM)
    assert_close(found, ours * ours[0].numel())


class Concatenated(nn.Module):
    """Two branches pooled side by side in front of one head, and what may lie between."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(3, 6, 5)
        self.between = nn.Identity() if between is None else between
        self.other, self.head = nn.Linear(10, 7), nn.Linear(10, 7)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        pooled = [self.left(left).mean((2, 3)), self.right(right).mean((2, 3))]
        return self.head(self.between(torch.cat(pooled, 1)))


def both() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.rand(3, 1, 9, 9, generator=g), torch.rand(3, 3, 12, 8, generator=g)


def test_each_branch_has_its_slice_of_the_heads_row() -> None:
    model, classes = seeded(Concatenated), [0, 6, 3]
    trace = Trace(model, both(), {"left": "left", "right": "right"}, classes)
    rows = {"left": model.head.weight[classes, :4], "right": model.head.weight[classes, 4:]}
    for name, site in trace.sites.items():
        expected = torch.einsum("b c, b c h w -> b h w", rows[name].detach(), site.acts) / site.acts[0, 0].numel()
        assert_close(OriginalCAM(model, name).saliency(site), expected, 1e-6)
    maps = OriginalCAM(model, {"left": "left", "right": "right"})(both(), classes, signed=True)
    assert maps.comparable
    assert {name: m.shape[1:] for name, m in maps.items()} == {"left": (9, 9), "right": (12, 8)}


def test_a_convolution_of_one_cell_is_a_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 3, 9, 9)
    assert_close(OriginalCAM(model, "0")(x, 1, signed=True), GradCAM(model, "0")(x, 1, signed=True))


@pytest.mark.parametrize(
    "between",
    [nn.LayerNorm(10), nn.BatchNorm1d(10), nn.ReLU(), nn.Sequential(nn.Linear(10, 10), nn.GELU())],
    ids=lambda module: type(module).__name__,
)
def test_cam_refuses_what_lies_between_pooling_and_head(between: nn.Module) -> None:
    model = seeded(Concatenated, between=between)
    if isinstance(between, nn.BatchNorm1d):
        nn.init.uniform_(between.running_var, 0.5, 0.9, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MulticamError, match=r"'left' is not followed by global average pooling.*7 outputs.*GradCAM"):
        OriginalCAM(model, {"left": "left"})(both(), 2)
    assert GradCAM(model, {"left": "left"})(both(), 2, signed=True)["left"].any()


def test_dropout_between_pooling_and_head_is_nothing() -> None:
    model = seeded(Concatenated, between=nn.Dropout(0.5)).train()
    found = OriginalCAM(model, {"right": "right"})(both(), 2, signed=True)["right"]
    assert_close(found, GradCAM(model, {"right": "right"})(both(), 2, signed=True)["right"])


def test_cam_refuses_layers_and_targets_that_are_not_its_own(resnet: nn.Module) -> None:
    with pytest.raises(MulticamError, match=r"layer 'layer3' is not followed by global average pooling"):
        OriginalCAM(resnet, "layer3")(image(), 4)
    for target, name in [
        (Probability(4), "Probability"),
        (Contrast(4, 5), "Contrast"),
        (lambda out: out[:, 4], "<function"),
    ]:
        with pytest.raises(MulticamError, match=rf"explains the score of a class.*not {name}.*takes any target"):
            OriginalCAM(resnet, "layer4")(image(), target)


# Shapley-CAM


def test_shapley_cam_is_grad_cam_where_the_score_is_piecewise_linear(resnet: nn.Module) -> None:
    layers = {"two": "layer2", "three": "layer3.1.bn2"}
    found, expected = (method(resnet, layers)(image(), 4, signed=True) for method in (ShapleyCAM, GradCAM))
    curved, straight = (
        method(resnet, layers)(image(), Probability(4), signed=True) for method in (ShapleyCAM, GradCAM)
    )
    for name in layers:
        assert torch.equal(found[name], expected[name])
        assert (curved[name] - straight[name]).abs().max() > 1e-3 * straight[name].abs().max()


def test_shapley_cam_shares_out_a_quadratic_score() -> None:
    """Behind pooling and a square, Grad-CAM finds twice the score; the second-order expansion is exact."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)).square())

    model = seeded(Squared)
    trace = Trace(model, image(), {"conv": "conv"}, 3)
    shares = ShapleyCAM(model, "conv").saliency(trace.sites["conv"]).sum((1, 2))
    assert torch.allclose(shares, trace.scores, rtol=1e-4)
    doubled = GradCAM(model, "conv").saliency(trace.sites["conv"]).sum((1, 2))
    assert torch.allclose(doubled, 2 * trace.scores, rtol=1e-4)


# It differentiates by the input, which the siamese model's own arithmetic in place rules out on the untapped call.
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "shared, first call"])
def test_shapley_cam_of_pytorch_grad_cam_through_the_proxy(name: str) -> None:
    it = SUBJECTS[name]()
    packed, x = it.packed()
    cam = pgc.ShapleyCAM(packed, packed.target_layers)
    found = cam(x, [lambda out: out.softmax(-1)[CLASS]] * 2)
    for views in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients):
        views.clear()  # which it cannot release
    expected = it.saliency(ShapleyCAM, Probability(CLASS))
    np.testing.assert_allclose(found, as_pgc_scales(expected, x), atol=1e-4)


def test_shapley_cam_of_pytorch_grad_cam_on_one_layer() -> None:
    model, x = small((5, 7), 8)
    with pgc.ShapleyCAM(model, [model.conv]) as cam:
        found = cam(x, [lambda out: out[3]] * 2)
    expected = ShapleyCAM(model, "conv").saliency(Trace(model, x, {"conv": "conv"}, 3).sites["conv"])
    np.testing.assert_allclose(found, as_pgc_scales(expected, x), atol=1e-5)


def test_shapley_cam_of_several_layers_is_that_of_each() -> None:
    model, layers = seeded(Fusion), {"rgb": "rgb", "depth": "depth.net.3", "attn": "attn"}
    target = Probability(2)
    together = ShapleyCAM(model, layers)(fusion_inputs(), target, signed=True)
    for name, layer in layers.items():
        alone = ShapleyCAM(model, {name: layer})(fusion_inputs(), target, signed=True)
        assert_close(together[name], alone[name], 1e-4)


class Attending(nn.Module):
    """Self-attention over the cells, by the fused kernel or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.conv, self.view = fused, nn.Conv2d(3, 8, 3), nn.Flatten(2)
        self.grid, self.head = nn.Unflatten(2, (6, 6)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.grid(self.view(self.conv(x))).flatten(2).mT
        if self.fused:
            return self.head(F.scaled_dot_product_attention(t, t, t).mean(1))
        return self.head(((t @ t.mT / 8**0.5).softmax(-1) @ t).mean(1))


def test_shapley_cam_in_front_of_fused_attention_and_of_views() -> None:
    x = image()[..., :8, :8]
    maps = [
        ShapleyCAM(seeded(Attending, fused=fused), layer)(x, 3, signed=True)
        for fused in (True, False)
        for layer in ("conv", "grid")
    ]
    for other in maps[1:]:
        assert_close(other, maps[0], 1e-4)
    gradients_alone = GradCAM(seeded(Attending, fused=True), "conv")(x, 3, signed=True)
    assert (gradients_alone - maps[0]).abs().max() > 1e-2 * maps[0].abs().max()


# Others


def test_silent_layers_give_empty_maps_and_not_nan() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    site = Trace(model, image()[..., :8, :8], {"it": "0"}, 1).sites["it"]
    for method in (KPCACAM, EigenCAM, FEM, SegEigenCAM):
        assert not method(model, "0").saliency(site).any()


@every_subject
@pytest.mark.parametrize(
    ("engine", "method"),
    [(pgc.FEM, FEM), (pgc.SegEigenCAM, SegEigenCAM)],
    ids=lambda value: value.__name__,
)
def test_fem_and_seg_eigen_cam_of_pytorch_grad_cam(
    subject: Callable[[], Subject], engine: type[pgc.base_cam.BaseCAM], method: type[CAM]
) -> None:
    it = subject()
    packed, x = it.packed()
    found = pgc_raw(engine, packed, packed.target_layers[0], x).float()
    assert_close(found, it.saliency(method), 1e-4)


def test_fem_weighs_a_channel_by_how_rarely_it_stands_out() -> None:
    """One of 16 cells bright: with k = 2 the channel weighs 1/16, with k = 4 (sqrt(15) deviations) nothing stands out."""
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 2] = 3
    x[0, 1] = 5  # flat, so nowhere above its mean
    found = {k: FEM(model, Layer("0", onto=None), k=k)(x, signed=True)[0] / 16 for k in (2.0, 4.0)}
    assert torch.allclose(found[2.0], x[0, 0] / 16)
    assert not found[4.0].any()


# Random-CAM


def test_random_cam_is_the_same_every_time_and_touches_no_random_state() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(3)
    state = torch.get_rng_state()
    first, second, other = (RandomCAM(model, {"rgb": "rgb"}, seed=s)(inputs, signed=True)["rgb"] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 0.1 * first.abs().max()
    alone = RandomCAM(model, {"rgb": "rgb"})({name: x[1:2] for name, x in inputs.items()}, signed=True)["rgb"]
    assert_close(alone[0], first[1])


def test_random_weights_lie_between_minus_one_and_one() -> None:
    """Each channel is bright in a cell of its own, so the map shows the weights."""
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(400 * 400, 2))
    x = torch.eye(400).view(1, 400, 20, 20)
    layer = Layer("0", reshape=as_it_is)
    site = Trace(model, x, {"it": layer}).sites["it"]
    weights = RandomCAM(model, layer).saliency(site).flatten()
    assert -1 < weights.min() < -0.9
    assert 0.9 < weights.max() < 1
    assert weights.mean().abs() < 0.1
