"""The record of a pass, and the pass that confirms it: which calls of modules need not run again, and what they return instead.

Replays and mixing stand on it. A record says what each call of a module returned, and what that depends on, found by the marks of `Taint`. It
is believed only where a full pass, with other values and another number of rows, returns the same again.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.watch.attributes import Attributes
from multicam.watch.hooks import has_others
from multicam.watch.memory import Memory
from multicam.watch.module_calls import Key, ModuleCall, Rows, every_call, rounding, tensors_of
from multicam.watch.plain import has_memory
from multicam.watch.saved import Kept
from multicam.watch.taint import Taint
from multicam.watch.undisturbed import undisturbed

# From the output of a pass, and the sample that each of its rows stems from, to the scores of the rows.
Read = Callable[[Any, Sequence[int]], Tensor]


_Kept = tuple[ModuleCall, dict[str, Kept]]  # a call, and the tensors that it returned by their paths


@dataclass(eq=False)
class _Open:
    """A call of the pass that has begun, with what was counted before it, and the colours that it has met so far.

    `kept` are the calls inside of it that are kept if it is not, `told` is whether a module inside of it tells somebody else what it returns, or leaves something behind, and `attributes` is what its module held.
    """

    call: ModuleCall
    before: Counter[int]
    colours: int
    attributes: dict[str, Any]
    kept: list[_Kept] = field(default_factory=list)
    told: bool = False


class Recording:
    """One pass whose outermost calls that depend on few enough of the marked things are kept.

    Args:
        model: Any module.
        most: On how many colours, see `Taint`, a kept call may depend.

    Attributes:
        taint: Where to mark what will be changed, before the pass or in it.
        calls: The calls that are kept, each with its output; known after the pass.
        colours: What each of them depends on.
        counts: How many calls of each module, by id, there were.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._most = model, most
        self.taint = Taint()
        self.taint.know([*model.parameters(), *Attributes(model.modules()).tensors.values()])
        self._values: dict[int, list[Kept]] = defaultdict(list)  # by memory
        self.calls: dict[Key, ModuleCall] = {}
        self.colours: dict[Key, int] = {}
        self.counts: Counter[int] = Counter()
        self._kept: list[_Kept] = []
        self._open: dict[int, list[_Open]] = defaultdict(list)  # by thread
        self._made: dict[int, Counter[int]] = defaultdict(Counter)  # how many calls of each module, by thread
        self._source: ModuleCall | None = None

    @contextmanager
    def watch(self, memory: Memory) -> Iterator[None]:
        """Record the pass that runs during the block, in which `memory` is put back."""
        self.taint.touched, self.taint.writing = (
            self._touched,
            self._written,
        )  # until the pass is over, as it is a cycle
        with every_call(self._model, self._begin, self._end), self.taint:
            yield
        self.counts = sum(self._made.values(), Counter[int]())
        elsewhere = sum((made for thread, made in self._made.items() if thread != get_ident()), Counter[int]())
        for call, kept in self._kept:
            # Of the calls of a module in threads, chance decides which is the first.
            if elsewhere[id(call.module)] and self.counts[id(call.module)] > 1:
                continue
            values = {path: memory.apart(each.value) for path, each in kept.items()}
            call.output = rebuild(call.output, partial(_exchanged, values))
            self.calls[call.key] = call
        self._values.clear()

    def start_at(self, x: Tensor, module: nn.Module) -> ModuleCall | None:
        """Mark a part of what `module` is about to return.

        Its call is kept all the same, as it returns what it is told to; None where a call in it or around it returned the tensor.
        """
        innermost = self._open[get_ident()][-1:]
        self._source = innermost[0].call if innermost and innermost[0].call.module is module else None
        self._touched(1)
        self.taint.mark(x)
        return self._source

    def _begin(self, call: ModuleCall, given: Any) -> None:
        colours, attributes = self.taint.colours(given), vars(call.module).copy()
        thread = get_ident()
        self._open[thread].append(_Open(call, self._made[thread].copy(), colours, attributes))
        self._made[thread][id(call.module)] += 1

    def _end(self, call: ModuleCall, output: Any) -> None:
        mine = self._open[get_ident()]
        while (entry := mine.pop()).call is not call:
            pass  # it raised, and the model went on
        call.inside = self._made[get_ident()] - entry.before
        left = not _same(call.module, entry.attributes)
        # Another thread works for any of the calls that are open.
        for around in mine[-1:] or self._all_open():
            around.told |= entry.told or left or has_others(call.module)
        outer = mine[-1].kept if mine else self._kept
        tensors = tensors_of(output)
        colours = entry.colours | self.taint.colours(output)
        if call is not self._source:
            # What a call did that returned no tensor, that left something behind, or whose parts told somebody else is not known.
            plain = bool(tensors) and all(map(has_memory, tensors.values())) and not entry.told and not left
            if not plain or colours.bit_count() > self._most:
                outer += entry.kept
                return
            self.colours[call.key] = colours
        # Their values now: they are copied when something is about to write into them.
        kept = {path: Kept(x) for path, x in tensors.items()}
        for each in kept.values():
            self._values[each.value.untyped_storage()._cdata].append(each)
        call.output = rebuild(output, lambda _, x: x)  # a model may write into a list
        outer.append((call, kept))

    def _written(self, x: Tensor) -> None:
        if has_memory(x):
            for kept in self._values.pop(x.untyped_storage()._cdata, ()):
                kept.copy()

    def _touched(self, colours: int) -> None:
        # Whatever happens inside of a call may find its way out of it unseen.
        for entry in self._all_open():
            entry.colours |= colours

    def _all_open(self) -> list[_Open]:
        return [*chain(*list(self._open.values()))]


