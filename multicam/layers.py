"""Addresses of activations, and the hooks that watch them during one forward pass."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from multicam.errors import MulticamError, unknown
from multicam.inputs import own, wide
from multicam.reshape import Evidence, Grid, Reshape, Scope, find_reshape
from multicam.tree import leaves, rebuild, resolve

# Parameters that hold tokens put in front of the patch tokens, and those that hold learned queries, as timm, torchvision
# and transformers name them.
TOKEN_PARAMETERS = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "reg_token",
                    "register_token", "cls_embedding")  # fmt: skip
QUERY_PARAMETERS = ("query", "queries", "latent", "prompt", "slot")
# Attributes that say how many channels a module returns: on the second axis, and on the last.
WIDTHS = {"channel": ("out_channels", "num_features", "num_channels"), "feature": ("out_features", "embed_dim")}
GRID_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
T = TypeVar("T", int, Grid)
LOCK = threading.RLock()  # the flags of a model are one for all threads


@dataclass(frozen=True)
class Layer:
    """The address of an activation.

    Args:
        path: Module path as in `model.named_modules()`, or the module itself; `"encoder.stage4#1"` is its second call.
        call: Which call of the module in one forward pass, counted from 0. None: its only one; a module that is called
            more often is refused, because a map of the wrong call looks like any other map.
        pick: Which tensor of its output, as a path (`0`, `"last_hidden_state"`); None: its only floating-point tensor
            (for `nn.MultiheadAttention` the attended values).
        reshape: From that tensor to `(b c *grid)`, see `multicam.reshape`; None: found by itself where the model proves
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers, which runs eagerly and on one device."""
    if not isinstance(model, nn.Module):  # callers without a type checker
        raise MulticamError(f"a model is a torch.nn.Module, not a {type(model).__name__}")
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner: nn.Module = getattr(model, "module" if parallel else "_orig_mod", model)
    return model if inner is model else unwrapped(inner)


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path; the marks that `torch.compile` leaves in paths are taken out."""
    return {path.replace("_orig_mod", "").replace("..", ".").strip("."): module
            for path, module in model.named_modules(remove_duplicate=False)}  # fmt: skip


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        MulticamError: If there is none.
    """
    paths = module_paths(model)
    if path not in paths:
        raise unknown(f"layer in {type(model).__name__}", path, filter(None, paths))
    return paths[path]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients for parameters, no compiled code; all as before afterwards, buffers and RNG too.

    Raises:
        MulticamError: If the model has parameters without values, or made under `torch.inference_mode()`.
    """
    # Every pass comes through here, so the tree of modules is walked once, and only what must change is touched.
    modules = list(model.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    for parameter in parameters:
        if isinstance(parameter, UninitializedParameter) or parameter.is_inference():
            _refuse_parameter(model, parameter)
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(LOCK)
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing is compiled before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_set_training, [(module, module.training) for module in modules])
        _set_training((module, False) for module in modules)
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    stack.callback(_restore, module, name, buffer, buffer._version, own(buffer))
        for parameter in parameters:
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


