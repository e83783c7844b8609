"""Every public function and class that runs a model, as one call of it on the fusion of three branches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import multicam as mc
from multicam import metrics
from multicam.cam.catalogue import METHODS
from multicam.compat import GradCAM as DropIn
from tests.helpers.models import Fusion, seeded

Entry = Callable[[nn.Module, Mapping[str, Tensor], Any], Any]

LAYERS = {"rgb": "rgb.net.0", "depth": "depth"}
PATCH = {"rgb": (slice(0, 4), slice(0, 4))}


def small_inputs(b: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(b)
    shapes = {"rgb": (b, 3, 16, 16), "depth": (b, 1, 16, 16), "texture": (b, 2, 16, 16)}
    return {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}


def without_dropout() -> nn.Module:
    """The fusion with a ReLU for each use, as some methods of captum need it."""
    model = seeded(Fusion)
    for branch in model.branches:
        branch.net[2].inplace = branch.act.inplace = False
    return model


def _maps(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> dict[str, Tensor]:
    return {name: image.detach().mean(1) for name, image in x.items()}


def _packed(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Tensor:
    packed = mc.PackedModel(model, x, list(LAYERS.values()))
    return packed(packed.pack(x))


def _rescored(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Tensor:
    trace = mc.Trace(model, x, LAYERS, target)
    return torch.cat(
        [trace.sites["rgb"].rescore(trace.sites["rgb"].acts[:1]), trace.rescore({"depth": x["depth"][:1]})]
    )


def _recorded(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Any:
    with mc.record_attention(model, gradients=True) as att:
        output = model(**x)
    att.gradients(target(output) if callable(target) else output[:, target])
    return att[0].weights, att[0].grad


def _drop_in(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Any:
    packed = mc.PackedModel(model, x, [mc.Layer("rgb.net.0")])
    with DropIn(packed, packed.target_layers) as cam:
        return cam(
            packed.pack(x), [(lambda row: target(row[None])[0]) if callable(target) else lambda row: row[target]]
        )


def _evaluated(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Any:
    methods = {"a": mc.explainer(mc.HiResCAM, LAYERS), "b": mc.explainer(mc.ScoreCAM, LAYERS)}
    return mc.evaluate(model, methods, ["deletion", "insertion"], [metrics.Batch(x, target)], steps=3)


def _contexts(model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Any:
    return mc.explain_methods(model, x, LAYERS, [mc.HiResCAM, mc.GradCAM, mc.LayerCAM], target)


SMALL: dict[str, dict[str, Any]] = {
    "AblationCAM": {"batch_size": 8},
    "SSCAM": {"samples": 2},
    "ISCAM": {"steps": 2},
    "SmoothGradCAMPlusPlus": {"samples": 2},
}


def _method(method: type[mc.CAM], model: nn.Module, x: Mapping[str, Tensor], target: Any) -> Any:
    layers: Any = {"rgb": "attn"} if method is mc.OriginalCAM else LAYERS
    return method(model, layers, **SMALL.get(method.__name__, {}))(x, target)


ENTRIES: dict[str, Entry] = {
    **{method.__name__: partial(_method, method) for method in METHODS},
    "Augmented": lambda m, x, t: mc.Augmented(mc.HiResCAM(m, LAYERS), ["rgb", "depth"])(x, t),
    "EigenSmoothed": lambda m, x, t: mc.EigenSmoothed(mc.GradCAM(m, LAYERS))(x, t),
    "FinerCAM": lambda m, x, t: mc.FinerCAM(mc.GradCAM(m, LAYERS))(x, t),
    "RefineCAM": lambda m, x, t: mc.RefineCAM(mc.GradCAM(m, LAYERS))(x, t),
    "SESS": lambda m, x, t: mc.SESS(mc.GradCAM(m, LAYERS), ["rgb", "depth"])(x, t),
    "RISE": lambda m, x, t: mc.RISE(m, masks=4)(x, t),
    "FullGrad": lambda m, x, t: mc.FullGrad(m)(x, t),
    "explain_methods": _contexts,
    "Trace.rescore": _rescored,
    "gradient": mc.gradient,
    "input_x_gradient": mc.input_x_gradient,
    "guided_backprop": mc.guided_backprop,
    "smoothgrad": lambda m, x, t: mc.smoothgrad(m, x, t, samples=3),
    "integrated_gradients": lambda m, x, t: mc.integrated_gradients(m, x, t, steps=3),
    "expected_gradients": lambda m, x, t: mc.expected_gradients(m, x, x, t, samples=2),
    "occlusion": lambda m, x, t: mc.occlusion(m, x, t, patch=8),
    "captum Saliency": partial(mc.captum_attribution, "Saliency"),
    "attention": mc.attention,
    "record_attention": _recorded,
    "relevance": lambda m, x, t: mc.relevance(mc.attention(m, x, t)),
    "rollout": lambda m, x, t: mc.rollout(mc.attention(m, x, t)),
    "contribution": mc.contribution,
    "region_contribution": lambda m, x, t: mc.region_contribution(m, x, t, regions={"rgb": 2}),
    "double_occlusion": lambda m, x, t: mc.double_occlusion(m, x, PATCH, t, patch=8),
    "second_order_gradient": lambda m, x, t: mc.second_order_gradient(m, x, PATCH, t),
    "feature_maps": lambda m, x, t: mc.feature_maps(m, x, LAYERS),
    "activation_maximization": lambda m, x, t: mc.activation_maximization(m, x, target=t, onto="rgb", steps=2),
    "deep_dream": lambda m, x, t: mc.deep_dream(m, x, "rgb.net.0", onto="rgb", octaves=1, steps=2),
    "factorize": lambda m, x, t: mc.factorize(m, x, LAYERS, concepts=2),
    "deletion": lambda m, x, t: metrics.deletion(m, x, _maps(m, x, t), t, steps=3),
    "evaluate": _evaluated,
    "PackedModel": _packed,
    "list_layers": lambda m, x, t: mc.list_layers(m, x),
    "compat.GradCAM": _drop_in,
}
