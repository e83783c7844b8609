"""The scores of calls whose inputs come from different rows, each run alone, with what sees one input only taken from a record.

A module that depends on one of the mixed parts only returns for a mixed row what it returned for the row that this part comes from. So with
encoders that see an input each, all combinations of k inputs cost what the fusion behind them costs.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.items import all_alike, taken
from multicam.call.tree import rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.module_calls import FAILURES, Key, ModuleCall, confirmed, rounding, skipping, within
from multicam.watch.plans import Plan, kind_of, planned_pass, plans_of
from multicam.watch.recorded import Confirming, Read, Recording
from multicam.watch.undisturbed import undisturbed

Parts = Sequence[Sequence[str]]


def part_of(inputs: Inputs, parts: Parts) -> dict[str, int]:
    """The number of the part that each input with a row for each sample belongs to; what is of none comes last, as a part of its own."""
    named = {name: i for i, names in enumerate(parts) for name in names}
    return {name: named.get(name, len(parts)) for name in (*inputs.batched, *inputs.listed)} | named


def _returned(call: ModuleCall) -> Any:
    return rebuild(call.output, lambda _, x: x.clone() if isinstance(x, Tensor) else x)


@dataclass(eq=False)
class Source:
    """What a pass of one row gave.

    Attributes:
        output: What the model returned.
        calls: The calls of modules that depend on one part at most.
        plan: What each of them depends on.
        decided: Whether a value decided what ran.
    """

    output: Any
    calls: dict[Key, ModuleCall]
    plan: Plan
    decided: bool


class Singly:
    """The scores of rows that take each part of a call from another row of it, each in a pass of its own.

    Nothing can depend on what else is in a batch, and where the samples lie in what a module returns need not be known. The record is proved by
    a full pass of a row that takes every other part from another row; what it does not confirm runs again, and if the short way has another
    score, all is run for every row from then on, with a warning. What was proved of calls of one kind holds for later ones, unless a value
    decided what ran.

    Args:
        model: Any module.
        inputs: The call, bound to the model.
        parts: Names of inputs that are taken from one row together. All other inputs belong to a row's own.
        read: From an output, and the row of the call that each of its rows belongs to, to scores.
        samples: How many rows the model is known to run.

    Attributes:
        kind: What calls have in common that what was proved of this one holds for; None: it cannot be told.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> inputs = Inputs(torch.rand(2, 2), torch.rand(2, 2)).bind(model)
        >>> mixing = Singly(model, inputs, [["input1"], ["input2"]], lambda output, rows: output[:, 0], 2)
        >>> x, y = inputs.args
        >>> torch.allclose(mixing([[0], [1]], [0]), model(x[[0]], y[[1]])[:, 0])
        True
    """

    def __init__(self, model: nn.Module, inputs: Inputs, parts: Parts, read: Read, samples: int) -> None:
        self._model, self._inputs, self._read, self._samples = model, inputs, read, samples
        self._part = part_of(inputs, parts)
        self._count = len(parts)
        self._copies = 1
        self._sources: dict[int, Source] = {}
        self._scores: dict[tuple[int, ...], Tensor] = {}
        self._plans = plans_of(model)
        kind = kind_of(model, inputs)
        self.kind = kind if kind is None else (tuple(map(tuple, parts)), kind)
        plan = self._plans.get(self.kind)
        # The recorded calls that a full pass confirmed, with what they depend on; None before it.
        self._believed: dict[Key, int] | None = None if plan is None else plan.colours

    @cached_property
    def used(self) -> list[bool]:
        """Whether the score depends on each part: all of them, where a value of one decides what runs."""
        sources = [self._source(row) for row in range(min(2, self._inputs.batch))]
        decided = any(source.decided for source in sources)
        return [decided or any(source.plan.used >> i & 1 for source in sources) for i in range(self._count)]

    @cached_property
    def _own(self) -> list[Any]:
        """What is not mixed, and has a row or an item for each row of the call."""
        each = {**self._inputs.batched, **self._inputs.listed}
        return [value for name, value in each.items() if self._part[name] == self._count]

    def output_of(self, row: int) -> Any:
        """What the model returned for a row of the call."""
        return self._source(row).output

    def score_of(self, row: int, of: int | None = None) -> Tensor:
        """The score `()` of a row of the call, which stands for another that it belongs to."""
        return self._read(self.output_of(row), [row if of is None else of] * self._copies)[0]

    def __call__(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of `n` rows.

        Args:
            parts: For each part the row that each row takes it from.
            samples: The row of the call that each row belongs to, whose other inputs it has.
        """
        mixed = [tuple(each) for each in zip(*parts, strict=True)] or [()] * len(samples)
        rows = [self._row(row, of) for row, of in zip(mixed, samples, strict=True)]
        left = [row for row in dict.fromkeys(rows) if row not in self._scores and self._unmixed(row) is None]
        if left and self._believed is None:
            self._prove(left[0])
        self._run([row for row in left if row not in self._scores])
        return torch.stack([self._score(row) for row in rows])

    def _row(self, sources: Sequence[int], of: int) -> tuple[int, ...]:
        """Where a row takes each part from, and the row whose other inputs it has; what the score does not depend on is its own."""
        self._source(of)  # before all others: its output decides what the target chooses
        return (*(source if used else of for source, used in zip(sources, self.used, strict=True)), of)

    def _unmixed(self, row: tuple[int, ...]) -> int | None:
        """The row of the call that a row is, in all that the score depends on; None where it is none of them."""
        *sources, of = row
        ends = {source for source, used in zip(sources, self.used, strict=True) if used} or {of}
        end = next(iter(ends))
        return end if len(ends) == 1 and self._same_own(end, of) else None

    def _score(self, row: tuple[int, ...]) -> Tensor:
        end = self._unmixed(row)
        return self._scores[row] if end is None else self.score_of(end, row[-1])

    def _same_own(self, row: int, of: int) -> bool:
        """Whether two rows are the same in all that is not mixed."""
        return row == of or all(all_alike(taken(value, [row, of])) for value in self._own)

    # Passes of one row of the call

    def _source(self, row: int) -> Source:
        if row not in self._sources:
            # What one row showed holds for the next one, as long as no value decides.
            first = next(iter(self._sources.values()), None)
            plan = self._plans.get(self.kind) or (None if first is None or first.decided else first.plan)
            source = None if plan is None or self.kind is None else self._taken(row, plan)
            self._sources[row] = source or self._recorded(row)
        return self._sources[row]

    def _recorded(self, row: int) -> Source:
        """The pass of a row, with what each call of a module depends on; copies of it, where the model does not run so few rows."""
        failed: Exception | None = None
        for copies in sorted({self._copies, 2, self._samples}):
            recording = Recording(self._model, most=1)
            try:
                with undisturbed(self._model, graph=False, call=self._rows(row, copies), part="record") as memory:
                    for name, leaf in memory.call.leaves.items():
                        if isinstance(leaf, Tensor) and name in self._part:
                            recording.taint.mark(leaf, colours=1 << self._part[name])
                        elif isinstance(leaf, Tensor):
                            recording.taint.know([leaf])
                    with recording.watch(memory):
                        output = memory.call.run(self._model)
                    self._read(output, [row] * copies)  # refuses what is no score of so many rows
                    used = recording.taint.colours(output)
                    output = rebuild(output, lambda _, x: memory.apart(x))
            except FAILURES as error:
                if out_of_memory(error):
                    raise
                failed = failed or error
                continue
            self._copies = copies
            inside = {key: call.inside for key, call in recording.calls.items()}
            colours = {key: recording.colours[key] for key in recording.calls}
            plan = Plan(colours, inside, used, recording.counts)
            return Source(output, recording.calls, plan, recording.taint.decided)
        # Where it does not run the call as it is, either, that is what is to be told.
        with undisturbed(
            self._model, graph=False, call=self._inputs.take(range(self._samples)), part="whole"
        ) as memory:
            memory.call.run(self._model)
        raise MulticamError(
            f"{type(self._model).__name__} runs {self._samples} samples, but not one of them alone or copies of it, which shares of its own need: "
            f"{failed}"
        ) from failed

    def _taken(self, row: int, plan: Plan) -> Source | None:
        """The same by a plan; None where the pass is of another kind after all."""
        with undisturbed(self._model, graph=False, call=self._rows(row, self._copies), part="taken") as memory:
            found = planned_pass(self._model, memory.call, plan)
            if found is None:
                return None
            output = rebuild(found[0], lambda _, x: memory.apart(x))
        self._read(output, [row] * self._copies)
        return Source(output, found[1], plan, False)

    def _rows(self, row: int, copies: int) -> Inputs:
        return self._inputs.own() if self._inputs.batch == copies == 1 else self._inputs.take([row] * copies)

    # Passes of mixed rows

    def _mixed(self, row: tuple[int, ...], call: Inputs) -> Inputs:
        """A mixed row of the call, whose parts lie in its memory; that is put back where the model writes into it."""
        leaves = call.leaves
        changed = {name: self._taken_from(leaves[name], row[i]) for name, i in self._part.items() if i < self._count}
        return (self._rows(row[-1], self._copies) if self._own else call).replace(changed)

    def _taken_from(self, x: Tensor, row: int) -> Tensor:
        return x[row : row + 1] if self._copies == 1 else x[[row] * self._copies]

    def _full(self, row: tuple[int, ...], confirming: Confirming) -> Tensor:
        with undisturbed(self._model, graph=False, call=self._inputs, part="full") as memory, confirming.watch():
            return self._read(self._mixed(row, memory.call).run(self._model), [row[-1]] * self._copies)[0]

    def _run(self, rows: Sequence[tuple[int, ...]]) -> None:
        """Score rows, by the record as far as it holds."""
        if not rows:
            return
        part = "short", len(self._calls(rows[0]))
        with undisturbed(self._model, graph=False, call=self._inputs, part=part) as memory:
            for row in rows:
                with skipping(self._calls(row), _returned):
                    output = self._mixed(row, memory.call).run(self._model)
                self._scores[row] = self._read(output, [row[-1]] * self._copies)[0]
                memory.rewind()

    def _calls(self, row: tuple[int, ...]) -> dict[Key, ModuleCall]:
        """The calls that a mixed row takes from the record: of each source those that depend on a part which the row takes from it.

        With `f_i` a call that sees part i only, `f_i(row) = f_i(row that the row takes part i from)`. Two sources may both have the call where values
        decide what runs; then it runs.
        """
        found: dict[Key, ModuleCall] = {}
        twice: set[Key] = set()
        for number in {*row}:
            source = self._source(number)
            for key, call in source.calls.items():
                colours = source.plan.colours[key]
                if self._believed is not None and self._believed.get(key) != colours:
                    continue
                if not colours or row[colours.bit_length() - 1] == number:
                    if key in found and colours:
                        twice.add(key)
                    found[key] = call
        return {key: call for key, call in found.items() if key not in twice}

    def _prove(self, asked: tuple[int, ...]) -> None:
        """Keep of the record what full passes of two mixed rows confirm, and compare scores.

        Every other part of the first comes from another row, and every part of the second from the row that the first did not take it from. So each
        is confirmed both ways, and what is skipped afterwards finds what it left behind in places that nobody knows to be another row's.
        """
        ends = sorted({*asked})[:2]
        mixed = [i for i, used in enumerate(self.used) if used]
        row, other = (
            tuple(ends[(mixed.index(i) + turn) % 2] if i in mixed else of for i, of in enumerate(asked))
            for turn in (0, 1)
        )
        first, *others = (self._source(number) for number in {*row})
        self._believed = {
            key: colours
            for key, colours in first.plan.colours.items()
            if key in first.calls
            and all(each.plan.colours.get(key) == colours and key in each.calls for each in others)
        }
        expected = self._confirmed_full(row)
        self._scores[other] = self._confirmed_full(other)
        share = max(map(rounding, [*self._model.parameters(), expected]))
        size = torch.stack([expected, *map(self.score_of, self._sources)]).abs().max()
        try:
            self._run([row])
            agrees = within(self._scores[row], expected, float(share * size))
        except FAILURES as error:
            if out_of_memory(error):
                raise
            agrees = False
        self._scores[row] = expected
        if agrees:
            self._remember()
            return
        self._believed = {}
        warnings.warn(
            f"running the fusion of {type(self._model).__name__} on recorded encodings does not give the scores of running all of it, "
            "so all of it is run for every combination: some of its modules do not depend on what they are given alone",
            stacklevel=2,
        )

    def _confirmed_full(self, row: tuple[int, ...]) -> Tensor:
        """The score of a full pass, after which only those calls are believed that it confirmed."""
        recorded = self._calls(row)
        confirming = Confirming(self._model, recorded, lambda record, again: confirmed(record, again, 1, [0]))
        score = self._full(row, confirming)
        believed = self._believed or {}
        self._believed = {
            key: colours for key, colours in believed.items() if key in confirming.calls or key not in recorded
        }
        return score

    def _remember(self) -> None:
        first = self._sources[0]
        alike = all(s.plan == first.plan and not s.decided for s in self._sources.values())
        if self.kind is not None and self._copies == 1 and alike and self._believed is not None:
            inside = {key: first.plan.inside[key] for key in self._believed}
            self._plans[self.kind] = Plan(self._believed, inside, first.plan.used, first.plan.counts)