def _set_training(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        if module.training != training:
            module.training = training


def _refuse_parameter(model: nn.Module, parameter: nn.Parameter) -> NoReturn:
    name = next(name for name, p in model.named_parameters() if p is parameter)
    if isinstance(parameter, UninitializedParameter):
        raise MulticamError(f"parameter {name} has no values yet (run the model once), so nothing can be explained")
    raise MulticamError(
        f"parameter {name} was made under torch.inference_mode(), which rules out gradients; make the model outside"
    )


def _restore(module: nn.Module, name: str, buffer: Tensor, version: int, before: Tensor) -> None:
    module._buffers[name] = buffer
    if buffer._version != version:
        with torch.no_grad():
            buffer.copy_(before)


@contextmanager
def module_by_module() -> Iterator[None]:
    """Without the fused path of `nn.TransformerEncoder`, which calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class Tap:
    """One layer being observed in one forward pass, and all that is known about its output."""

    layer: Layer
    path: str
    module: nn.Module
    calls: int = 0
    shape: torch.Size | None = None
    reshape: Reshape | None = None
    under_no_grad: bool = False

    @property
    def label(self) -> str:
        """The layer as a reader writes it."""
        return self.path if self.layer.call is None else f"{self.path}#{self.layer.call}"

    def pick(self, output: Any) -> str:
        """The path of the tensor to observe in the layer's output.

        Raises:
            MulticamError: If there is none, it is not floating point, or `Layer(pick=…)` must say which.
        """
        tensors = {path: leaf for path, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
        floating = [path for path, leaf in tensors.items() if leaf.is_floating_point()]
        pick = self.layer.pick
        if pick is None and isinstance(self.module, nn.MultiheadAttention):
            pick = 0
        if pick is not None:
            path = resolve(f"output of layer {self.label!r}:", str(pick), tensors)
        elif len(floating) > 1:
            choices = ", ".join(f"pick={path!r} {tuple(tensors[path].shape)}" for path in floating)
            raise MulticamError(
                f"layer {self.label!r} returns several tensors; say which with Layer(…, pick=…): {choices}"
            )
        else:
            path = next(iter(floating or tensors), "")
        if path not in floating:
            given = tensors[path].dtype if path in tensors else type(output).__name__
            raise MulticamError(
                f"layer {self.label!r} returns {given}, which is not floating point: it can carry no map"
            )
        return path

    def grid(self, x: Tensor, batch: int) -> Float[Tensor, "b c *grid"]:
        """The picked tensor as a grid, in single precision at least.

        Raises:
            MulticamError: If the reshape returns something else.
        """
        assert self.reshape is not None
        grid = self.reshape(x)
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
        self._names = [self._path(layer) for layer in self.layers]

    @contextmanager
    def observe(self, batch: int, receive: Callable[[int, Tap, Tensor], Tensor]) -> Iterator[list[Tap]]:
        """Hook the layers for the forward pass inside the block.

        Args:
            batch: The number of samples of the pass.
            receive: Called as `receive(i, tap, x)` with the picked tensor of layer `i` and `tap.reshape` known; what it
                returns goes on through the model instead of `x`.

        Raises:
            MulticamError: At the end of the block, if a layer was never called, or called more often than asked for.
        """
        taps = [Tap(layer, path, self.paths[path]) for layer, path in zip(self.layers, self._names, strict=True)]

        def tapped(module: nn.Module, _: Any, output: Any) -> Any:
            for i, tap in enumerate(taps):
                if tap.module is not module:
                    continue
                if tap.calls == (tap.layer.call or 0):
                    output = rebuild(output, partial(exchange, tap.pick(output), i, tap))
                tap.calls += 1
            return output

        def exchange(picked: str, i: int, tap: Tap, path: str, x: Any) -> Any:
            if path != picked:
                return x
            tap.shape, tap.under_no_grad = x.shape, not torch.is_grad_enabled()
            tap.reshape = tap.layer.reshape or find_reshape(x, self.evidence(tap, batch, grids))
            return receive(i, tap, x)

        with ExitStack() as hooks:
            grids = hooks.enter_context(self.watch_grids())
            if taps:
                hooks.enter_context(module_by_module())
            for module in {id(tap.module): tap.module for tap in taps}.values():
                hooks.enter_context(module.register_forward_hook(tapped))
            yield taps
        for tap in taps:
            self._check_calls(tap)

    @contextmanager
    def watch_grids(self) -> Iterator[list[tuple[str, Grid]]]:
        """The grid that each convolution and pooling returns during the block, by its path."""
        grids: list[tuple[str, Grid]] = []

        def returned(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def note(module: nn.Module, _: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    grids.append((path, tuple(output.shape[2:])))

            return note

        with ExitStack() as hooks:
            for path, module in self.paths.items():
                if isinstance(module, GRID_MODULES):
                    hooks.enter_context(module.register_forward_hook(returned(path)))
            yield grids

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

    def evidence(self, tap: Tap, batch: int, grids: Sequence[tuple[str, Grid]]) -> Evidence:
        """What is known about a layer's output, given the grids that were returned before it."""
        parts = tap.path.split(".") if tap.path else []
        around = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        said = [m.batch_first for m in tap.module.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
        sequence_first = not said[0] if said else None
        return Evidence(tap.label, batch, sequence_first, tuple(self._scope(path, grids) for path in around))

    def _scope(self, scope: str, grids: Sequence[tuple[str, Grid]]) -> Scope:
        def inside(facts: Iterable[tuple[str, T]]) -> frozenset[T]:
            return frozenset(fact for path, fact in facts if not scope or path == scope or path.startswith(scope + "."))

        extras = [rows for path, rows in self._facts["token"] if inside([(path, rows)])]
        return Scope(
            inside(self._facts["channel"]),
            inside(self._facts["feature"]),
            inside(grids),
            frozenset({0, sum(extras), *extras}),
            inside(self._facts["query"]),
        )

    @cached_property
    def _facts(self) -> dict[str, list[tuple[str, int]]]:
        """The widths, class tokens and learned queries of all modules, each with the module's path."""
        facts: dict[str, list[tuple[str, int]]] = {"channel": [], "feature": [], "token": [], "query": []}
        for path, module in self.paths.items():
            for kind, names in WIDTHS.items():
                facts[kind] += [(path, w) for name in names if isinstance(w := getattr(module, name, None), int)]
            if isinstance(module, nn.LayerNorm):
                facts["feature"].append((path, module.normalized_shape[-1]))
            own = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim}
            if isinstance(module, nn.Embedding):  # called by what it embeds
                own = {path.rpartition(".")[2]: p for p in own.values()}
            for name, parameter in own.items():
                rows = parameter.numel() // parameter.shape[-1] if parameter.numel() else 0
                if name.startswith(TOKEN_PARAMETERS):
                    facts["token"].append((path, rows))
                if any(word in name for word in QUERY_PARAMETERS):
                    facts["query"].append((path, rows))
        return facts

    def _check_calls(self, tap: Tap) -> None:
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
        if tap.layer.call is None and tap.calls > 1:
            raise MulticamError(
                f"layer {tap.path!r} is called {tap.calls} times in one forward pass, as a shared encoder is once per "
                f"input; say which call you mean: {tap.path + '#0'!r} to {f'{tap.path}#{tap.calls - 1}'!r}"
            )
        if tap.shape is None:
            raise MulticamError(
                f"layer {tap.label!r} does not exist: {tap.path!r} is called {tap.calls} times, counted from 0"
            )
