"""Which threads work for a pass: the one that runs it, and those that it hands work to. All others are somebody else's."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from multiprocessing.pool import Pool, ThreadPool
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from multicam.watch.plain import has_memory

Work = Callable[..., Any]


class Workers:
    """The threads of one pass.

    A thread is one of them while it does what was submitted to a pool, or started, by one of them. What watches the operations of the thread that
    submits watches those of the work, too. A module that any other thread calls with a tensor of the pass is called for it as well: one that
    the pass lends to the model, a part of such a one, or one in memory that a module returned.
    """

    def __init__(self) -> None:
        self._threads = Counter([threading.get_ident()])
        self._memory: dict[int, StorageWeakRef] = {}  # while they are there, no other memory has the address
        self._lent: dict[int, Tensor] = {}  # by identity: others may hold the same memory
        self._common: list[Iterable[Tensor]] = []
        self.around: list[Callable[[], AbstractContextManager[object]]] = []  # of what is handed over

    def here(self) -> bool:
        """Whether the thread that asks is one of them."""
        return self._threads[threading.get_ident()] > 0

    def own(self, value: Any) -> None:
        """Whoever is handed these tensors works for the pass."""
        for memory in _memory(value):
            if memory._cdata not in self._memory:
                self._memory[memory._cdata] = StorageWeakRef(memory)  # type: ignore[no-untyped-call]

    def lend(self, tensors: Iterable[Tensor], common: Iterable[Tensor]) -> None:
        """Whoever is handed one of these very tensors works for the pass; the memory of `common` ones tells nothing, as everybody has it."""
        self._lent.update((id(x), x) for x in tensors)
        self._common += [list(self._lent.values()), common]

    def hands(self, given: Any) -> bool:
        """Whether these arguments hold a tensor of the pass."""
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        if any(id(x) in self._lent or id(x._base) in self._lent for x in tensors):
            return True
        found = {memory._cdata for memory in _memory(tensors)} & self._memory.keys()
        return bool(found) and not found <= {memory._cdata for some in self._common for memory in _memory(list(some))}

    def enlisted(self, work: Work) -> Work:
        """The same work, by one of them."""
        around = list(self.around)
        modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]

        @wraps(work)
        def enlisted(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            self._threads[thread] += 1
            try:
                with ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(
                            _RelayedFunctions(mode) if isinstance(mode, TorchFunctionMode) else _Relayed(mode)
                        )
                    for make in around:
                        stack.enter_context(make())
                    return work(*args, **kwargs)
            finally:
                self._threads[thread] -= 1

        return enlisted


_now: Workers | None = None


def works(given: Any = None) -> bool:
    """Whether the thread that asks works for the pass that runs, or there is none; `given` are the arguments of the module that it calls."""
    return _now is None or _now.here() or _now.hands(given)


def own(value: Any) -> None:
    """Let whoever is handed these tensors work for the pass that runs."""
    if _now is not None:
        _now.own(value)


def lend(tensors: Iterable[Tensor], common: Iterable[Tensor]) -> None:
    """Let whoever is handed one of these very tensors work for the pass that runs.

    Args:
        tensors: What the model is given, which may share memory with what its user holds.
        common: The tensors of the model, which all threads have.
    """
    if _now is not None:
        _now.lend(tensors, common)


@contextmanager
def around_work(make: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """A block in which what the pass hands to other threads runs in such a context, which belongs to a thread as PyTorch has it."""
    workers = _now
    if workers is None:
        yield
        return
    workers.around.append(make)
    try:
        yield
    finally:
        workers.around.remove(make)


@contextmanager
def at_work() -> Iterator[None]:
    """A pass of the thread that enters, which is the only one; a pass inside of a pass has the same workers."""
    global _now
    if _now is not None:
        yield
        return
    before = [vars(owner)[name] for owner, name, _ in HANDED]
    try:
        try:
            _now = Workers()
            for (owner, name, place), method in zip(HANDED, before, strict=True):
                setattr(owner, name, _enlisting(method, place))
            yield
        finally:
            _dismiss(before)
    finally:
        _dismiss(before)  # once more, for an interrupt that comes meanwhile


def _dismiss(before: Iterable[Work]) -> None:
    global _now
    for (owner, name, _), method in zip(HANDED, before, strict=True):
        setattr(owner, name, method)
    _now = None


def _enlisting(method: Work, place: int) -> Work:
    """A method that hands work to another thread, which enlists it; the work is its argument at a place, or itself where it is a thread."""

    @wraps(method)
    def handing(*args: Any, **kwargs: Any) -> Any:
        workers = _now
        if workers is None or not workers.here():
            return method(*args, **kwargs)
        if isinstance(args[0], threading.Thread):
            if not _serves_a_pool(args[0]):
                args[0].run = workers.enlisted(args[0].run)  # type: ignore[method-assign]
        elif len(args) > place and not (isinstance(args[0], Pool) and not isinstance(args[0], ThreadPool)):
            args = (*args[:place], workers.enlisted(args[place]), *args[place + 1 :])
        return method(*args, **kwargs)

    return handing


def _serves_a_pool(thread: threading.Thread) -> bool:
    """Whether a thread outlives the work that it is started for."""
    target = getattr(thread, "_target", None)
    return getattr(target, "__module__", "") in ("concurrent.futures.thread", "multiprocessing.pool")


# The owner and the name of each method by which work is handed over, and the place of the work among its arguments.
HANDED: list[tuple[type, str, int]] = [
    (threading.Thread, "start", 0),
    (ThreadPoolExecutor, "submit", 1),
    (Pool, "apply_async", 1),
    (Pool, "_map_async", 1),
    (Pool, "imap", 1),
    (Pool, "imap_unordered", 1),
]


class _Relayed(TorchDispatchMode):
    """What another thread's mode does, in this one: a mode itself is entered by one thread at a time."""

    supports_higher_order_operators = True

    def __init__(self, mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._mode.__torch_dispatch__(func, types, args, kwargs)


class _RelayedFunctions(TorchFunctionMode):
    """The same for modes of PyTorch's functions."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._mode.__torch_function__(func, types, args, kwargs)


def _memory(value: Any) -> list[UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(value) if isinstance(x, Tensor) and has_memory(x)]
