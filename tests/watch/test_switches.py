"""PyTorch's switches are as before, however they were left."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as registry
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from multicam.watch.switches import SWITCHES, Switches, _autocasts


def now() -> list[Any]:
    return [
        *(read() for read, _ in SWITCHES),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        _python_dispatch._is_in_torch_dispatch_mode,
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        _autocasts(),
        list(registry._global_forward_hooks.items()),
    ]


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def entered(*managers: Any) -> Any:
    for manager in managers:
        manager.__enter__()
    return managers


LEFT: dict[str, Callable[[], Any]] = {
    "no grad": lambda: entered(torch.no_grad()),
    "fast path": lambda: torch.backends.mha.set_fastpath_enabled(False),
    "cuDNN": lambda: torch._C._set_cudnn_enabled(False),
    "attention": lambda: entered(sdpa_kernel(SDPBackend.MATH)),
    "type": lambda: torch.set_default_dtype(torch.float64),
    "autocast": lambda: entered(torch.autocast("cpu"), torch.autocast("cpu")),
    "functions": lambda: entered(Functions()),
    "operations": lambda: entered(Operations(), Operations()),
    "saved tensors": lambda: entered(*(saved_tensors_hooks(lambda x: x, lambda x: x) for _ in range(2))),
    "transform": lambda: torch._C._functorch._grad_increment_nesting(),
    "hook": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_put_back(name: str) -> None:
    before, switches = now(), Switches()
    held = LEFT[name]()  # its end would put something back
    assert now() != before
    switches.restore()
    assert now() == before
    switches.restore()
    assert now() == before
    del held


def test_what_was_there_stays() -> None:
    with Functions(), Operations(), saved_tensors_hooks(lambda x: x, lambda x: x), torch.autocast("cpu"):
        before, switches = now(), Switches()
        held = [leave() for name, leave in LEFT.items()]
        switches.restore()
        assert now() == before
        del held


def test_the_compiler_is_as_before_also_where_it_was_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo  # what torch.compile has imported

    compiler = torch._dynamo.eval_frame
    name = "torch._dynamo.eval_frame"
    with monkeypatch.context() as hidden:
        hidden.delitem(sys.modules, name)
        without = Switches()
        without.restore()
    switches = Switches()
    for each in (switches, without):
        torch.compiler.set_stance("force_eager")
        assert compiler._stance.stance == "force_eager"
        each.restore()
        assert compiler._stance.stance == "default"
