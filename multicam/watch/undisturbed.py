"""One quiet pass: the model found, run, and left as it was."""

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from multicam.call.inputs import own
from multicam.errors import MulticamError, unknown

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
def undisturbed(model: nn.Module, graph: bool | None) -> Iterator[None]:
    """The quiet pass: whatever runs a model runs it in here, and afterwards everything is as it was.

    The model is in evaluation mode, its parameters get no gradients, nothing is compiled, every module is called (no fast
    path), and no other thread runs a model in here meanwhile. Restored are training flags, `requires_grad`, buffers, and the random
    state of torch, NumPy and Python, also where the block raises.

    Args:
        model: Any module.
        graph: Whether the pass records a graph for gradients, whatever the caller's modes are, inference mode included. None: a
            pass of the caller's own (a proxy), whose modes and fast paths are kept.

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
        stack.enter_context(alone())
        if graph is not None:
            stack.enter_context(module_by_module())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(graph))
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 (what models and tools still draw from)
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


@contextmanager
def alone() -> Iterator[None]:
    """With no other thread in such a block, and with compiled code run eagerly."""
    with LOCK, ExitStack() as stack:
        # Importing the compiler takes seconds. Nothing is compiled before somebody did, but flex attention, which compiles itself.
        if {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
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
