"""The lists of methods: every class of the room is in one of them, and those of one pass need no other."""

import pkgutil
from importlib import import_module
from inspect import isabstract

import pytest

from multicam import cam
from multicam.cam.base import CAM, InputCAM
from multicam.cam.catalogue import INPUT_METHODS, METHODS, ONE_PASS, WRAPPERS
from multicam.cam.wrappers import Moving, Wrapper
from multicam.watch.trace import Trace
from tests.helpers.counting import counted
from tests.helpers.models import Fusion, fusion_inputs, seeded

WRITTEN = {
    kind
    for found in pkgutil.iter_modules(cam.__path__, f"{cam.__name__}.")
    for kind in vars(import_module(found.name)).values()
    if isinstance(kind, type) and issubclass(kind, CAM | InputCAM) and kind.__module__ == found.name
}


def test_every_class_that_is_written_is_listed_once() -> None:
    listed = [*METHODS, *INPUT_METHODS, *WRAPPERS]
    assert len(set(listed)) == len(listed)
    made_of = {Wrapper, Moving}
    assert set(listed) == {kind for kind in WRITTEN if not isabstract(kind)} - made_of


def test_each_list_has_its_kind() -> None:
    assert all(issubclass(kind, CAM) and not issubclass(kind, Wrapper) for kind in METHODS)
    assert all(issubclass(kind, InputCAM) for kind in INPUT_METHODS)
    assert all(issubclass(kind, Wrapper) for kind in WRAPPERS)
    assert set(ONE_PASS) < set(METHODS)


@pytest.mark.parametrize("method", ONE_PASS, ids=lambda kind: kind.__name__)
def test_a_method_of_one_pass_runs_nothing_again(method: type[CAM]) -> None:
    model, layers = seeded(Fusion), {"rgb": "rgb", "depth": "depth"}
    trace = Trace(model, fusion_inputs(), layers, 1)
    with counted(model) as runs:
        method(model, layers).maps(trace, signed=True)
    assert runs == {}


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM", "SmoothGradCAMPlusPlus"])
def test_a_method_that_asks_the_model_again_is_none_of_one_pass(name: str) -> None:
    [method] = [kind for kind in METHODS if kind.__name__ == name]
    model, layers = seeded(Fusion), {"rgb": "rgb"}
    trace = Trace(model, fusion_inputs(), layers, 1)
    with counted(model) as runs:
        method(model, layers).maps(trace, signed=True)
    assert runs["head"] > 0
    assert method not in ONE_PASS
