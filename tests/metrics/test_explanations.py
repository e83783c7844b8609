"""Whatever explains is called alike, and what it returns becomes one map for each input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import RISE, GradCAM, HiResCAM, Maps, MulticamError
from multicam.call.inputs import Inputs
from multicam.metrics.explanations import by_name, explained_maps, explainer, named_maps, refuse_uncallable
from multicam.saliency.attributions import Attributions
from tests.helpers.models import Fusion, fusion_inputs, seeded
from tests.helpers.two_means import EXACT, TwoMeans, X, Y


class Nested(nn.Module):
    """One input in a dict, whose full name is `batch.x`."""

    def forward(self, batch: dict[str, Tensor], y: Tensor) -> Tensor:
        return TwoMeans()(batch["x"], y)


def nested() -> Inputs:
    return Inputs({"x": X}, Y).bind(Nested())


@pytest.mark.parametrize("signed", [False, True])
def test_a_class_becomes_a_function_of_any_model(signed: bool) -> None:
    inputs = fusion_inputs(2, 16)
    explain = explainer(HiResCAM, {"rgb": "rgb"}, signed=signed)
    for seed in (0, 1):
        model = seeded(Fusion, seed)
        expected = HiResCAM(model, {"rgb": "rgb"})(inputs, 2, signed=signed)
        assert torch.equal(explain(model, inputs, 2)["rgb"], expected["rgb"])


def test_options_reach_the_method() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval(), torch.rand(2, 3, 4, 4)
    found = explainer(RISE, masks=8, cells=2, seed=3)(model, x, 1)
    assert torch.equal(found, RISE(model, masks=8, cells=2, seed=3)(x, 1))


def test_short_names_become_full_ones_and_maps_keep_whether_they_compare() -> None:
    for comparable in (False, True):
        found = named_maps(Maps(EXACT, comparable), nested())
        assert list(found) == ["batch.x", "y"]
        assert found.comparable is comparable
        assert torch.equal(found["batch.x"], EXACT["x"])
    assert named_maps(EXACT, nested()).comparable


def test_the_maps_of_attributions_are_theirs_and_hold_no_graph() -> None:
    values = {"batch.x": (2 * X).requires_grad_(), "y": Y}
    found = Attributions(values, torch.tensor([1.0]))
    maps = named_maps(found, nested())
    for name, m in found.maps().items():
        assert torch.equal(maps[name], m.detach())
        assert not maps[name].requires_grad


def test_one_tensor_is_of_the_only_image() -> None:
    m = torch.rand(2, 4, 4)
    only = Inputs(torch.rand(2, 3, 4, 4)).bind(nn.Conv2d(3, 1, 1))
    assert by_name(m, only) == {"input": m}
    with pytest.raises(
        MulticamError, match=r"say which input the map is of, as in \{name: map\}; there are: 'batch.x', 'y'"
    ):
        by_name(m, nested())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3.0, "an explanation is a map, a dict of maps or Attributions, not a float"),
        ({"y": [1.0]}, "an explanation is a map, a dict of maps or Attributions, not a dict"),
        ({}, "the explanation is empty"),
    ],
    ids=["number", "lists", "nothing"],
)
def test_what_is_no_map_is_refused(found: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        by_name(found, nested())


def test_a_method_is_called_with_the_call_and_its_target() -> None:
    call, told = nested(), []

    def explain(model: nn.Module, given: Inputs, target: Any) -> dict[str, Tensor]:
        told.append((model, given, target))
        return EXACT

    model = Nested()
    assert list(explained_maps(explain, model, call, 1)) == ["batch.x", "y"]
    assert told == [(model, call, 1)]


@pytest.mark.parametrize(
    "explain", [GradCAM, GradCAM(nn.Conv2d(1, 2, 1), ""), "gradient"], ids=["class", "made", "name"]
)
def test_what_is_no_function_of_model_inputs_and_target_is_refused(explain: Any) -> None:
    with pytest.raises(MulticamError, match=r"a method is a function of model, inputs and target, not .*; explainer\("):
        refuse_uncallable(explain)
