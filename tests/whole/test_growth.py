"""What a call needed is free when its result is: nothing waits in reference cycles for the collector, and nothing grows."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from torch import Tensor

import multicam as mc
from multicam.call.tree import leaves
from tests.helpers.attention_models import ATTENDING
from tests.helpers.entries import ENTRIES, small_inputs, without_dropout

QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


@contextmanager
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def live() -> int:
    """How many tensors there are, and objects of the package."""
    kinds = (type(x) for x in gc.get_objects())
    return sum(issubclass(kind, Tensor) or str(kind.__module__).startswith("multicam.") for kind in kinds)


def left(call: Callable[[], object]) -> int:
    """How many tensors more there are after a few calls than after the first."""
    call()  # what is remembered of a model is made once
    with uncollected():
        before = live()
        for _ in range(3):
            call()
        return live() - before


@QUIET
@pytest.mark.parametrize("name", ENTRIES)
def test_no_entry_leaves_a_tensor(name: str) -> None:
    model, inputs = without_dropout().eval(), small_inputs()
    assert left(lambda: ENTRIES[name](model, inputs, 1)) == 0


@QUIET
@pytest.mark.parametrize("name", ENTRIES)
def test_no_entry_that_is_interrupted_leaves_a_tensor(name: str) -> None:
    model, inputs = without_dropout().eval(), small_inputs()
    passes = iter(range(10**9))
    stop_at: list[int] = [10**9]

    def stop(*_: object) -> None:
        if next(passes) >= stop_at[0]:
            raise KeyboardInterrupt

    model.head.register_forward_hook(stop)

    def interrupted() -> None:
        nonlocal passes
        passes, stop_at[0] = iter(range(10**9)), 0
        with pytest.raises(KeyboardInterrupt):
            ENTRIES[name](model, inputs, 1)

    assert left(interrupted) == 0


def total(output: Any) -> Tensor:
    """The sum of the first of a model's outputs, for each sample."""
    return next(x for x in leaves(output).values() if isinstance(x, Tensor) and x.is_floating_point()).flatten(1).sum(1)


ATTENTIONS = [
    "timm_swin",
    "timm_maxvit",
    "timm_crossvit",
    "timm_coat",
    "torchvision_vit",
    "hf_clip",
    "hf_detr",
    "hf_segformer",
    "hf_t5",
]


@QUIET
@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_attention_leaves_a_tensor(name: str) -> None:
    case = ATTENDING[name]()

    def explained() -> None:
        att = mc.attention(case.model, case.inputs, total)
        with suppress(mc.MulticamError):
            mc.rollout(att), mc.relevance(att)

    assert left(explained) == 0
