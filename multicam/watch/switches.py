"""Switches of PyTorch for all models at once, noted and put back: what a pass, or an interrupt in one, leaves behind."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._C import (
    _autograd,
    _functorch,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_function_stack,
)
from torch.nn.modules import module as registry
from torch.utils import _python_dispatch

COMPILER = "torch._dynamo.eval_frame"  # which takes seconds to import, so nobody does for us

# How each is read, and how it is set.
SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *(
        (partial(read, device), partial(write, device))
        for device in ("cpu", "cuda")
        for read, write in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        )
    ),
]

# Those for all modules.
HOOKS: list[dict[int, Any]] = [
    registry._global_forward_hooks,
    registry._global_forward_hooks_with_kwargs,
    registry._global_forward_hooks_always_called,
    registry._global_forward_pre_hooks,
    registry._global_backward_hooks,
    registry._global_backward_pre_hooks,
]


class Switches:
    """How all switches stand, and what is on PyTorch's stacks of modes and hooks."""

    def __init__(self) -> None:
        self._values = [(read, write, read()) for read, write in SWITCHES]
        self._modes = _len_torch_dispatch_stack(), _len_torch_function_stack()
        self._flags = {name: flag for name, flag in vars(_python_dispatch).items() if name.startswith("_is_in_")}
        self._transforms = _functorch.get_dynamic_layer_stack_depth()
        self._hooks = _autograd._top_saved_tensors_default_hooks(True)
        self._autocasts = _autocasts()
        self._global = [(hooks, hooks.copy()) for hooks in HOOKS]
        self._stance = getattr(sys.modules.get(COMPILER), "_stance", None)

    def restore(self) -> None:
        """Put everything back; it may be called again where it was interrupted."""
        dispatch, function = self._modes
        while _len_torch_dispatch_stack() > dispatch:
            _python_dispatch._pop_mode()
        while _len_torch_function_stack() > function:
            _pop_torch_function_stack()
        vars(_python_dispatch).update(self._flags)
        if _functorch.get_dynamic_layer_stack_depth() > self._transforms:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._transforms)
        while _autograd._top_saved_tensors_default_hooks(True) not in (self._hooks, None):
            _autograd._pop_saved_tensors_default_hooks()
        while _autocasts() > self._autocasts:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        for read, write, before in self._values:
            if read() != before:
                write(before)
        for hooks, before in self._global:
            for key in hooks.keys() - before.keys():
                hooks.pop(key, None)
        compiler: Any = sys.modules.get(COMPILER)
        if hasattr(compiler, "_stance") and (before := self._stance or compiler.DynamoStance()) != compiler._stance:
            compiler._set_stance(before)


def _autocasts() -> int:
    """How many blocks of autocast are open."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())
