"""Whatever runs a model says where two passes of it differ, by a state that lies outside of its modules."""

import warnings
from typing import Any

import pytest
from torch import Tensor, nn

import multicam as mc
from tests.helpers.entries import ENTRIES, small_inputs
from tests.helpers.models import Fusion, seeded

STEPS = {"n": 0}
# The script runs the model itself, or a tool does; and where gradients differ, the original CAM is refused.
OTHERS = {"record_attention", "PackedModel", "compat.GradCAM", "OriginalCAM"}
PASSES = {"list_layers": 1, "feature_maps": 2, "FullGrad": 2, "activation_maximization": 28, "deep_dream": 7}


class Growing(Fusion):
    """A model that returns more from call to call, by a count that no module holds."""

    def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
        STEPS["n"] += 1
        return super().forward(rgb, depth, texture) * STEPS["n"]


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "two passes of" in str(warning.message)]


@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - OTHERS))
def test_a_state_outside_is_told_by_every_entry(name: str) -> None:
    model = seeded(Growing)
    for branch in model.branches:
        branch.net[2].inplace = branch.act.inplace = False  # as some methods of captum need it
    found = told(lambda: ENTRIES[name](model, small_inputs(), 1))
    assert any("two passes of Growing" in each and "STEPS" in each for each in found)


class Counting(nn.Conv2d):
    """A convolution with weights that grow from call to call, by such a count."""

    def forward(self, input: Tensor) -> Tensor:
        STEPS["n"] += 1
        return self._conv_forward(input, self.weight * STEPS["n"], None)


def test_kernels_that_change_are_told() -> None:
    assert any("two passes of Counting" in each for each in told(lambda: mc.kernels(Counting(3, 4, 3))))
    assert not told(lambda: mc.kernels(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize("name", PASSES)
def test_a_model_without_such_a_state_runs_no_more_often(name: str) -> None:
    model, runs = seeded(Fusion), list[nn.Module]()
    with model.register_forward_pre_hook(lambda module, _: runs.append(module)):
        assert not told(lambda: ENTRIES[name](model, small_inputs(), 1))
    assert len(runs) == PASSES[name]
