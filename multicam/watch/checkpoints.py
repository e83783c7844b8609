"""What a model runs once more during the backward pass: parts under `torch.utils.checkpoint`."""

import sys
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CODE = ["torch", "utils", "checkpoint.py"]


def running() -> bool:
    """Whether the code that asks is a part that runs once more during the backward pass."""
    return bool(_around())


def _around() -> str:
    """The function of PyTorch that runs such a part around the code that asks, the innermost; empty: none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.replace("\\", "/").split("/")[-3:] == CODE:
            return code.co_qualname
        frame = frame.f_back
    return ""


class Recomputed(TorchDispatchMode):
    """Sees whether a gradient in the block has to come through a part that runs once more during the backward pass.

    Attributes:
        found: Whether one has.
        reentrant: Whether such a part is differentiated by a backward pass of its own, which gives its parameters gradients.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = self.reentrant = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
            around = _around()
            self.found |= bool(around)
            self.reentrant |= around.startswith("CheckpointFunction")
        return func(*args, **kwargs)
