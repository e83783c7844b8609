"""One quiet pass: the model found, run, and left as it was."""

import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack, _pop_torch_function_stack
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import _pop_mode

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError, unknown
from multicam.watch.attributes import Attributes
from multicam.watch.memory import Memory
from multicam.watch.threads import at_work, own

LOCK = threading.RLock()  # the flags of a model are one for all threads


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
def undisturbed(
    model: nn.Module, graph: bool | None, call: Inputs | None = None, *, part: Hashable = None
) -> Iterator[Memory]:
    """The quiet pass: whatever runs a model runs it in here, and afterwards everything is as it was.

    The model is in evaluation mode, its parameters get no gradients, nothing is compiled, every module is called (no fast
    path), and no other thread runs a model in here meanwhile. Restored are the attributes of modules (training flags, hooks, what a forward
    leaves there) and containers among them, `requires_grad`, the values and memory of parameters, buffers and other tensors, and the random
    state of torch, NumPy and Python, also where the block raises. What a forward keeps in other places is not known here.

    Args:
        model: Any module.
        graph: Whether the pass records a graph for gradients, whatever the caller's modes are, inference mode included. None: a
            pass of the caller's own (a proxy), whose modes and fast paths are kept, and where no graph is made `requires_grad`, too.
        call: What the model will be called with, which the memory lends to it.
        part: What tells a pass that runs a part of the model, or runs it otherwise, from a plain one with such a call.

    Yields:
        The memory that is put back; its `call` is what the model may be given.

    Raises:
        MulticamError: If the model has parameters without values, or made under `torch.inference_mode()`.
    """
    modules = list(model.modules())
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    for parameter in parameters.values():
        if isinstance(parameter, UninitializedParameter) or parameter.is_inference():
            _refuse_parameter(model, parameter)
    with alone():
        before = _Before()
        try:
            # Twice the same, for an interrupt that comes while things are put back.
            with before:
                memory = before.set_up(model, modules, list(parameters.values()), graph, call, part)
                with nullcontext() if graph is None else torch.inference_mode(False), memory:
                    if graph is not None:
                        torch.set_grad_enabled(graph)
                    yield memory
        finally:
            before.restore()


class _Before:
    """How everything was before a pass, and the way back; each step of it may be taken twice."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        grad, fast = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
        self._undo.append(partial(torch.set_grad_enabled, grad))
        self._undo.append(partial(torch.backends.mha.set_fastpath_enabled, fast))

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Take the way back from where it was interrupted."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def set_up(
        self,
        model: nn.Module,
        modules: list[nn.Module],
        parameters: list[nn.Parameter],
        graph: bool | None,
        call: Inputs | None,
        part: Hashable,
    ) -> Memory:
        """Note everything, and put the model into the state of a quiet pass."""
        training = [module for module in modules if module.training]
        self._undo.append(partial(_set_training, training, True))
        _set_training(training, False)
        first = len(self._undo)
        for device in {p.device for p in parameters if p.device.type == "cuda"}:
            self._undo.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
        self._undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
        self._undo.append(partial(random.setstate, random.getstate()))
        self._undo.append(partial(np.random.set_state, np.random.get_state()))  # noqa: NPY002 (what models and tools still draw from)
        attributes = Attributes(modules)
        memory = Memory(model, (graph, part), call)
        own(list(memory.call.leaves.values()))
        memory.protect((f"parameter {i}", p) for i, p in enumerate(parameters))
        memory.protect(attributes.tensors.items())
        self._undo.append(memory.restore)
        self._undo.append(attributes.restore)
        state = [attributes.restore, memory.put_back, *self._undo[first:-2]]
        memory.rewind = lambda: [put_back() for put_back in state]
        # Where no graph is made they stay as they are, because PyTorch chooses kernels by what requires a gradient, also under `no_grad`.
        recorded = graph is not None or torch.is_grad_enabled()
        trainable = [p for p in parameters if p.requires_grad and recorded]
        self._undo.append(partial(_require_gradients, trainable, True))
        _require_gradients(trainable, False)
        if graph is not None:
            torch.backends.mha.set_fastpath_enabled(False)  # it calls none of the layers of `nn.TransformerEncoder`
        self._undo.append(partial(_pop_modes, _len_torch_dispatch_stack(), _len_torch_function_stack()))
        return memory


@contextmanager
def alone() -> Iterator[None]:
    """With no other thread in such a block, and with compiled code run eagerly."""
    with LOCK, at_work():
        # Importing the compiler takes seconds. Nothing is compiled before somebody did, but flex attention, which compiles itself.
        if {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys():
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield


def _set_training(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _require_gradients(parameters: Iterable[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


def _pop_modes(dispatch: int, function: int) -> None:
    """Take away modes that an interrupt left behind."""
    while _len_torch_dispatch_stack() > dispatch:
        _pop_mode()
    while _len_torch_function_stack() > function:
        _pop_torch_function_stack()


def _refuse_parameter(model: nn.Module, parameter: nn.Parameter) -> NoReturn:
    name = next(name for name, p in model.named_parameters() if p is parameter)
    if isinstance(parameter, UninitializedParameter):
        raise MulticamError(f"parameter {name} has no values yet (run the model once), so nothing can be explained")
    raise MulticamError(
        f"parameter {name} was made under torch.inference_mode(), which rules out gradients; make the model outside"
    )


@contextmanager
def module_by_module() -> Iterator[None]:
    """Without the fused path of `nn.TransformerEncoder`, which calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
