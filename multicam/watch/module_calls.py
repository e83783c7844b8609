"""The calls of a model's modules: how to be told of each, and whether a record of one is confirmed by another pass."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from math import isfinite
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.tree import leaves
from multicam.watch.hooks import after, before
from multicam.watch.threads import works

# What a model raises that cannot be run so; anything else, an exception of the user's own, goes through.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Key = tuple[int, int]  # the id of a module, and which call of it


@dataclass(frozen=True)
class Rows:
    """Where the samples lie in a recorded tensor, proved by passes with two sizes of the batch.

    Attributes:
        batch: How many samples the recorded tensor has.
        axis: The axis that grows with the batch; None for a tensor without samples.
        each: How many entries of the axis belong to one sample.
        apart: Whether those entries lie `batch` apart, as `torch.cat` of whole batches puts them, and not side by side.
    """

    batch: int
    axis: int | None = None
    each: int = 1
    apart: bool = False

    def copies(self, x: Tensor, sample: int, n: int) -> Tensor:
        """The tensor for `n` copies of one sample, which share their memory where that can be."""
        if self.axis is None:
            return x
        sizes = (self.each, self.batch) if self.apart else (self.batch, self.each)
        split = x.view(*x.shape[: self.axis], *sizes, *x.shape[self.axis + 1 :])
        at = self.axis + self.apart
        copies = split.narrow(at, sample, 1).expand(*(n if i == at else -1 for i in range(split.ndim)))
        return (
            copies.squeeze(self.axis + (not self.apart)) if self.each == 1 else copies.flatten(self.axis, self.axis + 1)
        )

    def take(self, x: Tensor, samples: Sequence[int]) -> Tensor:
        """The tensor for these samples, which may come several times."""
        if self.axis is None:
            return x
        at = torch.as_tensor(samples, device=x.device)
        if self.each > 1:
            inside = torch.arange(self.each, device=x.device)
            apart = inside[:, None] * self.batch + at
            at = (apart if self.apart else at[:, None] * self.each + inside).flatten()
        return x.index_select(self.axis, at)


def where(x: Tensor, again: Tensor, batch: int, samples: Sequence[int], known: list[Rows] | None) -> list[Rows]:
    """Where the samples may lie in `x`, if `again` holds these of them and it was `known` to be one of these places."""
    n = len(samples)
    if x.ndim != again.ndim or x.dtype != again.dtype:
        return []
    grown = [axis for axis in range(x.ndim) if x.shape[axis] != again.shape[axis]]
    if not grown:
        candidates = [Rows(batch)]
    elif len(grown) == 1 and x.shape[grown[0]] * n == again.shape[grown[0]] * batch:
        each = x.shape[grown[0]] // batch
        candidates = [Rows(batch, grown[0], each, apart) for apart in ((False, True) if each > 1 else (False,))]
    else:
        return []
    possible = [rows for rows in candidates if known is None or rows in known]
    return [rows for rows in possible if alike(rows.take(x, samples), again)]


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of passes with other sizes of a batch."""
    share = rounding(y)
    if not share or not y.numel():
        return torch.equal(x, y)
    size = y.abs()
    size = size.where(size < 1e30, 0).max()  # masks are filled with the lowest number there is
    return torch.allclose(x, y, share, share * float(size), equal_nan=True)


def rounding(x: Tensor) -> float:
    """By how much passes with other sizes of a batch may differ, as a share of the largest value."""
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0
    short = x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return float((2**-10 if short else torch.finfo(x.dtype).eps) ** (2 / 3))


@dataclass(eq=False)
class ModuleCall:
    """One call of a module in the recorded pass.

    Attributes:
        module: The module.
        index: Which call of it.
        output: What it returned, where it need not.
        inside: How many calls of each module (by id) it makes, its own among them.
        rows: Where the samples may lie in each tensor of the output: what all samples proved so far agree with.
    """

    module: nn.Module
    index: int
    output: Any = None
    inside: Counter[int] = field(default_factory=Counter)
    rows: dict[str, list[Rows]] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What finds the same call in another pass."""
        return id(self.module), self.index


@contextmanager
def every_call(
    model: nn.Module, begin: Callable[[ModuleCall, Any], None], end: Callable[[ModuleCall, Any], None]
) -> Iterator[None]:
    """Tell `begin` of every call of a module during the block and what it is given, and `end` of it and what it returned.

    Calls end from the inside out, in each thread by itself; a call that raises does not end.
    """
    counts: Counter[int] = Counter()
    open_calls: dict[int, list[ModuleCall]] = defaultdict(list)  # by thread
    lock = RLock()

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        with lock:
            call = ModuleCall(module, counts[id(module)])
            counts[id(module)] += 1
            open_calls[get_ident()].append(call)
            begin(call, (args, kwargs))

    def returned(module: nn.Module, _: Any, output: Any) -> None:
        with lock:
            while (call := open_calls[get_ident()].pop()).module is not module:
                pass  # it raised, and the model went on
            end(call, output)

    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # nothing in it is a module's call
                hooks.enter_context(before(module, called))
                hooks.enter_context(after(module, returned))
        yield


@contextmanager
def skipping(calls: Mapping[Key, ModuleCall], returned: Callable[[ModuleCall], Any]) -> Iterator[None]:
    """Let the recorded calls, by their modules' ids and numbers, not run in the block: `returned(call)` is what they return.

    A module's `forward` is skipped, and hooks see what it would have returned: who keeps that for other modules keeps it again.
    """
    seen: Counter[int] = Counter()
    pending: dict[
        tuple[int, nn.Module], ModuleCall | None
    ] = {}  # between a call and its forward, hooks may call others

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if works((args, kwargs)):
            call = calls.get((id(module), seen[id(module)]))
            seen.update(call.inside if call is not None else [id(module)])
            pending[get_ident(), module] = call
        return nn.Module._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]

    def skippable(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)  # whose parameters a model may look at
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = pending.pop((get_ident(), module), None)
            return original(*args, **kwargs) if call is None else returned(call)

        return forward

    with ExitStack() as stack:
        for module in {id(call.module): call.module for call in calls.values()}.values():
            own: dict[str, Any] = vars(module)
            for name, instead in (
                ("forward", skippable(module, module.forward)),
                ("_call_impl", partial(called, module)),
            ):
                stack.callback(own.__setitem__, name, own[name]) if name in own else stack.callback(own.pop, name)
                own[name] = instead
        yield


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors inside of a value, by their paths."""
    return {path: leaf for path, leaf in leaves(value).items() if isinstance(leaf, Tensor)}


def confirmed(
    record: ModuleCall, again: Any, batch: int, samples: Sequence[int], but: str | None = None
) -> dict[str, list[Rows]] | None:
    """Where the samples lie in the tensors of a record, if `again` holds these; None otherwise."""
    before, after = leaves(record.output), leaves(again)
    if before.keys() != after.keys():
        return None
    found = {}
    for path, x in before.items():
        if path == but:
            continue
        if isinstance(x, Tensor) and isinstance(after[path], Tensor):
            found[path] = where(x, after[path], batch, samples, record.rows.get(path))
            if not found[path]:
                return None
        elif not _same(x, after[path]):
            return None
    return found


def _same(x: Any, y: Any) -> bool:
    try:
        return type(x) is type(y) and bool(x == y)
    except (RuntimeError, ValueError, TypeError):  # packed sequences, arrays
        return False


def within(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether scores are equal up to a tolerance."""
    return torch.allclose(x, y, 0, tolerance if isfinite(tolerance) else 0, equal_nan=True)
