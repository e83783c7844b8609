"""The calls of a model's modules: how to be told of each, and whether a record of one is confirmed by another pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from multicam.rows import Rows, where
from multicam.tree import leaves


@dataclass(eq=False)
class Call:
    """One call of a module in the recorded pass.

    Attributes:
        module: The module.
        index: Which call of it.
        depends: Whether it must run again.
        output: What it returned, where it need not.
        inside: How many calls of each module (by id) it makes, its own among them.
        rows: Where the samples may lie in each tensor of the output: what all samples proved so far agree with.
    """

    module: nn.Module
    index: int
    depends: bool = False
    output: Any = None
    inside: Counter[int] = field(default_factory=Counter)
    rows: dict[str, list[Rows]] = field(default_factory=dict)


@contextmanager
def every_call(model: nn.Module, begin: Callable[[Call, Any], None], end: Callable[[Any], None]) -> Iterator[None]:
    """Tell `begin` of every call of a module during the block and what it is given, and `end` what the same call returned."""
    counts: Counter[int] = Counter()

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        begin(Call(module, counts[id(module)]), (args, kwargs))
        counts[id(module)] += 1

    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # nothing in it is a module's call
                hooks.enter_context(module.register_forward_pre_hook(called, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(lambda m, args, output: end(output)))
        yield


@contextmanager
def skipping(calls: Mapping[tuple[int, int], Call], returned: Callable[[Call], Any]) -> Iterator[None]:
    """Let the recorded calls, by their modules' ids and numbers, not run in the block: `returned(call)` is what they return."""
    seen: Counter[int] = Counter()

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = calls.get((id(module), seen[id(module)]))
        if call is None:
            seen[id(module)] += 1
            return nn.Module._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]
        seen.update(call.inside)
        return returned(call)

    with ExitStack() as stack:
        for module in {id(call.module): call.module for call in calls.values()}.values():
            # Not `forward`: what the user's hooks made of the output is in the record already.
            vars(module)["_call_impl"] = partial(called, module)
            stack.callback(vars(module).pop, "_call_impl")
        yield


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors inside of a value, by their paths."""
    return {path: leaf for path, leaf in leaves(value).items() if isinstance(leaf, Tensor)}


def confirmed(
    record: Call, again: Any, batch: int, samples: Sequence[int], but: str | None = None
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
