"""Run again only what depends on one layer or on some inputs: the scores of many what-ifs of one sample."""

import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.layers import Layer
from multicam.watch.module_calls import FAILURES, within
from multicam.watch.recorded import Read
from multicam.watch.reruns import Reruns, What, pair, rows_of

FEW = 4  # what-ifs up to which all run alone: it would take as many to see that they may run together


class Replay:
    """The scores of one call of a model when the output of one layer, or some inputs, are changed.

    The truth is what a pass of the changed sample alone gives, or of as few copies of it as the model can run. For each sample that is asked for,
    full passes of it alone, unchanged and changed, prove what need not run again (see `multicam.watch.reruns`), and whether what-ifs may run
    together. What is not proved is not done: it is slower then, and the numbers are the same.

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
        self._model, self._inputs, self._source, self._read, self._unchanged = model, inputs, source, read, scores
        self._samples: dict[int, _Sample] = {}

    def __call__(self, values: What, sample: int) -> Float[Tensor, " n"]:
        """The scores of `n` what-ifs of one sample.

        Args:
            values: The layer's activations `(n c *grid)`, or the changed inputs by name, each `(n …)`. What an input of
                integers cannot hold is rounded and cut to its range.
            sample: The sample of the call that is changed.

        Raises:
            MulticamError: If the values or the sample do not fit, or the model can run neither one sample nor copies of it.
        """
        batch = self._inputs.batch
        if not isinstance(sample, int) or not 0 <= sample < batch:
            raise MulticamError(f"sample {sample!r} does not exist: the call has samples 0 to {batch - 1}")
        if sample not in self._samples:
            self._samples[sample] = self._sample(sample, values)
        return self._samples[sample](values)

    @property
    def skipped(self) -> list[nn.Module]:
        """The outermost modules that need not run again, for any sample so far."""
        return [module for sample in self._samples.values() for module in sample.skipped]

    def _sample(self, sample: int, values: What) -> "_Sample":
        single = self._inputs.batch == 1
        fewest = [1] if single else sorted({1, 2, self._inputs.batch})
        scores = partial(_scores, self._read, sample)  # of no `self`, which would be a cycle
        failed: Exception | None = None
        for copies in fewest:
            call = self._inputs if single else self._inputs.take([sample] * copies)
            reruns = Reruns(self._model, call, self._source, scores)
            try:
                score = reruns.record()[0]
            except FAILURES as error:
                if out_of_memory(error) or single:
                    raise
                failed = failed or error
                continue
            if score.isfinite() or not self._unchanged[sample].isfinite():
                self._doubt(score, sample, reruns)
                return _Sample(reruns, self._unchanged[sample], values)
        raise MulticamError(
            f"{type(self._model).__name__} ran with {self._inputs.batch} samples, but what-ifs need sample {sample} alone, or copies of it: "
            + (str(failed) if failed else "its score is not finite then")
        ) from failed

    def _doubt(self, score: Tensor, sample: int, reruns: Reruns) -> None:
        """Say where the sample has another score alone than in the call, so that nothing that is found explains the latter."""
        before = self._unchanged[sample]
        if within(score, before, reruns.rounding * float(self._unchanged.abs().max())):
            return
        name = type(self._model).__name__
        if self._inputs.batch == 1:
            text = (
                f"two passes of {name} with the same inputs have the scores {before:.6g} and {score:.6g}: it draws random numbers or keeps a state "
                "where nobody puts it back, and what-ifs differ by that as well"
            )
        elif reruns.copies > 1:
            raise MulticamError(
                f"{name} cannot run sample {sample} alone, and with {reruns.copies} copies of it the score is {score:.6g} where it is {before:.6g} "
                "in its batch: scores depend on what else is in the batch, so no what-if of one sample explains its score"
            )
        else:
            text = (
                f"sample {sample} has the score {score:.6g} alone and {before:.6g} in its batch: scores of {name} depend on what else is in the batch, "
                "and what-ifs are those of the sample alone; explain one sample at a time"
            )
        warnings.warn(text, stacklevel=2)


def _scores(read: Read, sample: int, output: Any, n: int) -> Tensor:
    return read(output, [sample] * n)


class _Sample:
    """The what-ifs of one sample, after the proof of its record.

    Args:
        reruns: Its passes, recorded.
        unchanged: Its score.
        values: What is asked for first.
    """

    def __init__(self, reruns: Reruns, unchanged: Tensor, values: What) -> None:
        self._reruns, self._checked = reruns, False
        n = reruns.check(values)
        self._probes = reruns.probes(values)
        try:
            self._alone = self._both(self._probes)
        except MulticamError:
            # The model cannot be run with values of ours: those that are asked for prove what they can.
            self._probes = pair(rows_of(values, 0), rows_of(values, n - 1))
            self._alone = self._both(self._probes)
        size = torch.cat([self._alone, unchanged[None].to(self._alone)]).abs().max()
        self._tolerance = float(reruns.rounding * size)
        reruns.leave_another()
        self._short = self._agrees(lambda: reruns.short(rows_of(self._probes, 0)), self._alone[:1])
        if not self._short:
            self._tell()

    def _both(self, probes: What) -> Tensor:
        return torch.cat([self._reruns.full(rows_of(probes, i)) for i in range(2)])

    def __call__(self, values: What) -> Float[Tensor, " n"]:
        """The scores `(n)` of what-ifs."""
        n = self._reruns.check(values)
        together = self._tried(values, n) if n > FEW and self._together else None
        if together is not None:
            return together
        return torch.cat([self._scores(rows_of(values, i), 1) for i in range(n)])

    def _tried(self, values: What, n: int) -> Float[Tensor, " n"] | None:
        """The scores of what-ifs that run together; None where they differ from those of rows alone, or cannot be run."""
        try:
            scores = self._scores(values, n)
        except FAILURES as error:
            if out_of_memory(error):
                raise
            return None  # some values take a way that cannot be taken together
        # The first time each row that may be special; later the most unlike of them, as other rows are other company.
        unlike = [int(scores.argmax()), int(scores.argmin())]
        rows = unlike[:1] if self._checked else sorted({0, n - 1, *unlike})
        alone = torch.cat([self._scores(rows_of(values, i), 1) for i in rows])
        size = float(self._reruns.rounding * torch.cat([scores, alone]).abs().max())
        self._checked = True
        if within(scores[rows], alone, max(size, self._tolerance)):
            return scores
        self._together = False
        return None

    @property
    def skipped(self) -> list[nn.Module]:
        """The outermost modules that need not run again."""
        return self._reruns.skipped

    def _scores(self, values: What, n: int) -> Float[Tensor, " n"]:
        if not self._short or (n > 1 and not self._short_together):
            return self._reruns.full(values)
        return self._reruns.short(values)

    @cached_property
    def _together(self) -> bool:
        """Whether what-ifs have the same scores together as alone: of the two probes each is the first or the last, and one the most unlike."""
        return not self._reruns.decided and self._agrees(lambda: self._reruns.full(self._probes), self._alone)

    @cached_property
    def _short_together(self) -> bool:
        agrees = self._agrees(lambda: self._reruns.short(self._probes), self._alone)
        if not agrees:
            self._tell()
        return agrees

    def _agrees(self, scores: Callable[[], Tensor], expected: Tensor) -> bool:
        try:
            return within(scores(), expected, self._tolerance)
        except FAILURES as error:
            if out_of_memory(error):
                raise
            return False

    def _tell(self) -> None:
        if self._reruns.skipped:
            warnings.warn(
                f"running a part of {self._reruns.name} again does not give the scores of running all of it, so all of it is run for every "
                "change: some of its modules do not depend on what they are given alone",
                stacklevel=2,
            )
        self._reruns.forget()
