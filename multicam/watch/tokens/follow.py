"""The mode that sees every operation of a model's passes, and tells a listener of the attentions among them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import get_ident
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.hooks import take_off, takes_hooks
from multicam.watch.memory import written_by
from multicam.watch.tokens.fused import FUSED, Scores
from multicam.watch.tokens.origins import Origins
from multicam.watch.tokens.written_out import Attended, Products
from multicam.watch.undisturbed import module_paths

T = TypeVar("T")
NATIVE = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_triton_multi_head_attention"}


@dataclass(frozen=True)
class Place:
    """Where in the model an operation runs.

    Attributes:
        path: The innermost module's.
        modules: The modules around it, from the outermost to the innermost.
    """

    path: str
    modules: Sequence[nn.Module]


@runtime_checkable
class Listener(Protocol[T]):
    """What a `Follower` tells of the passes that it sees, in the order in which it happens."""

    def begin(self, module: nn.Module, given: Mapping[str, Tensor], batch: int, origins: Origins) -> None:
        """A forward pass of the model, or of a part that is called alone, begins.

        Args:
            module: The model or the part.
            given: Its tensors by the names of the inputs.
            batch: The number of samples; 0 where nobody knows.
            origins: Follows the tokens until the pass ends.
        """

    def writes(self, x: Tensor) -> None:
        """The pass is about to write into this tensor, or nobody watches it from now on."""

    def fused(self, place: Place, scores: Scores, v: Tensor, output: Tensor, source: str) -> T:
        """A kernel has attended; whose tokens its output holds is for the listener to say, by `origins.give`."""

    def written_out(self, place: Place, found: Attended) -> T:
        """A product has completed attention that is written out; the same holds for its output."""

    def add(self, made: T) -> None:
        """What the listener made of an attention; an error of its user's in here is not taken for one of following."""

    def no_attention(self, path: str, what: str) -> None:
        """What looked like attention turned out not to be, or could not be followed."""

    def hidden(self, path: str, what: str) -> None:
        """Something may hold attention that cannot be seen."""


