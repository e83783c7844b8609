"""cuDNN's recurrent layers, which have no backward pass in evaluation mode: others take their place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from multicam.watch.hooks import Kernels


def without_cudnn(modules: Iterable[nn.Module]) -> None:
    """Hooks by which cuDNN is off while the recurrent ones of these modules run, and as before behind each, also where it raises."""
    before: list[bool] = []

    def off(*_: Any) -> None:
        before.append(torch._C._get_cudnn_enabled())
        torch._C._set_cudnn_enabled(False)

    def on(*_: Any) -> None:
        if before:
            torch._C._set_cudnn_enabled(before.pop())

    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(Kernels(off), prepend=True)
            module.register_forward_hook(Kernels(on), always_call=True)
