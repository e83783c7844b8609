"""One quiet pass: the model found, run, and left as it was."""

import random
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError, out_of_memory, unknown
from multicam.watch.attributes import Attributes
from multicam.watch.backward import in_common_layouts
from multicam.watch.memory import Memory
from multicam.watch.module_calls import FAILURES, alike, tensors_of
from multicam.watch.outside import Outside
from multicam.watch.recurrent import without_cudnn
from multicam.watch.switches import Switches
from multicam.watch.threads import at_work, lend

LOCK = threading.RLock()  # the flags of a model are one for all threads

# Whether two passes of a model differ, by the names of what a pass changes that does not belong to it.
_DIFFER: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


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
    path), recurrent layers run without cuDNN where there is a graph, and no other thread runs a model in here meanwhile. Restored are the
    attributes of modules (training flags, hooks, what a forward leaves there), containers and objects among them, `requires_grad` and `.grad`,
    the values and memory of parameters, buffers and other tensors, the switches of PyTorch, and the random state of torch, NumPy and Python,
    also where the block raises or is interrupted. What a forward keeps in other places stays; where it changes what the
    model returns, a warning names it.

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
    parameters = dict(_parameters(modules))
    _refuse_parameters(model, parameters.values())
    with alone():
        before = _Before()
        try:
            # Twice the same, for an interrupt that comes while things are put back.
            with before:
                memory = before.set_up(model, modules, parameters, graph, call, part)
                with memory:
                    if graph is not None:
                        torch._C._set_grad_enabled(graph)
                    yield memory
                    before.look_outside()
        except Exception as error:
            before.restore()
            if before.lost:
                error.add_note(_told(model, before.lost))
            raise
        finally:
            before.restore()
        if before.lost:
            warnings.warn(_told(model, before.lost), stacklevel=3)
        if call is not None:
            _doubt(model, call, before.changed, always=bool(graph))


class _Before:
    """How a model was before a pass, and the way back; each step of it may be taken twice.

    Attributes:
        changed: The names of what a watched pass changed that does not belong to the model, which stays.
        lost: The names of what could not be put back, behind the pass.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._outside: Outside | None = None
        self.changed: tuple[str, ...] = ()
        self.lost: set[str] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Take the way back from where it was interrupted; an error in one step keeps none of the others from being taken."""
        errors = []
        while self._undo:
            try:
                self._undo[-1]()
            except Exception as error:
                errors.append(error)
            self._undo.pop()
        if errors:
            raise errors[0]

    def look_outside(self) -> None:
        """See what the pass changed that does not belong to the model."""
        self.changed = tuple(self._outside.changed()) if self._outside else ()

    def set_up(
        self,
        model: nn.Module,
        modules: list[nn.Module],
        parameters: dict[str, nn.Parameter],
        graph: bool | None,
        call: Inputs | None,
        part: Hashable,
    ) -> Memory:
        """Note everything, and put the model into the state of a quiet pass."""
        if graph is not None and torch.is_inference_mode_enabled():
            guard = torch._C._InferenceMode(False)
            self._undo.append(partial(guard.__exit__, None, None, None))
            guard.__enter__()  # type: ignore[no-untyped-call]
        training = [module for module in modules if module.training]
        self._undo.append(partial(_set_training, training, True))
        _set_training(training, False)
        random_states = _random_states({p.device for p in parameters.values()})
        self._undo += random_states
        others = {name: leaf for name, leaf in (call.leaves if call else {}).items() if not isinstance(leaf, Tensor)}
        attributes = Attributes(modules, others, foreign=graph is None)
        memory = Memory(model, (graph, part, tuple(attributes.switches)), call)
        given = [leaf for leaf in memory.call.leaves.values() if isinstance(leaf, Tensor)]
        lend(given, common=[*parameters.values(), *attributes.tensors.values()])
        memory.protect(parameters.items())
        memory.protect(attributes.tensors.items())
        gradients = [(p, p.grad) for p in parameters.values()]
        memory.protect((f"gradient {name}", p.grad) for name, p in parameters.items() if p.grad is not None)
        self.lost = memory.lost
        self._undo.append(partial(_set_gradients, gradients))
        self._undo.append(memory.restore)
        self._undo.append(attributes.restore)
        rules = partial(_add_rules, modules if (torch.is_grad_enabled() if graph is None else graph) else [])
        memory.also = [attributes.restore, rules, *random_states]
        # Where no graph is made they stay as they are, because PyTorch chooses kernels by what requires a gradient, also under `no_grad`.
        recorded = graph is not None or torch.is_grad_enabled()
        trainable = [p for p in parameters.values() if p.requires_grad and recorded]
        self._undo.append(partial(_require_gradients, [(p, p.requires_grad) for p in parameters.values()]))
        _require_gradients((p, False) for p in trainable)
        if graph is not None:
            torch.backends.mha.set_fastpath_enabled(False)  # it calls none of the layers of `nn.TransformerEncoder`
        rules()
        self._undo.append(Switches().restore)
        if memory.watched:
            self._outside = Outside(modules, attributes.left)
        return memory


