"""Inputs and models that no pass can take: every public entry is right, or refuses them by name with a way out."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import multicam as mc
from multicam.call.tree import leaves
from multicam.cam.catalogue import INPUT_METHODS, METHODS, WRAPPERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torch.jit|beta|prototype|sparse|quantized|TypedStorage|deprecated)",
    "ignore:.*(is empty|is meaningless|is negative|miss up to)",
)
Entry = Callable[[Any, Any], Any]
LAYERS = {"rgb": "conv", "depth": "side"}
CLASS = 1
INPUTS = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
MAPS = mc.Maps({name: torch.rand(2, 8, 8) for name in INPUTS})
HERE = {"rgb": torch.arange(64).view(8, 8) < 20}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        out: Tensor = self.head((self.conv(rgb).relu() * self.side(depth)).mean((2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _cam(kind: Any) -> Entry:
    if kind in INPUT_METHODS:
        options = {"masks": 8} if kind is mc.RISE else {}
        return lambda model, x: kind(model, **options)(x, CLASS, signed=True)
    if kind in WRAPPERS:
        moving = {"inputs": list(INPUTS)} if kind in (mc.Augmented, mc.SESS) else {}
        more: dict[str, Any] = moving | ({"scales": (1.0,)} if kind is mc.SESS else {})
        return lambda model, x: kind(mc.GradCAM(model, LAYERS), **more)(x, CLASS, signed=True)
    return lambda model, x: kind(model, LAYERS)(x, CLASS, signed=True)


ENTRIES: dict[str, Entry] = {
    **{kind.__name__: _cam(kind) for kind in (*METHODS, *INPUT_METHODS, *WRAPPERS)},
    **{
        name: lambda model, x, name=name: getattr(mc, name)(model, x, CLASS)
        for name in ("gradient", "input_x_gradient")
    },
    **{
        name: lambda model, x, name=name: getattr(mc, name)(model, x, CLASS)
        for name in ("guided_backprop", "deconvnet")
    },
    **{
        name: lambda model, x, name=name: getattr(mc, name)(model, x, CLASS, samples=2)
        for name in ("smoothgrad", "vargrad")
    },
    "integrated_gradients": lambda model, x: mc.integrated_gradients(model, x, CLASS, steps=2),
    "expected_gradients": lambda model, x: mc.expected_gradients(model, x, INPUTS, CLASS, samples=2),
    "occlusion": lambda model, x: mc.occlusion(model, x, CLASS, patch=4),
    "captum_attribution": lambda model, x: mc.captum_attribution("Saliency", model, x, CLASS),
    "guided_gradcam": lambda model, x: mc.guided_gradcam(model, x, LAYERS, CLASS),
    "explain_methods": lambda model, x: mc.explain_methods(model, x, LAYERS, [mc.EigenCAM], CLASS),
    "explainer": lambda model, x: mc.explainer(mc.GradCAM, LAYERS)(model, x, CLASS),
    "list_layers": lambda model, x: [info.sees for info in mc.list_layers(model, x)],
    "Trace": lambda model, x: mc.Trace(model, x, LAYERS, CLASS).grads,
    "PackedModel": lambda model, x: (packed := mc.PackedModel(model, x))(packed.pack(x)),
    "attention": lambda model, x: mc.attention(model, x, CLASS),
    "feature_maps": lambda model, x: mc.feature_maps(model, x, "conv"),
    "factorize": lambda model, x: mc.factorize(model, x, "conv", 2),
    "activation_maximization": lambda model, x: mc.activation_maximization(model, x, "conv", 1, onto="rgb", steps=2),
    "deep_dream": lambda model, x: mc.deep_dream(model, x, "conv", onto="rgb", octaves=1, steps=1),
    "contribution": lambda model, x: mc.contribution(model, x, CLASS).shapley,
    "region_contribution": lambda model, x: mc.region_contribution(model, x, CLASS, regions=2).maps,
    "double_occlusion": lambda model, x: mc.double_occlusion(model, x, HERE, CLASS),
    "second_order_gradient": lambda model, x: mc.second_order_gradient(model, x, HERE, CLASS),
    "evaluate": lambda model, x: mc.evaluate(model, {"one": mc.gradient}, ["complexity"], [x]),
    "metrics.deletion": lambda model, x: mc.metrics.deletion(model, x, MAPS, CLASS, steps=2).scores,
    "metrics.insertion": lambda model, x: mc.metrics.insertion(model, x, MAPS, CLASS, steps=2).scores,
    "metrics.road": lambda model, x: mc.metrics.road(model, x, MAPS, CLASS),
    "metrics.seen_through": lambda model, x: mc.metrics.seen_through(model, x, MAPS, CLASS),
    "metrics.infidelity": lambda model, x: mc.metrics.infidelity(model, x, MAPS, CLASS, samples=2),
    "metrics.sensitivity": lambda model, x: mc.metrics.sensitivity(model, x, mc.gradient, CLASS, samples=2),
    "metrics.parameter_randomization": lambda model, x: mc.metrics.parameter_randomization(
        model, x, mc.gradient, CLASS
    ),
    "panel": lambda model, x: mc.panel(x, MAPS),
    "compare": lambda model, x: mc.compare(x, {"one": MAPS}),
}
# Names of the front page that take no call of a model.
OTHERS = {
    *("MulticamError", "Maps", "targets", "Inputs", "Spec", "MODALITIES", "Layer", "Site", "as_it_is", "channels_last", "stacked"),
    *("tokens", "record_attention", "relevance", "rollout", "legrad", "kernels", "CAM", "InputCAM", "WeightedCAM"),
    *("attending", "call", "cam", "figures", "inside", "metrics", "saliency", "shares", "watch"),
}  # fmt: skip
FIGURES = ("panel", "compare")


def test_every_public_entry_is_tried() -> None:
    assert {*mc.__all__} == {name for name in ENTRIES if "." not in name} | OTHERS


def outcome(name: str, model: Any, inputs: Any) -> dict[str, Tensor] | str:
    """What an entry returns, as tensors by path, or what its refusal says; any other error is one of the test."""
    try:
        found = ENTRIES[name](model, inputs)
    except mc.MulticamError as error:
        return str(error)
    return {path: leaf.detach() for path, leaf in leaves({"": found}).items() if isinstance(leaf, Tensor)}


@cache
def plain(name: str) -> dict[str, Tensor] | str:
    """What an entry returns for the plain model and inputs."""
    return outcome(name, net(), INPUTS)


UNREADABLE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda x: x.to("meta"), "is on the meta device and has no values: make it on another"),
    "sparse": (Tensor.to_sparse, "is sparse (sparse_coo): give x.to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "is a nested tensor, whose samples differ in size: give"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "is quantised: give x.dequantize()"),
    "mkldnn": (Tensor.to_mkldnn, "give x.to_dense()"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), "is a FakeTensor"),
    "array": (Tensor.numpy, "is a numpy.ndarray and no tensor: give torch.from_numpy(x)"),
    "generator": (iter, "which is empty after one pass: give a list"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("which", [["depth"], ["rgb", "depth"]], ids=["one", "both"])
def test_an_input_without_values_is_refused_by_every_entry(kind: str, which: list[str]) -> None:
    make, message = UNREADABLE[kind]
    inputs = INPUTS | {name: make(INPUTS[name]) for name in which}
    for name in ENTRIES:
        if name in FIGURES and kind in ("array", "generator"):
            continue  # types are checked in the tests; see tests/whole/test_wrong_types.py
        said = outcome(name, net(), inputs)
        assert isinstance(said, str) and f"input {which[0]!r}" in said and message in said, (name, said)


class Labelled(Tensor):
    """A plain tensor of another class, as torchvision's images are."""


READABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "a parameter": nn.Parameter,
    "another class": lambda x: x.as_subclass(Labelled),
    "with a history": lambda x: x.clone().requires_grad_() * 1,
    "a view of a conjugate": lambda x: torch.complex(x, x).conj().real,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
FEW = ("GradCAM", "ScoreCAM", "integrated_gradients", "occlusion", "contribution", "list_layers", "PackedModel")


@pytest.mark.parametrize("kind", READABLE)
def test_every_other_tensor_is_as_good_as_a_plain_one(kind: str) -> None:
    inputs = {name: READABLE[kind](x) for name, x in INPUTS.items()}
    for name in (*FEW, "region_contribution", "metrics.road"):
        assert not isinstance(plain(name), str), plain(name)
        torch.testing.assert_close(outcome(name, net(), inputs), plain(name))


EMPTY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(net())), "explain the module that was frozen|no layer in"),
    "meta": (lambda: net().to("meta"), "is on the meta device and has no values: load the model's weights"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_model_without_modules_or_values_is_refused_by_every_entry(kind: str) -> None:
    make, message = EMPTY[kind]
    for name in sorted(ENTRIES.keys() - FIGURES):
        said = outcome(name, make(), INPUTS)
        assert isinstance(said, str) and any(each in said for each in message.split("|")), (name, said)


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda ask: torch.vmap(ask)(INPUTS["rgb"][None]),
    "grad": lambda ask: torch.func.grad(ask)(INPUTS["rgb"]),
    "jvp": lambda ask: torch.func.jvp(ask, (INPUTS["rgb"],), (INPUTS["rgb"],)),
}


