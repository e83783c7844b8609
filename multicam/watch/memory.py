"""Memory that a pass may write into and that is not its own: copied before, and put back."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._nn import flatten_dense_tensors, unflatten_dense_tensors
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError

T = TypeVar("T")
SMALL = 4096  # numbers up to which a tensor is copied before every pass: cheaper than to watch it

# What operations write into without saying so in their schema, by the places of their arguments.
UNSAID = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
}


class _Known:
    """What is known of a model: the kinds of passes that were watched, and the names of all that they wrote into.

    And whether it makes gradients of its own by `torch.func`, which takes no hooks of saved tensors.
    """

    def __init__(self) -> None:
        self.kinds: set[Hashable] = set()
        self.written: set[str] = set()
        self.transforms = False


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


class Memory:
    """The tensors of a model and its inputs, whose values, memory and shapes are as before once a pass is over.

    The first pass of each kind is watched, operation by operation, and what is about to be written is copied. Later passes of the kind
    are not watched: what was written then is copied at once. Small tensors always are, whoever writes into them, and by whatever way.
    Where a pass overwrites what its gradients need, all passes of the kind are watched, see `saving`.
    No memory is shared or moved: who holds the address of a tensor, as NumPy and DLPack do, sees it written and put back.

    Args:
        model: Whose pass it is.
        kind: What tells passes apart that may write into different things, beside the shapes of the call.
        call: What the model will be called with; None: nothing, or the pass makes it.

    Attributes:
        call: The same call with tensors that share its memory, which is put back; they have no gradients.
        watched: Whether the pass is watched.
        rewind: Puts back what one pass of several in a block changed, before the next.
    """

    def __init__(self, model: nn.Module, kind: Hashable, call: Inputs | None) -> None:
        self._known = _KNOWN.setdefault(model, _Known())
        self._kind = kind, *(_described(name, leaf) for name, leaf in (call.leaves if call else {}).items())
        self.watched = self._kind not in self._known.kinds
        self._held: dict[str, tuple[Tensor, Tensor, int]] = {}  # the tensor, another view of its memory, its version
        self._small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        self._flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # the values of the small ones
        self._guarded: dict[int, list[str]] = defaultdict(list)  # by memory
        self._copies: dict[str, Tensor] = {}
        self._kept: dict[int, list[Kept]] = defaultdict(list)
        self._overwrites = False
        self._mode = Writes(self.about_to_write)
        self.call = self._lent(call or Inputs())
        self.rewind: Callable[[], object] = self.put_back

    def protect(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put these back after the pass, by names that are the same in every pass."""
        for name, x in tensors:
            if not has_memory(x) or x.is_inference() or not x.numel() or name in self._held or _overlaps(x):
                continue
            alias = x.data  # with a version of its own
            self._held[name] = (x, alias, x._version)
            if x.numel() <= SMALL and not x.is_quantized:
                self._small[x.dtype, x.device].append(alias)
            elif name in self._known.written:
                self._copies[name] = alias.clone()
            else:
                self._guarded[_address(alias)].append(name)

    def _lent(self, call: Inputs) -> Inputs:
        self.protect((f"input {name}", leaf) for name, leaf in call.leaves.items() if isinstance(leaf, Tensor))

        def lent(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.data if has_memory(leaf) and not leaf.is_inference() else leaf.detach().clone()

        return call.map(lent)

    def wrote(self, prefix: str) -> bool:
        """Whether a watched pass wrote into something whose name begins like this, now or earlier."""
        return any(name.startswith(prefix) for name in self._known.written)

    def apart(self, x: Any) -> Any:
        """A tensor without gradient whose memory is not put back; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        held = has_memory(x) and any(_address(alias) == _address(x) for _, alias, _ in self._held.values())
        return x.detach().clone() if held else x.detach()

    def keep(self, x: Tensor) -> "Kept":
        """The values that a tensor has now, whoever writes into it later in a watched pass; copied only then."""
        kept = Kept(x)
        if has_memory(x):
            self._kept[_address(x)].append(kept)
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
            with saved_tensors_hooks(self.keep, Kept.unpacked):
                yield
        except (RuntimeError, MulticamError) as error:
            self._known.transforms = _refuses_hooks(error)
            raise

    def __enter__(self) -> "Memory":
        self._flat = {key: flatten_dense_tensors(tensors) for key, tensors in self._small.items()}
        if self.watched:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.watched:
            self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
            if error[0] is None:
                self._known.kinds.add(self._kind)

    def about_to_write(self, x: Tensor) -> None:
        """Copy what is protected or kept in the memory of a tensor that is about to be written into."""
        if not has_memory(x):
            return
        address = _address(x)
        for name in self._guarded.pop(address, ()):
            self._known.written.add(name)
            self._copies[name] = self._held[name][1].clone()
        for kept in self._kept.pop(address, ()):
            self._overwrites = True
            kept.copy()

    def put_back(self) -> None:
        """Put the values of everything back; it may be called again where it was interrupted."""
        with torch.no_grad():
            for key, before in self._flat.items():
                now, tensors = flatten_dense_tensors(self._small[key]), self._small[key]
                if _same_bytes(now, before):
                    continue
                values = zip(
                    unflatten_dense_tensors(now, tensors), unflatten_dense_tensors(before, tensors), strict=True
                )
                for x, (found, wanted) in zip(tensors, values, strict=True):
                    if not _same_bytes(found.flatten(), wanted.flatten()):
                        self._put_back(x, wanted)
            for name, copy in self._copies.items():
                self._put_back(self._held[name][1], copy)

    def restore(self) -> None:
        """Put everything back, values and memory; it may be called again where it was interrupted."""
        self.put_back()
        lost = []
        for name, (x, alias, version) in self._held.items():
            if x.shape != alias.shape or _address(x) != _address(alias):
                x.data = alias  # the pass gave it other memory
            elif x._version != version and _address(alias) in self._guarded:
                lost.append(name)
        if lost or self._overwrites:
            self._known.kinds.discard(self._kind)
        if lost:
            warnings.warn(
                f"the model wrote into {', '.join(lost)}, which its first pass with inputs like these did not, so this is changed",
                stacklevel=2,
            )
        for everything in (self._held, self._flat, self._copies, self._guarded, self._kept):
            everything.clear()

    def _put_back(self, x: Tensor, values: Tensor) -> None:
        self.about_to_write(x)  # what is saved for a backward pass may be what the pass left there
        x.copy_(values)


class Kept:
    """The values of a tensor at the time when it was kept."""

    def __init__(self, x: Tensor) -> None:
        self.value = x.detach()
        self._version = self.value._version

    def copy(self) -> None:
        """Have the values apart from now on."""
        self.value = self.value.clone()
        self._version = self.value._version

    def unpacked(self) -> Tensor:
        """The values.

        Raises:
            MulticamError: If they were overwritten after the pass.
        """
        if self.value._version != self._version:
            raise MulticamError(
                f"a tensor of shape {tuple(self.value.shape)} that the gradient needs was written into after the forward pass; "
                "run the model and the backward pass again, or write into a copy of it"
            )
        return self.value


def retried(run: Callable[[], T]) -> T:
    """What `run` returns; once more where a pass in it must do without `Memory.saving`, which its memory knows by then."""
    try:
        return run()
    except (RuntimeError, MulticamError) as error:
        if not _refuses_hooks(error):
            raise
    return run()


def _refuses_hooks(error: Exception) -> bool:
    """Whether an error says that `torch.func` runs under no hooks of saved tensors."""
    return "saved tensor hooks" in str(error)


class Writes(TorchDispatchMode):
    """Tells of every tensor that an operation is about to write into.

    Args:
        told: Called with each of them, before.
    """

    supports_higher_order_operators = True
    _places: dict[Any, tuple[tuple[int, str], ...]] = {}  # noqa: RUF012 (a cache for all of them)

    def __init__(self, told: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._places:
            self._places[func] = written_arguments(func)
        for place, name in self._places[func]:
            given = args[place] if place < len(args) else kwargs.get(name)
            for x in (given,) if isinstance(given, Tensor) else tree_leaves(given):
                if isinstance(x, Tensor):
                    self._told(x)
        return func(*args, **kwargs)


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


def has_memory(x: Tensor) -> bool:
    """Whether a tensor is plain memory: neither sparse nor nested, nor the wrapper of a function transform."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return False
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _described(name: str, leaf: Any) -> Hashable:
    return (name, leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (name, type(leaf))


def _overlaps(x: Tensor) -> bool:
    """Whether a tensor shows a number more than once, so that nothing can be written into it."""
    return any(stride == 0 and side > 1 for stride, side in zip(x.stride(), x.shape, strict=True))


def _same_bytes(x: Tensor, y: Tensor) -> bool:
    """Whether two vectors are the same bit for bit, NaN and the sign of zero included."""
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _address(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
