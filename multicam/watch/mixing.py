"""The scores of calls whose inputs come from different samples, many at once, with each encoder run once for each sample and not for each call."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.errors import out_of_memory
from multicam.watch.module_calls import FAILURES, Key, ModuleCall, Rows, confirmed, rounding, skipping, within
from multicam.watch.plans import Plan, planned_pass, plans_of
from multicam.watch.recorded import Confirming, Read, Recording
from multicam.watch.singly import Parts, Singly, part_of
from multicam.watch.undisturbed import undisturbed


class Mixing:
    """The scores of rows that take each part of a call from another sample of it; see `multicam.watch.singly` for what a part is.

    One pass of the whole call records what each module returns, and which parts it depends on. Rows then run together, and only what depends on
    several parts at once. A full pass of a mixed row of each sample, which runs alone, proves it, module by module and by its score; for later calls
    of the same kind, one of the sample with the highest score does, unless a value decided what ran. Where they do not agree, or the model does not
    run so many rows, each row runs alone.

    Args:
        model: Any module.
        inputs: The call, bound to the model: samples, and behind them what replaces their parts.
        parts: Names of inputs that are taken from one sample together. All other inputs belong to a row's own sample.
        read: From an output, and the sample of the call that each of its rows belongs to, to scores.
        samples: How many of the rows are samples.
        singly: The same, each row alone.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> inputs = Inputs(torch.rand(3, 2), torch.rand(3, 2)).bind(model)
        >>> parts, read = [["input1"], ["input2"]], lambda output, samples: output[:, 0]
        >>> mixing = Mixing(model, inputs, parts, read, 2, Singly(model, inputs, parts, read, 2))
        >>> scores = mixing([[0, 0], [1, 2]], [0, 0])  # the second input of sample 1, then that of sample 2
        >>> x, y = inputs.args
        >>> torch.allclose(scores, model(x[[0, 0]], y[[1, 2]])[:, 0])
        True
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, parts: Parts, read: Read, samples: int, singly: Singly
    ) -> None:
        self._model, self._inputs, self._read, self._samples = model, inputs, read, samples
        self._part = part_of(inputs, parts)
        self._count = len(parts)
        self._batch = inputs.batch
        self._decided = False  # whether a number of the parts decides what runs, which would be one for all rows
        self._calls: dict[Key, ModuleCall] = {}
        self._seen: dict[Key, int] = {}  # which parts each of them depends on, as bits
        self.singly = singly
        self._plans = plans_of(model)
        self._kind = None if singly.kind is None else ("together", samples, singly.kind)
        self._plan = self._plans.get(self._kind)
        self._fresh: Plan | None = None  # what this call proves for later ones

    @cached_property
    def output(self) -> Any:
        """The output of the whole call; None where it cannot be run."""
        try:
            return self._record()
        except FAILURES as error:
            if out_of_memory(error):
                raise
            return None

    @cached_property
    def used(self) -> list[bool]:
        """Whether the score depends on each part."""
        if self.output is None:
            return self.singly.used
        return [bool(self._colours >> i & 1) for i in range(self._count)]

    @cached_property
    def together(self) -> bool:
        """Whether rows have the same scores together as alone; else each runs alone."""
        try:
            return self.output is not None and not self._decided and self._prove()
        except FAILURES as error:
            if out_of_memory(error):
                raise
            return False

    def __call__(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of `n` rows.

        Args:
            parts: For each part the sample that each row takes it from.
            samples: The sample that each row belongs to, whose other inputs it has.
        """
        if self.together:
            try:
                return self._short([*parts, samples])
            except FAILURES as error:
                if out_of_memory(error):
                    raise
                # Some values take a way that cannot be taken together.
        return self.singly(parts, samples)

    def _record(self) -> Any:
        output = self._taken() if self._plan is not None else None
        return self._recorded() if output is None else output

    def _taken(self) -> Any:
        assert self._plan is not None
        with undisturbed(self._model, graph=False, call=self._inputs, part="taken together") as memory:
            found = planned_pass(self._model, memory.call, self._plan)
            if found is None:
                self._plan = None
                return None
            output = rebuild(found[0], lambda _, x: memory.apart(x))
            self._read(output, range(self._batch))
        self._colours, self._calls, self._seen = self._plan.used, found[1], self._plan.colours
        return output

    def _recorded(self) -> Any:
        recording = Recording(self._model, most=1)
        with undisturbed(self._model, graph=False, call=self._inputs, part="mixing") as memory:
            for name, leaf in memory.call.leaves.items():
                if isinstance(leaf, Tensor) and name in self._part:
                    recording.taint.mark(leaf, colours=1 << self._part[name])
                elif isinstance(leaf, Tensor):
                    recording.taint.know([leaf])
            with recording.watch(memory):
                output = memory.call.run(self._model)
            self._read(output, range(self._batch))  # refuses what is no score of so many rows
            output = rebuild(output, lambda _, x: memory.apart(x))
        # Where a value decides what runs, rows that are mixed may take a way that none took here.
        self._colours = recording.taint.colours(output) if not recording.taint.escaped else -1
        self._calls, self._seen = recording.calls, recording.colours
        self._decided = bool(recording.taint.numbers)
        if not recording.taint.decided:
            inside = {key: call.inside for key, call in recording.calls.items()}
            self._fresh = Plan(recording.colours, inside, self._colours, recording.counts)
        return output

    def _rows(self, key: Key, sources: Sequence[Sequence[int]]) -> Sequence[int] | None:
        """The samples whose record a call returns for each row; None for one that depends on no part.

        With `f_i` a call that sees part i only, `f_i(row) = f_i(sample that the row takes part i from)`: a call that depends on the colour of one
        part returns its record in the order in which the rows take that part.
        """
        seen = self._seen[key]
        return sources[seen.bit_length() - 1] if seen else None

    def _call(self, sources: Sequence[Sequence[int]]) -> Inputs:
        leaves = self._inputs.batched
        changed = {
            name: leaves[name][torch.as_tensor(sources[i], device=leaves[name].device)]
            for name, i in self._part.items()
            if i < self._count
        }
        return self._inputs.take(sources[-1]).replace(changed)

    def _short(self, sources: Sequence[Sequence[int]]) -> Float[Tensor, " n"]:
        def returned(call: ModuleCall) -> Any:
            rows = self._rows(call.key, sources)

            def taken(path: str, x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return x.clone() if rows is None else call.rows[path][0].take(x, rows)

            return rebuild(call.output, taken)

        return self._scores(sources, skipping(self._calls, returned), ("mixed", len(self._calls)))

    def _full(self, sources: Sequence[Sequence[int]]) -> Float[Tensor, " n"]:
        """The scores of a pass that skips nothing, which takes out of the record what it does not confirm."""

        def compare(record: ModuleCall, output: Any) -> dict[str, list[Rows]] | None:
            rows = self._rows(record.key, sources)
            found = confirmed(record, output, self._batch, sources[-1] if rows is None else rows)
            # What depends on a part has a row for each sample; else it is that of the sample that came first, or last.
            if found is None or (
                rows is not None and any(place.axis is None for each in found.values() for place in each)
            ):
                return None
            return found

        confirming = Confirming(self._model, self._calls, compare)
        scores = self._scores(sources, confirming.watch(), "full")
        self._calls = confirming.calls
        return scores

    def _scores(
        self, sources: Sequence[Sequence[int]], watched: AbstractContextManager[None], part: object
    ) -> Float[Tensor, " n"]:
        with undisturbed(self._model, graph=False, call=self._call(sources), part=part) as memory:
            with watched:
                output = memory.call.run(self._model)
            return self._read(output, sources[-1])

    def _prove(self) -> bool:
        rows, whole = self._proofs(), self._read(self.output, range(self._batch))
        if self._plan is not None:
            rows = [rows[int(whole[: self._samples].argmax())]]
        expected = torch.cat([self._full([[source] for source in row]) for row in rows])
        share = max(map(rounding, [*self._model.parameters(), expected]))
        tolerance = float(share * torch.cat([expected, whole]).abs().max())
        # In another place and company than in the record, which must not matter; and so for the samples as they are.
        samples = list(range(self._samples))[::-1]
        together = [[*sources, *samples] for sources in zip(*reversed(rows), strict=True)]
        agree = within(self._short(together), torch.cat([expected.flip(0), whole[samples]]), tolerance)
        self._remember(agree)
        return agree

    def _remember(self, agree: bool) -> None:
        if not agree:
            self._plans.pop(self._kind, None)
        elif self._fresh is not None and self._kind is not None:
            kept = {key: self._seen[key] for key in self._calls}
            inside = {key: self._fresh.inside[key] for key in kept}
            self._plans[self._kind] = Plan(kept, inside, self._fresh.used, self._fresh.counts)

    def _proofs(self) -> list[list[int]]:
        """A mixed row for each sample, which takes every other part that matters from what replaces it; and the sample that it belongs to.

        A single sample, and a single part that matters, have two, so that both what is there and what replaces it take part.
        """
        used = [i for i, is_used in enumerate(self.used) if is_used]
        each = (self._batch - self._samples) // self._samples  # how many replacements of its own a sample has, if any

        def row(sample: int, turn: int) -> list[int]:
            replacement = self._samples + sample * each
            sources = [replacement if i in used and (used.index(i) + turn) % 2 else sample for i in range(self._count)]
            return [*sources, sample]

        both = self._samples == 1 or len(used) == 1
        return [row(sample, turn) for sample in range(self._samples) for turn in ((0, 1) if both else (sample,))]