@contextmanager
def alone() -> Iterator[None]:
    """With no other thread in such a block, with compiled code run eagerly, and with the switches of PyTorch as before behind it."""
    with LOCK:
        switches = Switches()
        try:
            # Twice the same, as above.
            try:
                # Importing the compiler takes seconds. Nothing is compiled before somebody did, but flex attention, which compiles itself.
                compiles = {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys()
                with at_work(), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
                    yield
            finally:
                switches.restore()
        finally:
            switches.restore()


def _random_states(devices: Iterable[torch.device]) -> list[Callable[[], object]]:
    """The ways back to the states of the random numbers of PyTorch, on the CPU and these devices, Python and NumPy."""
    return [
        *(
            partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
            for device in devices
            if device.type == "cuda"
        ),
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002 (what models and tools still draw from)
    ]


def _add_rules(modules: Iterable[nn.Module]) -> None:
    """The hooks by which layers run as their gradients need it."""
    without_cudnn(modules)
    in_common_layouts(modules)


def _set_training(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _set_gradients(gradients: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        if parameter.grad is not gradient:
            parameter.grad = gradient


def _require_gradients(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, required in flags:
        if parameter.requires_grad != required:
            parameter.requires_grad_(required)


def _parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, with the place of its module and its name there."""
    seen: set[int] = set()
    for place, module in enumerate(modules):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{place}.{name}", parameter


def _refuse_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        lazy = isinstance(parameter, UninitializedParameter)
        if not lazy and not parameter.is_inference():
            continue
        name = next(name for name, other in model.named_parameters() if other is parameter)
        if lazy:
            raise MulticamError(f"parameter {name} has no values yet (run the model once), so nothing can be explained")
        raise MulticamError(
            f"parameter {name} was made under torch.inference_mode(), which rules out gradients; make the model outside"
        )


def _told(model: nn.Module, names: Iterable[str]) -> str:
    """That memory of these names, as they are in a pass, is changed."""
    paths = [path for path, _ in model.named_modules()]

    def readable(name: str) -> str:
        kind, _, last = name.rpartition(" ")
        place, _, rest = last.partition(".")
        if kind == "input" or not place.isdecimal():
            return name
        return " ".join(filter(None, (kind, ".".join(filter(None, (paths[int(place)], rest))))))

    return (
        f"{type(model).__name__} wrote into {', '.join(sorted(map(readable, names)))} where it was not seen, so this is changed; it is copied "
        "and put back from now on"
    )


def _doubt(model: nn.Module, call: Inputs, changed: tuple[str, ...], *, always: bool) -> None:
    """Warn where two passes of a model differ, by a state that does not belong to it; it runs twice more to see that, once.

    Args:
        model: The model.
        call: The call that changed something.
        changed: The names of that.
        always: Whether to warn also of what earlier passes showed.
    """
    known = _DIFFER.setdefault(model, {}) if changed else _DIFFER.get(model, {})
    if changed and changed not in known:
        known[changed] = False  # for the passes that look
        known[changed] = _differs(model, call)
    names = sorted(
        {name for names, differ in known.items() if differ and (always or names == changed) for name in names}
    )
    if names:
        warnings.warn(
            f"two passes of {type(model).__name__} with the same inputs differ, though all that belongs to it was put back: its forward changes "
            f"{', '.join(names)}, which stays changed, and what is found holds for the state that it had; keep such a state in a module's attribute",
            stacklevel=4,
        )


def _differs(model: nn.Module, call: Inputs) -> bool:
    found = []
    try:
        for _ in range(2):
            with undisturbed(model, graph=False, call=call, part="twice") as memory:
                found.append([memory.apart(x) for x in tensors_of(memory.call.run(model)).values()])
    except FAILURES as error:
        if out_of_memory(error):
            raise
        return False  # the pass ran a part of what it was lent, and the model does not run all of it
    return len(found[0]) != len(found[1]) or not all(
        x.shape == y.shape and alike(x, y) for x, y in zip(*found, strict=True)
    )


@contextmanager
def module_by_module() -> Iterator[None]:
    """Without the fused path of `nn.TransformerEncoder`, which calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
