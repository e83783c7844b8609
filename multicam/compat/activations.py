"""What layers return and the gradients that reach it, for scripts that run the model themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from multicam.compat.older import spoken
from multicam.errors import MulticamError
from multicam.watch.layers import Layer, LayerLike
from multicam.watch.standing import on_gradient, on_return
from multicam.watch.undisturbed import find_module, unwrapped

Layers = LayerLike | Sequence[LayerLike]


class ActivationsAndGradients:
    """What layers return in the passes of a script's own, and the gradients that its `backward()` brings.

    The model runs as it is: in its own mode, with gradients for its parameters. Hooks stay on the layers until `release()`.
    `multicam.Trace` needs neither, and leaves everything as it was.

    Args:
        model: Any module.
        target_layers: Modules, or their paths.
        reshape_transform: From what a layer returns, and its gradient, to what is recorded; any function will do.
        detach: Record copies without history, on the CPU; else the tensors themselves, for second derivatives.

    Attributes:
        activations: What the layers returned, in the order of their calls.
        gradients: The gradients by it; those that a backward pass reaches last come first.
        handles: The hooks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> record = ActivationsAndGradients(model, [model[0]])
        >>> record(torch.rand(2, 3, 8, 8))[:, 3].sum().backward()
        >>> record.activations[0].shape, record.gradients[0].shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 4, 6, 6]))
        >>> record.release()
    """

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Callable[[Any], Any] | None = None,
        detach: bool = True,
    ) -> None:
        self.model = model
        self.reshape_transform = reshape_transform
        self.detach = detach
        self.activations: list[Any] = []
        self.gradients: list[Any] = []
        self.handles: list[RemovableHandle] = []
        self.target_layers = listed(target_layers)
        self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; the arguments are those of the model."""
        self.gradients, self.activations = [], []
        with self.attached():
            return self.model(*args, **kwargs)

    def save_activation(self, module: nn.Module, input: Any, output: Any) -> None:
        """Record what a layer returned.

        Args:
            module: The layer.
            input: What it was called with.
            output: What it returned.
        """
        if not self.detach:
            self.activations.append(output)
            return
        shaped = output if self.reshape_transform is None else self.reshape_transform(output)
        if not isinstance(shaped, Tensor):
            raise MulticamError(
                f"a {type(module).__name__} returns a {type(output).__name__}, and activations are tensors: say how to make "
                "one with reshape_transform=lambda output: …"
            )
        self.activations.append(_copied(shaped))

    def save_gradient(self, module: nn.Module, input: Any, output: Any) -> None:
        """Record the gradient by what a layer returned, when it comes.

        Args:
            module: The layer.
            input: What it was called with.
            output: What it returned; gradients of other things than tensors are not recorded.
        """
        if isinstance(output, Tensor) and output.requires_grad:
            on_gradient(output, self._receive)

    def clear(self) -> None:
        """Forget what was recorded."""
        self.activations.clear()
        self.gradients.clear()

    def release(self) -> None:
        """Take the hooks away, and forget what was recorded."""
        self.clear()
        self.unhook()

    def unhook(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """With hooks inside of the block, and outside if they were there."""
        standing = bool(self.handles)
        if not standing:
            self._listen()
        try:
            yield
        finally:
            if not standing:
                self.unhook()

    def _start(self) -> None:
        self._listen()

    def _listen(self) -> None:
        modules = [module_of(self.model, layer) for layer in self.target_layers]
        self.handles += on_return(modules, self.save_activation, self.save_gradient)

    def _receive(self, gradient: Tensor) -> None:
        if self.detach:
            gradient = _copied(gradient if self.reshape_transform is None else self.reshape_transform(gradient))
        self.gradients = [gradient, *self.gradients]  # they come in reverse order


class Lent(ActivationsAndGradients):
    """Those of a CAM, which hold what its last call saw; hooks are there during a call only."""

    def _start(self) -> None:
        """No hooks yet."""


def _copied(x: Tensor) -> Tensor:
    # What follows the layer may overwrite what it returned.
    return x.detach().to("cpu", copy=True)


def listed(layers: Layers) -> list[LayerLike]:
    """One layer or several as a list; a `Sequential` is one.

    Raises:
        MulticamError: If it is none of these.
    """
    if isinstance(layers, LayerLike):
        return [layers]
    if not isinstance(layers, Sequence):
        raise MulticamError(f"target_layers is a list of layers, not {layers!r}")
    return list(layers)


def module_of(model: nn.Module, layer: LayerLike) -> nn.Module:
    """The module of a layer that has no more to it.

    Raises:
        MulticamError: If there is no such module, or the layer says more than its module.
    """
    found = Layer.of(layer)
    if (found.call, found.pick, found.reshape) != (None, None, None):
        raise MulticamError(
            f"activations are those of every call of a module, so give the module or its path, not {found!r}"
        )
    return unwrapped(found.path) if isinstance(found.path, nn.Module) else find_module(unwrapped(model), found.path)
