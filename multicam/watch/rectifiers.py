"""What ReLUs do to the gradient that comes back through them: guided backpropagation and deconvnets.

No module, function or tensor of the model is exchanged. Whatever way a ReLU is written, as a module, a function or in
place, its backward pass is one operation of PyTorch, and there the rule applies. TorchScript takes it apart when it compiles
a stretch of a model; such stretches are noted.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Rule = Literal["guided", "deconvnet"]
_RELU = torch.ops.aten.threshold_backward.default
_CLIPPED = torch.ops.aten.hardtanh_backward.default  # of ReLU6


class Rectifiers(TorchDispatchMode):
    """A backward pass in which ReLUs, those with an upper limit like ReLU6 included, follow a rule.

    `guided`: a gradient passes where it and the ReLU's input are positive. Springenberg et al. 2014, arXiv:1412.6806,
    section 3.4. `deconvnet`: where it is positive, whatever the input was. Zeiler and Fergus 2013, arXiv:1311.2901.

    Attributes:
        met: How many ReLUs there were.
        compiled: Whether a part of the backward pass was compiled by TorchScript, so that its ReLUs cannot be told.

    Example:
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> score = (x.relu() * torch.tensor([1.0, 1.0, -1.0])).sum()
        >>> with Rectifiers("guided"):
        ...     torch.autograd.grad(score, x, retain_graph=True)
        (tensor([0., 1., 0.]),)
        >>> with Rectifiers("deconvnet"):
        ...     torch.autograd.grad(score, x)
        (tensor([1., 1., 0.]),)
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rule = rule
        self.met = 0
        self.compiled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, or the rule in place of a ReLU's gradient."""
        node = torch._C._current_autograd_node()
        self.compiled |= node is not None and "DifferentiableGraph" in node.name()
        if not _is_rectifier(func, args):
            return func(*args, **(kwargs or {}))
        self.met += 1
        positive: Tensor = args[0].clamp(min=0)
        return positive if self.rule == "deconvnet" else func(positive, *args[1:], **(kwargs or {}))


def _is_rectifier(func: Any, args: Any) -> bool:
    return (func is _RELU or func is _CLIPPED) and args[2] == 0
