"""Addresses of activations, and the hooks that watch them during one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs, wide
from multicam.call.tree import leaves, rebuild, resolve
from multicam.errors import MulticamError, unknown
from multicam.watch.hooks import after
from multicam.watch.module_calls import alike, tensors_of
from multicam.watch.plain import has_memory
from multicam.watch.reshape import Reshape
from multicam.watch.undisturbed import module_paths, undisturbed, unwrapped


@dataclass(frozen=True)
class Layer:
    """The address of an activation.

    Args:
        path: Module path as in `model.named_modules()`, or the module itself; `"encoder.stage4#1"` is its second call.
        call: Which call of the module in one forward pass, counted from 0. None: its only one; a module that is called
            more often is refused, because a map of the wrong call looks like any other map.
        pick: Which tensor of its output, as a path (`0`, `"last_hidden_state"`); None: its only floating-point tensor
            (for `nn.MultiheadAttention` the attended values).
        reshape: From that tensor to `(b c *grid)`, see `multicam.watch.reshape`; None: found by itself where the model proves
            it.
        onto: The input that the map is laid on; None: decided by whoever asks for the map.

    Example:
        >>> Layer.of("encoder.stage4#1")
        Layer('encoder.stage4', call=1)
    """

    path: str | nn.Module
    call: int | None = None
    pick: str | int | None = None
    reshape: Reshape | None = None
    onto: str | None = None

    @classmethod
    def of(cls, value: "LayerLike") -> "Layer":
        """`value` as a Layer: a path, `path#call`, a module or a Layer."""
        layer = value if isinstance(value, Layer) else cls(value)
        if not isinstance(layer.path, str | nn.Module):
            raise MulticamError(f"a layer is a module path, a module or a Layer, not {value!r}")
        if isinstance(layer.path, str) and "#" in layer.path:
            path, _, call = layer.path.partition("#")
            if not call.isdecimal():
                raise MulticamError(f"the call in layer {layer.path!r} must be a number counted from 0, as in {path}#1")
            layer = replace(layer, path=path, call=int(call))
        if layer.call is not None and layer.call < 0:
            raise MulticamError(f"calls are counted from 0, not {layer.call}")
        return layer

    def __repr__(self) -> str:
        name = self.path if isinstance(self.path, str) else type(self.path).__name__
        shown = [f"{k}={v!r}" for k in ("call", "pick", "reshape", "onto") if (v := getattr(self, k)) is not None]
        return f"Layer({', '.join([repr(name), *shown])})"


LayerLike = str | nn.Module | Layer


def picked(layer: Layer, label: str, kind: type[nn.Module], output: Any) -> str:
    """The path of the tensor to observe in what a module returned.

    Args:
        layer: What the user said.
        label: The layer as a reader writes it.
        kind: The module's class.
        output: What it returned.

    Raises:
        MulticamError: If there is none, it is not floating point, or `Layer(pick=…)` must say which.
    """
    tensors = {path: leaf for path, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
    floating = [path for path, leaf in tensors.items() if leaf.is_floating_point()]
    pick = layer.pick
    if pick is None and issubclass(kind, nn.MultiheadAttention):
        pick = 0
    if pick is not None:
        path = resolve(f"output of layer {label!r}:", str(pick), tensors)
    elif len(floating) > 1:
        choices = ", ".join(f"pick={path!r} {tuple(tensors[path].shape)}" for path in floating)
        raise MulticamError(f"layer {label!r} returns several tensors; say which with Layer(…, pick=…): {choices}")
    else:
        path = next(iter(floating or tensors), "")
    if path not in floating:
        given = tensors[path].dtype if path in tensors else type(output).__name__
        raise MulticamError(f"layer {label!r} returns {given}, which is not floating point: it can carry no map")
    return path


@dataclass
class Tap:
    """One layer being observed in one forward pass, and all that is known about its output."""

    layer: Layer
    path: str
    module: nn.Module
    calls: int = 0
    shape: torch.Size | None = None
    under_no_grad: bool = False
    elsewhere: bool = False  # whether another thread of the pass called it
    handed_on: Tensor | None = (
        None  # what went on instead of the output, where that lay in the memory of what the layer was given
    )

    @property
    def parted(self) -> bool:
        """Whether the model wrote into what went on instead of the output, so that who holds what the layer was given does not see it."""
        return self.handed_on is not None and self.handed_on._version > 0

    @property
    def label(self) -> str:
        """The layer as a reader writes it."""
        return self.path if self.layer.call is None else f"{self.path}#{self.layer.call}"

    def pick(self, output: Any) -> str:
        """The path of the tensor to observe in the layer's output, see `picked`."""
        return picked(self.layer, self.label, type(self.module), output)

    def grid(self, x: Tensor, batch: int) -> Float[Tensor, "b c *grid"]:
        """The picked tensor as a grid, in single precision at least; the layer is one that is located, see `multicam.watch.survey.located`.

        Raises:
            MulticamError: If the reshape returns something else.
        """
        assert self.layer.reshape is not None
        grid = self.layer.reshape(x)
        if grid.ndim < 3 or grid.shape[0] != batch:
            raise MulticamError(
                f"the reshape of layer {self.label!r} returned {tuple(grid.shape)} from {tuple(x.shape)}; "
                f"it must return (b c *grid) with b = {batch}"
            )
        return wide(grid)


