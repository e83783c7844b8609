"""Whatever is raised halfway through a public function, it arrives as it was raised and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from tests.helpers.entries import ENTRIES, small_inputs, without_dropout
from tests.helpers.hygiene import Stop, assert_unchanged, state
from tests.whole.test_interrupts import lock_is_free, switches

# Those that are given no target, or that only look at what they are given.
WITHOUT_TARGET = {"feature_maps", "factorize", "list_layers", "PackedModel", "deep_dream"}


def training() -> nn.Module:
    """A model in the state of somebody's training run: gradients, mixed modes, frozen parts, hooks."""
    model = without_dropout().train()
    model.depth.eval()
    model.texture.requires_grad_(False)
    with torch.random.fork_rng():
        model(**small_inputs(2)).sum().backward()
    model.rgb.register_forward_hook(lambda m, i, o: None)
    return model


def raising(error: BaseException, after: int) -> Callable[..., Any]:
    """Raises from its call of that number on."""
    calls = iter(range(10**9))

    def stop(*_: Any) -> None:
        if next(calls) >= after:
            raise error

    return stop


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "error",
    [Stop(), torch.OutOfMemoryError("CUDA out of memory"), GeneratorExit()],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("where", ["first layer", "head", "head later", "target"])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_raised_arrives_and_nothing_is_changed(name: str, where: str, error: BaseException) -> None:
    model, inputs = training(), {key: x.requires_grad_() for key, x in small_inputs().items()}
    if name == "record_attention":  # in which the model runs as its user has it
        model.eval()
    target: Any = 1
    stop = raising(error, int(where == "head later"))
    if where == "target":
        if name in WITHOUT_TARGET:
            pytest.skip("it has no target")

        def target(output: Tensor) -> Tensor:
            stop()
            return output[:, 1]

    else:
        module = model.rgb.net[0] if where == "first layer" else model.head
        module.register_forward_hook(stop)
    before, around = state(model, inputs), switches()
    try:
        ENTRIES[name](model, inputs, target)
    except type(error) as caught:
        assert caught is error
    except mc.MulticamError as refusal:
        # A class is what some explain, and a model that fails on what they make of its inputs is told as that.
        assert isinstance(error, Stop) or "class" in str(refusal)
    else:
        assert where == "head later", "nothing was raised"
    assert_unchanged(before, state(model, inputs))
    assert switches() == around
    assert lock_is_free()
