"""Memory that a pass may write into and that is not its own: copied before, and put back."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._nn import flatten_dense_tensors, unflatten_dense_tensors
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError
from multicam.watch.plain import address, has_memory, is_same, is_usual, plain, same_bytes, sampled
from multicam.watch.saved import Kept, refuses_hooks
from multicam.watch.threads import around_work

SMALL = 2**12  # numbers up to which a tensor is copied before every pass: cheaper than to watch it
FIRST = 2**24  # the same for the first pass of a kind, and what is no parameter

# What operations write into without saying so in their schema, by the places of their arguments.
UNSAID = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}

# Those of them that write only in training, and the place of the argument that says so.
TRAINS = {"aten::native_batch_norm": 5, "aten::cudnn_batch_norm": 5, "aten::miopen_batch_norm": 5}

# By which a number leaves a tensor.
NUMBERS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class _Known:
    """What is known of a model: the kinds of passes that were watched, and the names of all that they wrote into.

    And whether it makes gradients of its own by `torch.func`, which takes no hooks of saved tensors; and whether numbers of tensors decide what runs.
    """

    def __init__(self) -> None:
        self.kinds: set[Hashable] = set()
        self.written: set[str] = set()
        self.transforms = False
        self.decides = False


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


class _Flat:
    """Tensors of one type on one device, whose values are copied and compared together."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.samples: dict[int, str] = {}  # the names of those, by place, that are samples of a large one
        self.before: Tensor | None = None

    def now(self) -> Tensor:
        """The values of all in one vector."""
        flat = flatten_dense_tensors(self.tensors)
        return flat.clone() if len(self.tensors) == 1 else flat  # which is a view of one


@dataclass(slots=True)
class _Large:
    """The memory of a large tensor, and its values once they are copied."""

    name: str
    memory: Tensor
    values: Tensor | None = None