class Taps:
    """The layers of one model to observe, ready for any number of forward passes.

    Raises:
        MulticamError: If a path or module is not in the model.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerLike]) -> None:
        self.model = model
        self.paths = module_paths(model)
        self.layers = [Layer.of(layer) for layer in layers]
        self.names = [self._path(layer) for layer in self.layers]

    @contextmanager
    def observe(self, receive: Callable[[int, Tap, Tensor], Tensor]) -> Iterator[list[Tap]]:
        """Hook the layers for the forward pass inside the block.

        Args:
            receive: Called as `receive(i, tap, x)` with the picked tensor of layer `i`; what it returns goes on through the
                model instead of `x`.

        Raises:
            MulticamError: At the end of the block, if a layer was never called, or called more often than asked for.
        """
        taps = [Tap(layer, path, self.paths[path]) for layer, path in zip(self.layers, self.names, strict=True)]
        thread = get_ident()

        def tapped(module: nn.Module, given: Any, output: Any) -> Any:
            for i, tap in enumerate(taps):
                if tap.module is not module:
                    continue
                tap.elsewhere |= get_ident() != thread
                if tap.calls == (tap.layer.call or 0):
                    output = rebuild(output, partial(exchange, tap.pick(output), i, tap, given))
                tap.calls += 1
            return output

        def exchange(picked: str, i: int, tap: Tap, given: Any, path: str, x: Any) -> Any:
            if path != picked:
                return x
            tap.shape, tap.under_no_grad = x.shape, not torch.is_grad_enabled()
            onward = receive(i, tap, x)
            if _shares(x, given):
                tap.handed_on = onward
            return onward

        with ExitStack() as hooks:
            for module in {id(tap.module): tap.module for tap in taps}.values():
                hooks.enter_context(after(module, tapped))
            yield taps
        for tap in taps:
            self.check_calls(tap)

    def check_parted(self, taps: Sequence[Tap], call: Inputs, picked: Any, pick: Callable[[Any], Any]) -> None:
        """Refuse a pass in which a copy of a layer's output made the model return something else; it takes one more only where that may be.

        Args:
            taps: What `observe` yielded.
            call: What the model was called with.
            picked: The part of what it returned that counts.
            pick: From what it returns to that part.
        """
        parted = [tap.label for tap in taps if tap.parted]
        for tap in taps:
            tap.handed_on = None
        if not parted:
            return
        with undisturbed(self.model, graph=False, call=call, part="untapped") as memory:
            plain = tensors_of(pick(memory.call.run(self.model)))
            found = {path: x.detach() for path, x in tensors_of(picked).items()}
            same = all(
                path in found and found[path].shape == x.shape and alike(found[path], x) for path, x in plain.items()
            )
        if not same:
            raise MulticamError(
                f"layer {parted[0]!r} returns what it is given, the model writes into that afterwards and reads it again elsewhere: with a copy in "
                "between, as maps need it, the model returns something else; take the layer before it, or one behind"
            )

    def _path(self, layer: Layer) -> str:
        if isinstance(layer.path, nn.Module):
            inner = unwrapped(layer.path)
            paths = [path for path, module in self.paths.items() if module is inner]
            if not paths:
                raise MulticamError(f"the layer {type(layer.path).__name__} is not a module of this {self._kind}")
            return paths[0]
        if layer.path not in self.paths:
            raise unknown(f"layer in {self._kind}", layer.path, (path for path in self.paths if path))
        return layer.path

    @property
    def _kind(self) -> str:
        return type(self.model).__name__

    def check_calls(self, tap: Tap) -> None:
        """Refuse a layer that a pass called never, more often than was asked for, or by chance."""
        if tap.calls == 0:
            inside = [path for path in self.paths if path.startswith(tap.path + ".")]
            children = [path for path in inside if path.count(".") == tap.path.count(".") + 1]
            script = isinstance(tap.module, torch.jit.ScriptModule)
            why = "TorchScript runs it out of sight" if script else "its forward was bypassed"
            hint = f"; the model may call its parts instead: {', '.join(children[-6:])}" if children else ""
            raise MulticamError(
                f"layer {tap.label!r} ({type(tap.module).__name__}) was never called in this forward pass, or {why}{hint}. "
                "list_layers(model, inputs) shows every layer that is called"
            )
        if tap.calls > 1 and tap.elsewhere:
            raise MulticamError(
                f"layer {tap.path!r} is called {tap.calls} times in one forward pass, in threads, so chance decides which call is the first; take a "
                "layer that is called once, or call this one in one thread"
            )
        if tap.layer.call is None and tap.calls > 1:
            raise MulticamError(
                f"layer {tap.path!r} is called {tap.calls} times in one forward pass, as a shared encoder is once per "
                f"input; say which call you mean: {tap.path + '#0'!r} to {f'{tap.path}#{tap.calls - 1}'!r}"
            )
        if tap.shape is None:
            raise MulticamError(
                f"layer {tap.label!r} does not exist: {tap.path!r} is called {tap.calls} times, counted from 0"
            )


def _shares(x: Tensor, given: Any) -> bool:
    """Whether a tensor lies in the memory of one of these."""
    tensors = (leaf for leaf in leaves(given).values() if isinstance(leaf, Tensor) and has_memory(leaf))
    return has_memory(x) and any(leaf.untyped_storage()._cdata == x.untyped_storage()._cdata for leaf in tensors)
