"""Passes of one sample with something changed: of all of the model, or of what depends on the change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.layers import Layer, Tap, Taps
from multicam.watch.module_calls import FAILURES, Key, ModuleCall, Rows, confirmed, rounding, skipping, where
from multicam.watch.probes import probe, shaken
from multicam.watch.recorded import Confirming, Recording
from multicam.watch.reshape import put_back
from multicam.watch.survey import located_for_any_number
from multicam.watch.undisturbed import undisturbed

What = Tensor | Mapping[str, Tensor]


class Reruns:
    """The passes of one sample, whose layer or inputs are changed.

    A first pass records what each module returns, and which modules depend on the change. Short passes run only these; the others return their
    record, also in branches that run after the layer. Full passes run everything, and each takes out of the record what it does not confirm.

    Args:
        model: Any module.
        call: The sample alone, or as many copies of it as the model needs.
        source: The layer, or the names of the inputs, that will be changed.
        read: From an output, and how many rows it has, to their scores.

    Attributes:
        decided: Whether a number of what is changed decides what runs; known after `record`. Of many rows it would be one for all.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Inputs,
        source: Layer | tuple[str, ...],
        read: Callable[[Any, int], Tensor],
    ) -> None:
        self._model, self._call, self._read = model, call, read
        self.name = type(model).__name__
        layers = {"": source} if isinstance(source, Layer) else {}
        self._taps = Taps(model, list(located_for_any_number(model, call, layers).values()))
        self._names = () if isinstance(source, Layer) else source
        self.copies = call.batch
        self.rounding = 0.0
        self.decided = False
        self._calls: dict[Key, ModuleCall] = {}
        self._tap: Tap
        self._tapped: ModuleCall | None = None
        self._acts: Tensor  # what the layer returned in the recorded pass
        self._acts_rows: list[Rows] = []

    @property
    def skipped(self) -> list[nn.Module]:
        """The outermost modules that need not run again."""
        return [call.module for call in self._calls.values()]

    def check(self, values: What) -> int:
        """How many what-ifs there are.

        Raises:
            MulticamError: If they do not fit the layer or the inputs.
        """
        each = values if self._names and isinstance(values, Mapping) else {"activations": values}
        wrong = [name for name, rows in each.items() if not isinstance(rows, Tensor) or not rows.ndim or not len(rows)]
        if wrong:
            raise MulticamError(
                f"what-ifs are a tensor (n …) with at least one row, which those of {wrong[0]!r} are not"
            )
        if isinstance(values, Tensor):
            grid = tuple(self._gridded(self._acts).shape[1:])
            if tuple(values.shape[1:]) != grid:
                raise MulticamError(
                    f"activations {tuple(values.shape)} do not fit layer {self._tap.label!r}, which has (n, {str(grid)[1:]}"
                )
            return len(values)
        given = self._call.leaves
        for name, rows in values.items():
            if rows.shape[1:] != given[name].shape[1:]:
                raise MulticamError(
                    f"what-ifs {tuple(rows.shape)} do not fit input {name!r} {tuple(given[name].shape)}"
                )
        counts = {name: len(rows) for name, rows in values.items()}
        if len(set(counts.values())) != 1:
            raise MulticamError(f"the changed inputs need as many what-ifs each, not {counts}")
        return next(iter(counts.values()))

    def record(self) -> Float[Tensor, " n"]:
        """Record the unchanged pass; its scores, one for each copy."""
        recording = Recording(self._model, most=0)

        def source(_: int, tap: Tap, x: Tensor) -> Tensor:
            self._tap, self._acts = tap, x.clone()
            self._tapped = recording.start_at(x, tap.module)
            return x

        with undisturbed(self._model, graph=False, call=self._call, part="record") as memory:
            for name, leaf in memory.call.leaves.items():
                if isinstance(leaf, Tensor):
                    recording.taint.mark(leaf) if name in self._names else recording.taint.know([leaf])
            # In this order: who comes last is told first, and the record is of what the layer is told to return.
            with recording.watch(memory), self._taps.observe(source):
                output = memory.call.run(self._model)
            scores = self._read(output, self.copies)
        self._calls, self.decided = recording.calls, bool(recording.taint.numbers)
        self.rounding = max(map(rounding, [*self._model.parameters(), scores]))
        return scores

    def forget(self) -> None:
        """Let everything run from now on."""
        self._calls, self._tapped = {}, None

    def probes(self, values: What) -> What:
        """Two what-ifs to prove a record by: every entry changed; and, of inputs, that of the given ones which is most unlike the sample."""
        if isinstance(values, Tensor):
            return shaken(self._gridded(self._acts)[:1], 2, torch.Generator().manual_seed(0))
        given = {name: leaf[:1] for name, leaf in self._call.leaves.items() if name in values}
        differ = [
            (_fitted(rows, given[name]) != given[name]).reshape(len(rows), -1).double().mean(1).cpu()
            for name, rows in values.items()
        ]
        furthest = int(torch.stack(differ).sum(0).argmax())
        return {
            name: torch.cat([probe(given[name]), _fitted(rows[furthest : furthest + 1], given[name])])
            for name, rows in values.items()
        }

    def leave_another(self) -> None:
        """A pass with all inputs changed: what a module leaves where nobody puts it back is then not what a short pass needs, and is noticed."""
        changed = self._call.map(lambda _, x: probe(x) if isinstance(x, Tensor) and x.ndim and x.numel() else x)
        try:
            with undisturbed(self._model, graph=False, call=changed, part="another") as memory:
                memory.call.run(self._model)
        except FAILURES as error:
            if out_of_memory(error):
                raise
            # The model cannot be run with values of ours.

    def full(self, values: What) -> Float[Tensor, " n"]:
        """The scores of what-ifs `(n)` by a pass that skips nothing."""
        n = self._rows(values)

        def source(_: int, tap: Tap, x: Tensor) -> Tensor:
            self._acts_rows = where(self._acts, x, self.copies, [0] * n, None)
            return self._written(x, values)

        def compare(record: ModuleCall, output: Any) -> dict[str, list[Rows]] | None:
            # What the layer returned is what it was told to; where its samples lie, the tap has seen.
            picked = self._tap.pick(output) if record is self._tapped else None
            rows = confirmed(record, output, self.copies, [0] * n, picked)
            if rows is not None and picked is not None:
                rows = rows | {picked: self._acts_rows} if self._acts_rows else None
            # As many rows as the record has do not tell where they lie.
            return rows if rows is None or n != self.copies else {}

        found = Confirming(self._model, self._calls, compare)
        with self._ready(values, "full") as call:
            with found.watch(), self._taps.observe(source):
                output = self._run(call)
            scores = self._read(output, n)
        self._calls, self.rounding = found.calls, max(self.rounding, found.rounding)
        if self._tapped not in self._calls.values():
            self._tapped = None
        return scores[: count(values)]

    def short(self, values: What) -> Float[Tensor, " n"]:
        """The same by a pass in which the modules that do not depend on the change return their record."""
        n = self._rows(values)

        def returned(call: ModuleCall) -> Any:
            output = rebuild(call.output, partial(recorded, call))
            if call is not self._tapped or not isinstance(values, Tensor):
                return output
            picked = self._tap.pick(call.output)
            return rebuild(output, lambda path, x: self._written(x, values) if path == picked else x)

        def recorded(call: ModuleCall, path: str, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            taken = x if n == self.copies else call.rows[path][0].take(x, [0] * n)
            return taken.clone() if taken is x else taken

        def written(_: int, tap: Tap, x: Tensor) -> Tensor:
            return self._written(x, values)

        with self._ready(values, "short") as call:
            tapping = isinstance(values, Tensor) and self._tapped is None
            with skipping(self._calls, returned), self._taps.observe(written) if tapping else nullcontext():
                output = self._run(call)
            scores = self._read(output, n)
        return scores[: count(values)]

    @contextmanager
    def _ready(self, values: What, part: str) -> Iterator[Inputs]:
        """What to call the model with, in a quiet pass."""
        n = self._rows(values)
        call = self._call if n == self.copies else self._call.take([0] * n)
        if not isinstance(values, Tensor):
            leaves = call.leaves
            call = call.replace({name: _fitted(self._copied(rows), leaves[name]) for name, rows in values.items()})
        skipped = len(self._calls) if part == "short" else 0
        with undisturbed(self._model, graph=False, call=call, part=(part, skipped)) as memory:
            yield memory.call

    def _run(self, call: Inputs) -> Any:
        try:
            return call.run(self._model)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            if out_of_memory(error):
                raise
            raise MulticamError(
                f"{self.name} ran with the sample as it is, but not with a what-if of it: {error}"
            ) from error

    def _rows(self, values: What) -> int:
        """How many rows a pass of what-ifs has: one of them is as many copies as the model needs."""
        return max(count(values), self.copies)

    def _copied(self, rows: Tensor) -> Tensor:
        # Each in memory of its own, as a model may write into them.
        return rows if len(rows) >= self.copies else rows[:1].repeat_interleave(self.copies, 0)

    def _gridded(self, x: Tensor) -> Tensor:
        assert self._tap.layer.reshape is not None
        return self._tap.layer.reshape(x)

    def _written(self, x: Tensor, values: What) -> Tensor:
        """The layer's output `x` with these activations in it."""
        assert isinstance(values, Tensor) and self._tap.layer.reshape is not None
        return put_back(self._tap.layer.reshape, x, self._copied(values).to(x).clone())


def count(values: What) -> int:
    """How many what-ifs there are."""
    return len(values if isinstance(values, Tensor) else next(iter(values.values())))


def rows_of(values: What, i: int) -> What:
    """One of several what-ifs."""
    if isinstance(values, Tensor):
        return values[i : i + 1]
    return {name: rows[i : i + 1] for name, rows in values.items()}


def pair(first: What, second: What) -> What:
    """Two what-ifs as one."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    assert isinstance(first, Mapping) and isinstance(second, Mapping)
    return {name: torch.cat([rows, second[name]]) for name, rows in first.items()}


def _fitted(rows: Tensor, leaf: Tensor) -> Tensor:
    """Rows with the type of an input."""
    if rows.is_floating_point() and not leaf.is_floating_point() and not leaf.is_complex():
        if leaf.dtype == torch.bool:
            return rows.to(leaf.device) >= 0.5
        limits = torch.iinfo(leaf.dtype)
        rows = rows.round().clamp(limits.min, limits.max)
    return rows.to(leaf)