class Follower(TorchDispatchMode, Generic[T]):
    """Sees every operation of the forward passes of one model in its own thread, and follows their tokens.

    Args:
        model: Any module.
        listener: Whom to tell.
        graph: Let a graph begin at the inputs of each pass, also where no parameter requires a gradient.
        call: What the model is called with; None: each pass tells.
    """

    supports_higher_order_operators = True

    def __init__(
        self, model: nn.Module, listener: Listener[T], graph: bool = False, call: Inputs | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._listener, self._graph, self._call = model, listener, graph, call
        self._paths = {id(module): path for path, module in reversed(module_paths(model).items())}
        self._modules: list[nn.Module] = []
        self._thread = get_ident()  # a mode sees its own thread only, and hooks see all
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters() if not is_lazy(p)}
        self._given: list[Tensor] = []
        self._origins: Origins
        self._products: Products

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the passes that run during the block."""
        if not takes_hooks(self._model):
            raise MulticamError(
                f"{type(self._model).__name__} is TorchScript, which does not tell when it runs: put it into a module, as in "
                "torch.nn.Sequential(model), and explain that"
            )
        modules = [
            module  # what a scripted one runs is seen, and belongs to the module around it
            for module in self._model.modules()
            if module is self._model or not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            try:
                for module in modules:
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=False)
                    module.register_forward_hook(self._leave, always_call=True)
                self.__enter__()  # type: ignore[no-untyped-call]
                yield
            finally:
                if _get_current_dispatch_mode() is self:
                    self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                take_off(modules, self._is_mine)
        finally:
            take_off(modules, self._is_mine)  # once more, for an interrupt that comes meanwhile

    def _is_mine(self, hook: Any) -> bool:
        return hook in (self._enter, self._leave)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if get_ident() != self._thread:
            return None
        if self._modules:
            self._modules.append(module)
            return None
        if self._graph and torch.is_grad_enabled():
            args, kwargs = rebuild(args, _with_graph), rebuild(kwargs, _with_graph)
        _refuse_untold(module, args, kwargs)
        given, batch = _told_apart(module, args, kwargs) if self._call is None else _named(self._call)
        origins = Origins(given, batch)
        self._listener.begin(module, given, batch, origins)
        self._given = list(given.values())
        self._origins, self._products = origins, Products(partial(_lies_in, self._parameters))
        self._modules.append(module)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if get_ident() != self._thread or not any(entered is module for entered in self._modules):
            return
        while self._modules.pop() is not module:
            pass  # a module that raised before its hooks
        if self._modules:
            return
        # What nobody watches after the pass: buffers (caches of keys), and inputs of the caller's.
        for x in (*self._model.buffers(), *self._given):
            self._listener.writes(x)
        for softmax in self._products.softmaxes:
            if not softmax.used:
                self._listener.no_attention(softmax.path, f"softmax {softmax.shape} whose result multiplies no values")
        for path, shape in self._products.unconfirmed:
            self._listener.no_attention(path, f"weights {shape} that do not sum to one")
        del self._products, self._origins
        self._given = []

    @property
    def _path(self) -> str:
        return self._paths.get(id(self._modules[-1]), "")

    @property
    def _place(self) -> Place:
        return Place(self._path, self._modules)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A backward pass runs checkpointed parts again.
        if not self._modules or torch._C._current_graph_task_id() != -1:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            return self._higher(func, args, kwargs)
        if _is_composite(func):
            with self:
                returned = func.decompose(*args, **kwargs)
            if returned is not NotImplemented:
                return returned
        for x in written_by(func, args, kwargs):
            self._products.before(x)
            self._listener.writes(x)
        returned = func(*args, **kwargs)
        try:
            made = self._seen(func, args, kwargs, returned)
        except MulticamError:
            raise  # what the user said does not fit
        except Exception as error:  # the model's pass must go on
            if out_of_memory(error):
                raise
            what = f"{func._schema.name} on what may be attention, which could not be followed: {error}"
            self._listener.no_attention(self._path, what)
            return returned
        if made is not None:
            self._listener.add(made)
        return returned

    def _seen(self, func: OpOverload, args: Any, kwargs: Any, returned: Any) -> T | None:
        """Take note of an operation that has run: what the listener makes of the attention that it completes."""
        if func in FUSED:
            return self._listener.fused(self._place, Scores.of(func, args, kwargs), args[2], returned[0], "fused")
        found = self._products.after(func, args, kwargs, returned, self._path)
        self._origins.path = self._path
        self._origins.follow(func, args, kwargs, returned)
        if found is not None:
            return self._listener.written_out(self._place, found)
        if func.namespace not in ("aten", "prims", "prim", "torchvision") or func._opname in NATIVE:
            sequences = [x for x in args if isinstance(x, Tensor) and x.ndim >= 3 and x.is_floating_point()]
            if len(sequences) >= 3 or func._opname in NATIVE:
                self._listener.hidden(self._path, f"the kernel {func._schema.name}, whose inside cannot be seen")
        return None

    def _higher(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        returned = func(*args, **kwargs)
        if str(func) == "flex_attention":
            self._listener.add(self._listener.fused(self._place, Scores.of_flex(args), args[2], returned[0], "flex"))
        else:
            self._listener.hidden(self._path, f"the operator {func}, whose inside cannot be seen")
        return returned


def _lies_in(memory: set[int], x: Tensor) -> bool:
    return x.untyped_storage()._cdata in memory


def _refuse_untold(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse what hides the tensors of a pass from the dispatcher."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise MulticamError(
            f"{type(module).__name__} runs inside of a transform of torch.func (vmap, grad, jvp …), where no tensor is that of "
            "a single forward pass: call the model itself"
        )
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in tree_leaves((args, kwargs))):
        raise MulticamError(
            f"{type(module).__name__} is given a nested tensor, whose samples have matrices of different sizes: "
            "give it one sample at a time, or padded samples with a mask"
        )


def _told_apart(module: nn.Module, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], int]:
    """The tensors of a call by the names of its inputs, and the number of samples; 0 where nobody knows."""
    if _is_sequence_first(module):
        return {}, 0  # rows of its inputs are no samples
    try:
        return _named(Inputs(*args, **kwargs).bind(module))
    except MulticamError:  # it is for the model to refuse what it cannot take
        return {}, 0


def _named(inputs: Inputs) -> tuple[dict[str, Tensor], int]:
    return {name: leaf for name, leaf in inputs.leaves.items() if isinstance(leaf, Tensor)}, inputs.batch


@cache
def _is_composite(func: OpOverload) -> bool:
    """Whether an operation is made of others, which inference mode does not take apart by itself."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    return bool(has(name, "CompositeImplicitAutograd") and not has(name, "CPU"))


def _is_sequence_first(module: nn.Module) -> bool:
    """Whether a layer of PyTorch's takes `(n b c)`."""
    layers = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer)
    stacks = (nn.TransformerEncoder, nn.TransformerDecoder)
    attentions = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return isinstance(module, layers + stacks) and not all(m.batch_first for m in attentions)


def _with_graph(_: str, leaf: Any) -> Any:
    """A copy that requires a gradient, and may be written into."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad or leaf.is_inference():
        return leaf
    return leaf.detach().requires_grad_().clone()
