"""Run again only what depends on one layer or on some inputs: the scores of many what-ifs of one sample."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.errors import MulticamError
from multicam.watch.layers import Layer, Tap, Taps
from multicam.watch.module_calls import Key, ModuleCall, Rows, confirmed, skipping, where, within
from multicam.watch.recorded import Confirming, Read, Recording
from multicam.watch.reshape import as_it_is
from multicam.watch.undisturbed import undisturbed

What = Tensor | Mapping[str, Tensor]


class Replay:
    """The scores of one call of a model when the output of one layer, or some inputs, are changed.

    A first pass records what each module returns, and finds out which modules depend on the change. Later passes run only these; the
    others return their record, also in branches that run after the layer. For each sample that is asked for, a full pass with changed
    values checks the record, module by module, and the first replay must give the scores of that pass; if it does not, everything is
    run for every change from then on, with a warning.

    Args:
        model: Any module.
        inputs: The call, bound to the model.
        source: The layer, or the names of the inputs, that will be changed.
        read: From an output and its samples to scores.
        scores: The scores of the unchanged call `(b,)`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        source: Layer | tuple[str, ...],
        read: Read,
        scores: Float[Tensor, " b"],
    ) -> None:
        self._model, self._inputs, self._read, self._unchanged = model, inputs, read, scores
        self._taps = Taps(model, [source] if isinstance(source, Layer) else [])
        self._names = () if isinstance(source, Layer) else source
        self._batch = inputs.batch
        self._shared = True  # whether the copies of a sample share their memory
        self._proved: set[int] = set()
        self._calls: dict[Key, ModuleCall] = {}
        self._tap: Tap
        self._tapped: ModuleCall | None = None
        self._acts: Tensor  # what the layer returned in the recorded pass
        self._acts_rows: list[Rows] | None = None
        with self._quietly():
            self._record()

    def __call__(self, values: What, sample: int) -> Float[Tensor, " n"]:
        """The scores of `n` what-ifs of one sample.

        Args:
            values: The layer's activations `(n c *grid)`, or the changed inputs by name, each `(n …)`. What an input of
                integers cannot hold is rounded and cut to its range.
            sample: The sample of the call that is changed.

        Raises:
            MulticamError: If the values or the sample do not fit, or the model cannot run several copies of one sample.
        """
        if not isinstance(sample, int) or not 0 <= sample < self._batch:
            raise MulticamError(f"sample {sample!r} does not exist: the call has samples 0 to {self._batch - 1}")
        n = self._count(values)
        with self._quietly():
            if sample not in self._proved:
                self._prove(sample)
                self._proved.add(sample)
            try:
                return self._scores(values, sample, n)
            except RuntimeError:
                if not self._shared:
                    raise
                self._shared = False  # memory was written to, or viewed as shared memory cannot be
                return self._scores(values, sample, n)

    @property
    def skipped(self) -> list[nn.Module]:
        """The outermost modules that need not run again."""
        return [call.module for call in self._calls.values()]

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        with undisturbed(self._model, graph=False):
            yield

    def _count(self, values: What) -> int:
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
        given = self._inputs.leaves
        for name, rows in values.items():
            if rows.shape[1:] != given[name].shape[1:]:
                raise MulticamError(
                    f"what-ifs {tuple(rows.shape)} do not fit input {name!r} {tuple(given[name].shape)}"
                )
        counts = {name: len(rows) for name, rows in values.items()}
        if len(set(counts.values())) != 1:
            raise MulticamError(f"the changed inputs need as many what-ifs each, not {counts}")
        return next(iter(counts.values()))

    def _scores(self, values: What, sample: int, n: int) -> Float[Tensor, " n"]:
        call = self._call(values, sample, n)
        handed = [leaf for leaf in call.leaves.values() if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in handed]

        def hand_out(x: Tensor) -> Tensor:
            handed.append(x)
            versions.append(x._version)
            return x

        with self._skipping(values, sample, n, hand_out), warnings.catch_warnings(), ExitStack() as taps:
            # Seen by the versions below.
            warnings.filterwarnings("ignore", "Use of .* on expanded tensors is deprecated", UserWarning)
            if isinstance(values, Tensor) and self._tapped is None:
                taps.enter_context(self._taps.observe(n, lambda i, tap, x: self._written(x, values)))
            output = call.run(self._model)
        if self._shared and [x._version for x in handed] != versions:
            self._shared = False  # some operations write into all copies at once
            return self._scores(values, sample, n)
        return self._read(output, [sample] * n)

    def _call(self, values: What, sample: int, n: int) -> Inputs:
        """The call for `n` what-ifs of one sample."""
        changed = {} if isinstance(values, Tensor) else values
        batched = self._inputs.batched

        def rows(name: str, leaf: Any) -> Any:
            if name in changed:
                return _fitted(changed[name], leaf)
            return self._copies(Rows(self._batch, 0), leaf, sample, n) if name in batched else leaf

        return self._inputs.map(rows).own()

    def _copies(self, rows: Rows, x: Tensor, sample: int, n: int) -> Tensor:
        copies = rows.copies(x, sample, n)
        return copies if self._shared else copies.contiguous()

    def _gridded(self, x: Tensor) -> Tensor:
        assert self._tap.reshape is not None
        return self._tap.reshape(x)

    def _written(self, x: Tensor, acts: Tensor) -> Tensor:
        """The layer's output `x` with these activations in it.

        A grid is a rearrangement of some entries of the output. Done to the numbers of all entries it tells which these are, and the activations
        go back there; entries that are on no grid (class tokens) stay.
        """
        if self._tap.reshape is as_it_is:
            return acts.to(x)
        index = self._gridded(torch.arange(x.numel(), device=x.device).view(x.shape))
        return x.flatten().index_copy(0, index.flatten(), acts.to(x).flatten()).view(x.shape)

    def _skipping(
        self, values: What, sample: int, n: int, hand_out: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """Let the modules that do not depend on the change return their record."""

        def returned(call: ModuleCall) -> Any:
            output = rebuild(call.output, partial(recorded, call))
            if call is not self._tapped or not isinstance(values, Tensor):
                return output
            picked = self._tap.pick(call.output)
            return rebuild(output, lambda path, x: self._written(x, values) if path == picked else x)

        def recorded(call: ModuleCall, path: str, x: Any) -> Any:
            return hand_out(self._copies(call.rows[path][0], x, sample, n).clone()) if isinstance(x, Tensor) else x

        return skipping(self._calls, returned)

    # The recorded pass, and its check

    def _record(self) -> None:
        recording = Recording(self._model, most=0)

        def source(_: int, tap: Tap, x: Tensor) -> Tensor:
            self._tap, self._acts = tap, x.clone()
            self._tapped = recording.start_at(x, tap.module)
            return x

        call = self._inputs.own()
        recording.taint.mark(*(leaf for name, leaf in call.leaves.items() if name in self._names))
        with self._taps.observe(self._batch, source), recording.watch():
            call.run(self._model)
        self._calls = recording.calls

    def _prove(self, sample: int) -> None:
        """Keep of the record what a full pass of one sample with changed values confirms, and compare scores.

        A what-if is a small change, and a map is made of many of them. So the changes here are large, and an error of the scores must be
        small beside theirs: `|replayed - full| <= 1e-3 max |full - unchanged|`, and what rounding makes of the largest score.
        """
        if self._proved and not self._calls:
            return
        n = 2 if self._batch != 2 else 3  # another size than the record's tells which axis is the batch
        values, expected, precision = self._confirm(sample, n)
        change = (expected - self._unchanged[sample]).abs().max()
        size = torch.cat([expected, self._unchanged]).abs().max()
        tolerance = float(1e-3 * change + precision * size)
        if not within(self._alone(values, sample), expected[:1], tolerance):
            self._give_up(
                f"a what-if has another score in {type(self._model).__name__} alone than among others: scores depend on what else is in the "
                "batch (a normalisation over it, say) or on earlier calls; all is run for every change, and batch_size=1 runs each alone"
            )
        if self._batch > 1:
            # A module that is skipped does not renew what it keeps for others. This leaves another sample's there, to be noticed.
            self._inputs.take([(sample + 1) % self._batch]).own().run(self._model)
        agree = (self._agrees(values, expected, sample, n, tolerance, shared) for shared in (self._shared, False))
        if self._calls and not any(agree):
            self._give_up(
                f"running a part of {type(self._model).__name__} again does not give the scores of running all of it, so all of it is run "
                "for every change: some of its modules do not depend on what they are given alone"
            )

    def _confirm(self, sample: int, n: int) -> tuple[What, Float[Tensor, " n"], float]:
        """A full pass with every entry changed: the values, the scores, and by how much rounding may change numbers."""
        generator = torch.Generator().manual_seed(sample)
        given = self._inputs.leaves
        values: What = {
            name: _changed(Rows(self._batch, 0).copies(given[name], sample, n), generator) for name in self._names
        }

        def source(_: int, tap: Tap, x: Tensor) -> Tensor:
            nonlocal values
            self._acts_rows = where(self._acts, x, self._batch, [sample] * n, self._acts_rows)
            values = _changed(self._gridded(x), generator)
            return self._written(x, values)

        def compare(record: ModuleCall, output: Any) -> dict[str, list[Rows]] | None:
            # What the layer returned is what it was told to; where its samples lie, the tap has seen.
            picked = self._tap.pick(output) if record is self._tapped else None
            rows = confirmed(record, output, self._batch, [sample] * n, picked)
            if picked is None or rows is None:
                return rows
            return rows | {picked: self._acts_rows} if self._acts_rows else None

        found = Confirming(self._model, self._calls, compare)
        expected = self._full_scores(values, sample, n, source, found.watch())
        self._calls = found.calls
        if self._tapped not in self._calls.values():
            self._tapped = None
        return values, expected, found.rounding

    def _alone(self, values: What, sample: int) -> Float[Tensor, " 1"]:
        """The score of the first what-if by itself: it must not matter what else is in the batch."""
        first = values[:1] if isinstance(values, Tensor) else {name: rows[:1] for name, rows in values.items()}

        def alone(_: int, tap: Tap, x: Tensor) -> Tensor:
            assert isinstance(first, Tensor)
            return self._written(x, first)

        return self._full_scores(first, sample, 1, alone, nullcontext())

    def _give_up(self, why: str) -> None:
        self._calls, self._tapped = {}, None
        warnings.warn(why, stacklevel=3)

    def _full_scores(
        self,
        values: What,
        sample: int,
        n: int,
        receive: Callable[[int, Tap, Tensor], Tensor],
        watched: AbstractContextManager[None],
    ) -> Float[Tensor, " n"]:
        """The scores of a pass that skips and shares nothing."""
        call = self._call(values, sample, n).map(lambda _, x: x.contiguous() if isinstance(x, Tensor) else x)
        # In this order: whoever watches sees what the layer was told to return.
        with self._taps.observe(n, receive), watched:
            try:
                output = call.run(self._model)
            except (RuntimeError, ValueError, LookupError) as error:
                raise MulticamError(
                    f"{type(self._model).__name__} ran with {self._batch} samples, but not with {n} copies of one of them, which what-ifs "
                    f"need: {error}. Every input must have one row for each sample, or be the same for all and marked by "
                    "Inputs(…).constant(name)"
                ) from error
        return self._read(output, [sample] * n)

    def _agrees(self, values: What, expected: Tensor, sample: int, n: int, tolerance: float, shared: bool) -> bool:
        self._shared = shared
        try:
            scores = self._scores(values, sample, n)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return False  # writes into shared memory, views of it, or a code path that was not recorded
        return within(scores, expected, tolerance)


def _fitted(rows: Tensor, leaf: Tensor) -> Tensor:
    """Rows with the type of an input."""
    if rows.is_floating_point() and not leaf.is_floating_point() and not leaf.is_complex():
        if leaf.dtype == torch.bool:
            return rows.to(leaf.device) >= 0.5
        limits = torch.iinfo(leaf.dtype)
        rows = rows.round().clamp(limits.min, limits.max)
    return rows.to(leaf)


def _changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` with every entry changed: every row differently, the last one so much that thresholds are crossed."""
    if x.dtype == torch.bool:
        return ~x
    if not (x.is_floating_point() or x.is_complex()):
        cells = x.reshape(len(x), -1)
        order = torch.rand(cells.shape, generator=generator, device="cpu").argsort(1).to(x.device)
        moved = cells.gather(1, order).view(x.shape)
        return torch.where(moved == x, (x == 0).to(x.dtype), moved)
    factors = torch.rand(x.shape, generator=generator, device="cpu").to(x.device) + 0.5
    factors[-1] *= 0.1
    size = x.abs().max()
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x.device) * size.where(size > 0, 1)
    return (x * factors + 0.1 * noise).to(x.dtype)