def decided_by(model: nn.Module, call: Inputs, names: Collection[str]) -> bool:
    """Whether a number of one of these inputs decides what runs, which for many rows is one for all; takes a pass."""
    recording = Recording(model, most=0)
    with undisturbed(model, graph=False, call=call, part="decided") as memory:
        for name, leaf in memory.call.leaves.items():
            if isinstance(leaf, Tensor):
                recording.taint.mark(leaf) if name in names else recording.taint.know([leaf])
        with recording.watch(memory):
            memory.call.run(model)
    return bool(recording.taint.numbers)


def _exchanged(values: Mapping[str, Tensor], path: str, x: Any) -> Any:
    return values.get(path, x)


def _same(module: nn.Module, before: Mapping[str, Any]) -> bool:
    """Whether a module holds the same objects as before."""
    now = vars(module)
    return len(now) == len(before) and all(now.get(name) is value for name, value in before.items())


class Confirming:
    """A full pass that confirms a record, or parts of it.

    Args:
        model: Any module.
        recorded: The calls of the record.
        compare: Where the rows of the pass lie in a call's record, given what the same call returned now; None where it is not the same.

    Attributes:
        calls: The calls that returned the same again, with what is known of their rows; known after the pass.
        rounding: By how much the numbers of two passes may differ, as a share of the largest.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Mapping[Key, ModuleCall],
        compare: Callable[[ModuleCall, Any], dict[str, list[Rows]] | None],
    ) -> None:
        self._model, self._recorded, self._compare = model, recorded, compare
        self.calls: dict[Key, ModuleCall] = {}
        self.rounding = max(map(rounding, model.parameters()), default=0.0)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Compare the pass that runs during the block."""
        with every_call(self._model, lambda call, _: None, self._end):
            yield

    def _end(self, call: ModuleCall, output: Any) -> None:
        key = call.key
        self.rounding = max([self.rounding, *map(rounding, tensors_of(output).values())])
        record = self._recorded.get(key)
        rows = None if record is None else self._compare(record, output)
        if record is not None and rows is not None:
            record.rows = rows
            self.calls[key] = record