class Memory:
    """The tensors of a model and its inputs, whose values, memory and shapes are as before once a pass is over.

    The first pass of each kind is watched, operation by operation, and what is about to be written is copied. Later passes of the kind
    are not watched: what was written then is copied at once. Small tensors always are, whoever writes into them, and by whatever way.
    Where a pass overwrites what its gradients need, all passes of the kind are watched, see `saving`.
    No memory is shared or moved: who holds the address of a tensor, as NumPy and DLPack do, sees it written and put back.

    Args:
        model: Whose pass it is.
        kind: What tells passes apart that may write into different things, beside the values and shapes of the call.
        call: What the model will be called with; None: nothing, or the pass makes it.

    Attributes:
        call: The same call with tensors that share its memory, which is put back; they have no gradients.
        watched: Whether the pass is watched.
        also: What `rewind` puts back besides.
        lost: The names of what was written where nobody saw it, after `restore`: it is changed, and will be copied next time.
    """

    def __init__(self, model: nn.Module, kind: Hashable, call: Inputs | None) -> None:
        self._known = _KNOWN.setdefault(model, _Known())
        self._kind = kind, *(_described(name, leaf) for name, leaf in (call.leaves if call else {}).items())
        self.watched = self._kind not in self._known.kinds
        self.lost: set[str] = set()
        self._held: dict[int, tuple[Tensor, Tensor, bool]] = {}  # by identity, with another view of the same memory
        self._versions: list[tuple[str, Tensor, int]] = []
        self._sizes: dict[int, tuple[Any, int]] = {}  # of each memory, by its address
        self._flat: dict[tuple[torch.dtype, torch.device], _Flat] = defaultdict(_Flat)
        self._large: dict[int, list[_Large]] = defaultdict(list)  # by address
        self._kept: dict[int, list[Kept]] = defaultdict(list)
        self._overwrites = False
        self._mode: Writes | None = None
        self.call = self._lent(call or Inputs())
        self.also: list[Callable[[], object]] = []

    def protect(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put these back after the pass, by names that are the same in every pass."""
        with torch._C.DisableTorchFunction():
            for name, x in tensors:
                if id(x) not in self._held and not x.is_meta:
                    self._hold(name, x)

    def _hold(self, name: str, x: Tensor) -> None:
        alias = x.data  # with a version of its own
        usual = is_usual(x)
        self._held[id(x)] = x, alias, usual
        if not alias.is_inference():
            self._versions.append((name, x, x._version))
        for memory in (alias,) if usual else plain(alias):
            storage, numbers = memory.untyped_storage(), memory.numel()
            size, where = storage.nbytes(), storage._cdata
            if not size:  # a part of a distributed model, which is elsewhere
                continue
            self._sizes[where] = storage, size
            if numbers <= SMALL:
                self._flat[memory.dtype, memory.device].tensors.append(memory)
                continue
            large = _Large(name, memory)
            self._large[where].append(large)
            eagerly = self.watched and numbers <= FIRST and not isinstance(x, nn.Parameter)
            if eagerly or name in self._known.written:
                large.values = memory.clone()
            else:
                flat = self._flat[memory.dtype, memory.device]
                flat.samples[len(flat.tensors)] = name
                flat.tensors.append(sampled(memory))

    def _lent(self, call: Inputs) -> Inputs:
        self.protect((f"input {name}", leaf) for name, leaf in call.leaves.items() if isinstance(leaf, Tensor))

        def lent(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if type(leaf) not in (Tensor, nn.Parameter) or not has_memory(leaf) or leaf.is_inference():
                return leaf.detach().clone()
            alias = leaf.data
            self._held[id(alias)] = alias, leaf.data, is_usual(alias)
            self._versions.append((f"input {name}", alias, alias._version))
            return alias

        return call.map(lent)

    def apart(self, x: Any) -> Any:
        """A tensor without gradient whose memory is not put back; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        held = any(address(memory) in self._sizes for memory in plain(x))
        return x.detach().clone() if held else x.detach()

    def keep(self, x: Tensor) -> Kept:
        """The values that a tensor has now, whoever writes into it later in a watched pass; copied only then."""
        kept = Kept(x)
        if has_memory(x):
            self._kept[address(x)].append(kept)
        return kept

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Let what is recorded in the block for a backward pass keep its values, until after the pass.

        The pass may write into such a tensor, and so do we, when a state is put back that the pass wrote and then computed with.
        Only a watched pass is slowed down by this.
        """
        if not self.watched or self._known.transforms:
            yield
            return
        try:
            keeping = partial(saved_tensors_hooks, self.keep, Kept.unpacked)
            with keeping(), around_work(keeping):
                yield
        except (RuntimeError, MulticamError) as error:
            self._known.transforms = refuses_hooks(error)
            raise

    def __enter__(self) -> "Memory":
        for flat in self._flat.values():
            flat.before = flat.now()
        if self.watched:
            self._mode = Writes(self.about_to_write, self._may_be_written, self._decides)
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
            self._mode = None
            if error[0] is None:
                self._known.kinds.add(self._kind)

    @property
    def decides(self) -> bool:
        """Whether a number of a tensor decided what ran, in any pass of the model that was watched."""
        return self._known.decides

    def _decides(self) -> None:
        self._known.decides = True

    def rewind(self) -> None:
        """Put back what one pass of several in the block changed, before the next, which is not watched."""
        if self._mode is not None and _get_current_dispatch_mode() is self._mode:
            self.__exit__(None, None, None)
        for put_back in self.also:
            put_back()
        self.put_back()

    def about_to_write(self, x: Tensor) -> None:
        """Copy what is protected or kept in the memory of a tensor that is about to be written into."""
        self._may_be_written(x)
        for memory in plain(x):
            self._known.written.update(large.name for large in self._large.get(address(memory), ()))
            self._set_apart(memory)

    def _may_be_written(self, x: Tensor) -> None:
        for memory in plain(x):
            for large in self._large.get(address(memory), ()):
                if large.values is None:
                    large.values = large.memory.clone()

    def _set_apart(self, memory: Tensor) -> None:
        for kept in self._kept.pop(address(memory), ()):
            self._overwrites = True
            kept.copy()

    def put_back(self) -> None:
        """Put the values of everything back, in the memory they were in; it may be called again where it was interrupted."""
        larges = [large for there in self._large.values() for large in there]
        for where, (storage, size) in self._sizes.items():
            if storage.nbytes() != size:
                freed = self._large.get(where, [])
                self._known.written.update(large.name for large in freed)
                self.lost.update(large.name for large in freed if large.values is None)
                storage.resize_(size)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for large in larges:
                if large.values is not None and not same_bytes(large.memory, large.values):
                    self._known.written.add(large.name)
                    self._write(large.memory, large.values)
            for flat in self._flat.values():
                now = flat.now()
                if flat.before is not None and not same_bytes(now, flat.before):
                    self._put_back(flat, now, flat.before)
            for x, alias, usual in self._held.values():
                if not (x.dtype is alias.dtype and x.is_set_to(alias) if usual else is_same(x, alias)):
                    x.data = alias  # the pass gave it other memory

    def _put_back(self, flat: _Flat, now: Tensor, before: Tensor) -> None:
        values = (unflatten_dense_tensors(x, flat.tensors) for x in (now, before))
        for place, (x, found, wanted) in enumerate(zip(flat.tensors, *values, strict=True)):
            if same_bytes(found, wanted):
                continue
            if place in flat.samples:
                self.lost.add(flat.samples[place])
            else:
                self._write(x, wanted)

    def _write(self, x: Tensor, values: Tensor) -> None:
        self._set_apart(x)  # what is saved for a backward pass may be what the pass left there
        x.copy_(values)

    def forget(self) -> None:
        """Have the next pass of this kind watched."""
        self._known.kinds.discard(self._kind)

    def restore(self) -> None:
        """Put everything back, values and memory; it may be called again where it was interrupted."""
        self.put_back()
        unseen = {large.name for larges in self._large.values() for large in larges if large.values is None}
        with torch._C.DisableTorchFunction():
            for name, x, version in self._versions:
                if x._version != version:
                    self.lost.update({name} & unseen)
                    # A graph of the user's may stand on it, and its values are those of then.
                    torch._C._autograd._unsafe_set_version_counter((x,), (version,))
        self._known.written |= self.lost
        if self._overwrites:
            self.forget()
        for everything in (self._versions, self._held, self._kept, self._flat, self._large, self._sizes):
            everything.clear()


class Writes(TorchDispatchMode):
    """Tells of every tensor that an operation is about to write into.

    Args:
        told: Called with each of them, before.
        untold: The same for all that an operation is given which is not of PyTorch: it may write without saying so.
        decides: Called where a number is read from a tensor.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        told: Callable[[Tensor], None],
        untold: Callable[[Tensor], None],
        decides: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told, self._untold, self._decides = told, untold, decides

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in written_by(func, args, kwargs):
            self._told(x)
        if getattr(func, "namespace", "aten") not in ("aten", "prims", "higher_order"):
            for x in _tensors((args, kwargs)):
                self._untold(x)
        if func in NUMBERS:
            self._decides()
        return func(*args, **kwargs)


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into."""
    places = written_arguments(func)
    if not places or (func._schema.name in TRAINS and not args[TRAINS[func._schema.name]]):
        return []
    return [x for place, name in places for x in _tensors(args[place] if place < len(args) else kwargs.get(name))]


@cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """The places and names of the arguments that an operation writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None:  # an operator of higher order runs functions, whose operations are seen
        return ()
    unsaid = UNSAID.get(schema.name, ())
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if place in unsaid or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def _tensors(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else [x for x in tree_leaves(given) if isinstance(x, Tensor)]


def _described(name: str, leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return name, leaf.shape, leaf.dtype
    return name, type(leaf), leaf if isinstance(leaf, str | int | float) else None
