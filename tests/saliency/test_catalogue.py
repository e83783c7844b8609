"""The list of attributions: all that are called with a model and its inputs, and no other."""

from collections.abc import Callable
from inspect import isfunction, signature

import pytest
import torch

from multicam import saliency
from multicam.saliency.attributions import Attributions
from multicam.saliency.averaging import expected_gradients
from multicam.saliency.captum_bridge import captum_attribution
from multicam.saliency.catalogue import ATTRIBUTIONS
from tests.helpers.models import Fusion, fusion_inputs, seeded


@pytest.mark.parametrize("function", ATTRIBUTIONS, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore:the GradCAM map of layer:UserWarning")
def test_all_are_called_alike(function: Callable[..., Attributions]) -> None:
    takes_layers = "layers" in signature(function).parameters
    layers = [{name: name for name in ("rgb", "depth", "texture")}] if takes_layers else []
    model, inputs = seeded(Fusion), fusion_inputs(2, 16)
    found = function(model, inputs, *layers, 1)
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in inputs.items()}
    torch.testing.assert_close(found.scores, model(**inputs)[:, 1])


def test_what_needs_more_is_left_out() -> None:
    every = {
        f for name in dir(saliency) if isfunction(f := getattr(saliency, name)) and f.__module__ != "multicam.faces"
    }
    assert every - set(ATTRIBUTIONS) == {expected_gradients, captum_attribution}
    assert len(set(ATTRIBUTIONS)) == len(ATTRIBUTIONS) == len(every) - 2
