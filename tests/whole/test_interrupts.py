"""A Ctrl-C at any moment leaves everything as it was, what is said of a thread and of the process included."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as registry
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from multicam.watch.undisturbed import LOCK
from tests.helpers.entries import ENTRIES, small_inputs, without_dropout
from tests.helpers.hygiene import assert_unchanged, state

MOMENTS = 3  # of each entry; more were tried by hand


def switches() -> dict[str, Any]:
    """What belongs to the thread, or to all of them."""
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch._C._get_cudnn_enabled(),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
        "hooks for all": (len(registry._global_forward_hooks), len(registry._global_forward_pre_hooks)),
        "threads": [threading.Thread.start, ThreadPoolExecutor.submit],
        "numpy": str(np.random.get_state()),  # noqa: NPY002
    }


def lock_is_free() -> bool:
    found: list[bool] = []

    def take() -> None:
        found.append(LOCK.acquire(timeout=5))
        if found[0]:
            LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


class Interrupt:
    """Counts the lines that run, and at one of them raises what a Ctrl-C does."""

    def __init__(self, at: int | None = None) -> None:
        self.lines, self._at = 0, at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines += 1
        if self.lines == self._at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def __enter__(self) -> "Interrupt":
        self._before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ENTRIES)
def test_an_interrupt_leaves_everything_as_it_was(name: str) -> None:
    model = without_dropout().eval()
    if name != "record_attention":  # in which the model runs as its user has it
        model.rgb.train()
    model.texture.requires_grad_(False)
    inputs = {key: x.requires_grad_() for key, x in small_inputs().items()}
    ENTRIES[name](model, inputs, 1)
    with Interrupt() as counted:
        ENTRIES[name](model, inputs, 1)
    draw = random.Random(name)
    for _ in range(MOMENTS):
        before, around = state(model, inputs), switches()
        # What is raised while Python frees something, it tells and goes on.
        with suppress(KeyboardInterrupt), Interrupt(draw.randrange(1, counted.lines)):
            ENTRIES[name](model, inputs, 1)
        assert_unchanged(before, state(model, inputs))
        assert switches() == around
        assert lock_is_free()
