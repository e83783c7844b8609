"""Several methods from one pass; and what is no class of a method, with what to write instead."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from multicam import CAM, RISE, EigenCAM, GradCAM, HiResCAM, MulticamError, Site, cam, compat, explain_methods
from multicam.cam.base import InputCAM
from multicam.cam.catalogue import INPUT_METHODS, ONE_PASS, WRAPPERS
from multicam.cam.together import refuse_unmade
from multicam.cam.wrappers import Wrapper
from tests.helpers.models import Fusion, fusion_inputs, seeded


def test_many_methods_cost_one_forward_and_one_backward() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    runs = []
    model.head.register_forward_hook(lambda m, i, o: runs.append(1))
    model.head.register_full_backward_hook(lambda m, i, o: runs.append(-1))
    layers = {"rgb": "rgb", "attn": "attn"}
    HiResCAM(model, layers)(inputs, 1, signed=True)  # the first pass with such hooks tells the places
    runs.clear()
    found = explain_methods(model, inputs, layers, ONE_PASS, 1, signed=True)
    assert runs == [1, -1]
    assert list(found) == [method.__name__ for method in ONE_PASS]
    for method in ONE_PASS:
        expected = method(model, layers)(inputs, 1, signed=True)
        assert all(torch.equal(found[method.__name__][name], expected[name]) for name in layers)
    assert torch.equal(
        explain_methods(model, inputs, "rgb", [HiResCAM], 1, signed=True)["HiResCAM"],
        HiResCAM(model, "rgb")(inputs, 1, signed=True),
    )


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda kind: kind.__name__)
def test_the_class_of_a_wrapper_is_refused_with_what_works(wrapper: type[Wrapper]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    inputs, layers, target = torch.rand(2, 3, 16, 16), "1", 3
    with pytest.raises(MulticamError, match="refines a method and is made of one") as refusal:
        explain_methods(model, inputs, layers, [GradCAM, wrapper], target)
    written = str(refusal.value).rpartition(": ")[2].replace("target)", "target, signed=True)")
    found = eval(written, {name: getattr(cam, name) for name in cam.__all__} | locals())
    assert found.shape == (2, 16, 16)


class Own(CAM):
    """A method that is made of more than a model and layers."""

    def __init__(self, model: Any, layers: Any, power: float, *, output: Any = None) -> None:
        super().__init__(model, layers, output=output)
        self.power = power

    def saliency(self, site: Site) -> Tensor:
        """The energy."""
        return site.acts.abs().pow(self.power).sum(1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CAM, "not the class multicam.cam.base.CAM, which is abstract"),
        (mc.WeightedCAM, "which is abstract"),
        (InputCAM, "which is abstract"),
        *((kind, rf"not layers: {kind.__name__}\(model\)\(inputs, target\)") for kind in INPUT_METHODS),
        (compat.GradCAM, "not the class multicam.compat.cams.GradCAM; here it is multicam.GradCAM"),
        ("grad-cam++", "not 'grad-cam\\+\\+'; here it is multicam.GradCAMPlusPlus"),
        (mc.gradient, "which is called by itself"),
        (partial(GradCAM, output="logits"), "which is called by itself"),
        (dict, "not the class builtins.dict"),
        (3, "not 3$"),
        (
            Own,
            r"takes \(model, layers, power, output\), so Own\(model, '1', output=None\) cannot be made: missing .*'power'",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_no_class_of_a_method_is_told_how_it_is_used(method: object, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        refuse_unmade(method, CAM, "1", output=None)


def test_what_is_made_already_is_called() -> None:
    for made in (GradCAM(seeded(Fusion), "rgb"), mc.FinerCAM(GradCAM(seeded(Fusion), "rgb"))):
        with pytest.raises(MulticamError, match="which is made already: call it, or give its class"):
            refuse_unmade(made, CAM, "1")
    with pytest.raises(MulticamError, match="which explains inputs and not layers: call it"):
        refuse_unmade(RISE(seeded(Fusion)), CAM, "1")


def test_a_class_that_can_be_made_is_not_refused() -> None:
    refuse_unmade(Own, CAM, "1", 2.0)
    refuse_unmade(RISE, CAM | InputCAM, "rgb")
    for kind in ONE_PASS:
        refuse_unmade(kind, CAM, "1", output=None)


def test_methods_of_one_name_do_not_hide_each_other() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    twice = explain_methods(model, inputs, "rgb", [EigenCAM, EigenCAM], 1, signed=True)
    assert list(twice) == ["EigenCAM"]
    namesake = type("EigenCAM", (HiResCAM,), {})
    with pytest.raises(MulticamError, match="two methods are called 'EigenCAM'"):
        explain_methods(model, inputs, "rgb", [EigenCAM, namesake], 1)
    with pytest.raises(MulticamError, match="there is no method"):
        explain_methods(model, inputs, "rgb", [], 1)