@pytest.mark.parametrize("around", AROUND)
def test_every_entry_is_refused_inside_of_a_transform(around: str) -> None:
    model, said = net(), {}

    def ask(x: Tensor) -> Tensor:
        said.update({name: outcome(name, model, INPUTS | {"rgb": x}) for name in ENTRIES})
        return x.sum()

    AROUND[around](ask)
    assert said.keys() == ENTRIES.keys()
    for name, found in said.items():
        assert isinstance(found, str) and "a transform of torch.func (vmap, grad, jvp …)" in found, (name, found)


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake tensors", "device"])
def test_every_entry_is_refused_where_tensors_have_no_values(mode: Callable[[], Any]) -> None:
    model = net()
    with mode():
        said = {name: outcome(name, model, INPUTS) for name in ENTRIES}
    for name, found in said.items():
        assert isinstance(found, str) and ("are fake here" in found or "default device is meta" in found), (name, found)


def _part(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = net()
    model.conv = change(model.conv)  # type: ignore[assignment]
    return model


def _exported(any_batch: bool) -> nn.Module:
    rows = {name: {0: torch.export.Dim.DYNAMIC} for name in INPUTS} if any_batch else None
    return torch.export.export(net(), (), INPUTS, dynamic_shapes=rows).module()


OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(net()),
    "a part scripted": lambda: _part(torch.jit.script),
    "a part traced": lambda: _part(lambda conv: torch.jit.trace(conv, INPUTS["rgb"])),
    "exported": lambda: _exported(True),
    "exported for one batch": lambda: _exported(False),
    "of a graph": lambda: torch.fx.symbolic_trace(net()),
}
# What needs no layer must come out of them; what needs one comes out, or is refused.
NO_LAYER = ("gradient", "occlusion", "contribution", "RISE", "metrics.deletion")
WITH_LAYER = (
    "GradCAM",
    "ScoreCAM",
    "FullGrad",
    "Trace",
    "attention",
    "feature_maps",
    "PackedModel",
    "metrics.parameter_randomization",
)


def compare(kind: str) -> None:
    """What comes out of a model that runs otherwise is what comes out of the plain one, or is refused."""
    model = OTHERWISE[kind]()
    for name in (*NO_LAYER, *WITH_LAYER):
        found = outcome(name, model, INPUTS)
        if isinstance(found, str):
            if name in NO_LAYER:
                assert kind == "exported for one batch" and "dynamic_shapes=" in found, (name, found)
            else:
                assert "Error" not in found or "dynamic_shapes=" in found, (name, found)
        elif name != "metrics.parameter_randomization":  # weights that cannot be made anew are shuffled instead
            torch.testing.assert_close(found, plain(name), msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("kind", ["exported", "exported for one batch", "of a graph"])
def test_graphs_give_the_same_numbers_or_are_refused(kind: str) -> None:
    compare(kind)


def test_torchscript_gives_the_same_numbers_or_is_refused() -> None:
    """In a Python of its own: its parameters are no `nn.Parameter`, and in the tests every annotation is checked."""
    code = (
        f"from {__name__} import compare; [compare(kind) for kind in ('scripted', 'a part scripted', 'a part traced')]"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
