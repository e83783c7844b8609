"""All ways to explain a model of planted evidence: those of multicam, baselines that do not know the model, and pytorch-grad-cam."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Generator, Tensor, nn

from benchmarks.planted_cells import of_attention
from benchmarks.planted_data import INPUTS, Batch, Samples
from multicam import GradCAM, HiResCAM, Maps, PackedModel, attention, contribution, expected_gradients
from multicam.call.inputs import Inputs
from multicam.cam.catalogue import INPUT_METHODS, METHODS
from multicam.cam.wrappers import FinerCAM
from multicam.metrics.explanations import Explain, explained_maps, explainer
from multicam.saliency.catalogue import ATTRIBUTIONS
from multicam.shares.shapley import Contribution

LAYERS = {name: f"encoders.{name}" for name in INPUTS}
OURS, PEER, BASELINE = "multicam", "pytorch-grad-cam", "baseline"

# What runs many rows for each sample, and how many of what where the default would take all day.
SLOW = (
    *("SmoothGradCAMPlusPlus", "AblationCAM", "ScoreCAM", "ISCAM", "SSCAM", "RISE"),
    *("smoothgrad", "vargrad", "integrated_gradients", "occlusion"),
)
FEWER: dict[str, dict[str, int]] = {"ISCAM": {"steps": 4}, "SSCAM": {"samples": 4}, "RISE": {"masks": 500}}
PEERS = (
    *("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenCAM", "EigenGradCAM"),
    *("ScoreCAM", "AblationCAM"),
)  # fmt: skip
# A class token reads each input once, so it is all queries there are, and the last layer is the only one.
READINGS = {
    "attention": "attention of the class token, last layer",
    "gradient x attention": "gradient x attention, class token",
    "rollout": "rollout",
    "relevance, one matrix": "relevance, one matrix",
    "relevance, Chefer's rules": "relevance, Chefer's rules",
    "LeGrad": "LeGrad",
}
CENTRE = "centre of the image"  # which is the same for every input


@dataclass(frozen=True)
class Source:
    """What makes the explanations of one method, or of several from one pass.

    Attributes:
        name: What to call it.
        whose: `OURS`, `PEER` or `BASELINE`.
        make: Called with the model and samples; gives maps of every input, or how much each input contributed.
        slow: Whether fewer samples have to do.
    """

    name: str
    whose: str
    make: Callable[[nn.Module, Samples], Mapping[str, Maps | Contribution]]
    slow: bool = False


def sources(references: Batch) -> Iterator[Source]:
    """Every method there is.

    Args:
        references: Inputs of training photos, for the methods that compare with other inputs.
    """
    for cam in METHODS:
        explain = explainer(cam, LAYERS, **FEWER.get(cam.__name__, {}))
        yield _one(_named(cam.__name__), explain, cam.__name__ in SLOW)
    for method in (GradCAM, HiResCAM):
        yield _one(f"FinerCAM({method.__name__})", partial(_finer, method))
    for inside in INPUT_METHODS:
        explain = explainer(inside, **FEWER.get(inside.__name__, {}))
        yield _one(_named(inside.__name__), explain, inside.__name__ in SLOW)
    for function in ATTRIBUTIONS:
        takes_layers = "layers" in inspect.signature(function).parameters
        explain = partial(_with_layers, function) if takes_layers else function
        yield _one(function.__name__, explain, function.__name__ in SLOW)
    yield _one(
        "expected_gradients", lambda model, inputs, target: expected_gradients(model, inputs, references, target), True
    )
    yield Source("attention", OURS, attention_maps)
    yield _contribution("contribution, baseline 0")
    yield _contribution('contribution, baseline "mean"', baseline="mean")
    yield _contribution("contribution, references", slow=True, references=references)
    yield Source("baselines", BASELINE, _baselines)
    for peer in PEERS:
        yield Source(peer, PEER, partial(_of_peer, peer), peer in SLOW)


def _named(method: str) -> str:
    said = ", ".join(f"{value} {option}" for option, value in FEWER.get(method, {}).items())
    return f"{method} ({said})" if said else method


def _one(name: str, explain: Explain, slow: bool = False) -> Source:
    def make(model: nn.Module, samples: Samples) -> dict[str, Maps]:
        call = Inputs(**samples.inputs).bind(model)
        return {name: explained_maps(explain, model, call, samples.label.tolist())}

    return Source(name, OURS, make, slow)


def _finer(method: type[GradCAM] | type[HiResCAM], model: nn.Module, inputs: Any, target: Any) -> Any:
    return FinerCAM(method(model, LAYERS))(inputs, target)


def _with_layers(function: Callable[..., Any], model: nn.Module, inputs: Any, target: Any) -> Any:
    return function(model, inputs, LAYERS, target)


def attention_maps(model: nn.Module, samples: Samples) -> dict[str, Maps]:
    """Maps by the way to read attention."""
    found = of_attention(attention(model, samples.inputs, samples.label.tolist()), INPUTS)
    return {title: Maps(found[name], getattr(found[name], "comparable", True)) for title, name in READINGS.items()}


def _contribution(name: str, slow: bool = False, **options: Any) -> Source:
    def make(model: nn.Module, samples: Samples) -> dict[str, Contribution]:
        return {name: contribution(model, samples.inputs, samples.label.tolist(), **options)}

    return Source(name, OURS, make, slow)


def _baselines(model: nn.Module, samples: Samples) -> dict[str, Maps]:
    del model
    generator = Generator().manual_seed(0)
    size = {name: (len(samples.label), *x.shape[2:]) for name, x in samples.inputs.items()}
    return {
        "random": Maps({name: torch.rand(shape, generator=generator) for name, shape in size.items()}),
        CENTRE: Maps({name: _centre(*shape) for name, shape in size.items()}, comparable=False),
        "magnitude of the input": Maps({name: x.abs().mean(1) for name, x in samples.inputs.items()}),
    }


def _centre(n: int, height: int, width: int) -> Tensor:
    """Maps with their peak in the middle, or rather a hair beside it, as an even side has four middles."""
    rows, columns = torch.linspace(-1, 1.01, height), torch.linspace(-1, 1.01, width)
    return (-(rows[:, None] ** 2 + columns**2)).exp().expand(n, -1, -1)


def peer_maps(name: str, model: nn.Module, samples: Samples) -> Maps:
    """Pytorch-grad-cam's own maps, each scaled to 0..1 as its users get them; one call for each layer."""
    packed = PackedModel(model, samples.inputs, layers=list(LAYERS.values()))
    targets = [ClassifierOutputTarget(label) for label in samples.label.tolist()]
    found = {}
    for at, tap in zip(LAYERS, packed.target_layers, strict=True):
        with getattr(pytorch_grad_cam, name)(packed, [tap]) as cam:
            found[at] = packed.maps(torch.from_numpy(cam(packed.pack(samples.inputs), targets)))[at]
    return Maps(found, comparable=False)


def _of_peer(name: str, model: nn.Module, samples: Samples) -> dict[str, Maps]:
    return {name: peer_maps(name, model, samples)}
