"""Gradients of many variations of the samples of a call."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError, out_of_memory
from multicam.watch.finite import How
from multicam.watch.module_calls import FAILURES, alike
from multicam.watch.recorded import decided_by
from multicam.watch.rows import any_reading
from multicam.watch.trace import Trace


class Varied:
    """The gradients of variations: of many in one pass, as long as those that may be special have the same alone.

    Special are, in each pass, the row with the highest score, as other rows are other company, and the first of each sample that was not tried
    before; where other samples come together than before, also the first row and the last, and that with the lowest score. Where a row has
    another gradient or score alone, or the model does not run so many rows, each runs alone from then on; as copies of it, where the model does not run
    one row.

    Args:
        trace: The pass without changes.
        names: The inputs that the gradients are of.
        how: What is done to the inputs, to be told where a number is not finite.

    Attributes:
        apart: Whether each row runs alone: from the start where a number of what varies decides what runs, which would be one for all rows.
    """

    def __init__(self, trace: Trace, names: Sequence[str], how: How) -> None:
        self._trace, self._names, self._how = trace, names, how
        self._call = any_reading(trace.settled)
        self.apart = trace.decides and decided_by(trace.model, trace.inputs, names)
        self._together_before: set[frozenset[int]] = set()
        self._copies = 0  # of a row that runs alone; 0: not known yet

    def gradients(self, samples: Sequence[int], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of each row's score `(n …)`, by input.

        Args:
            samples: The sample that each row is a variation of.
            rows: The inputs that vary `(n …)`.
        """
        if len(samples) > 1 and not self.apart:
            found = self._together(samples, rows)
            if found is not None:
                return found
        each = [self._alone(samples, rows, i)[1] for i in range(len(samples))]
        return {name: torch.cat([grads[name] for grads in each]) for name in each[0]}

    def scores(self, rows: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        """The scores of one variation of each sample, in one pass, or alone where the gradients were found so."""
        samples = range(self._call.batch)
        if not self.apart:
            return self._some(samples, rows, samples).scores
        return torch.cat([self._alone(samples, rows, i)[0] for i in samples])

    def doubt(self) -> None:
        """Say where a sample has another score alone than in the call, once rows run alone: nothing that was found explains the latter."""
        batch, before = self._call.batch, self._trace.scores
        if not self.apart or batch == 1:
            return
        leaves = {name: self._call.leaves[name] for name in self._names}
        alone = torch.cat([self._alone(range(batch), leaves, i)[0] for i in range(batch)])
        different = [i for i in range(batch) if not alike(alone[i : i + 1], before[i : i + 1])]
        if different:
            i = different[0]
            warnings.warn(
                f"sample {i} has the score {alone[i]:.6g} alone and {before[i]:.6g} in its batch: scores of {type(self._trace.model).__name__} depend "
                "on what else is in the batch, and its gradients are those of the sample alone; explain one sample at a time",
                stacklevel=2,
            )

    def _together(self, samples: Sequence[int], rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        try:
            pass_ = self._some(samples, rows, range(len(samples)))
            grads, scores = pass_.input_grads, pass_.scores
        except FAILURES as error:
            if out_of_memory(error):
                raise
            self.apart = True
            return None
        for i in self._special(samples, scores):
            alone, alone_grads = self._alone(samples, rows, i)
            same = [alike(alone, scores[i : i + 1])]
            same += [alike(alone_grads[name], g[i : i + 1]) for name, g in grads.items()]
            if not all(same):
                self.apart = True
                return None
        self._together_before.add(frozenset(samples))
        return grads

    def _special(self, samples: Sequence[int], scores: Tensor) -> list[int]:
        """The rows that are tried alone."""
        tried = frozenset[int]().union(*self._together_before)
        found = {int(scores.argmax()), *(samples.index(sample) for sample in {*samples} - tried)}
        if frozenset(samples) not in self._together_before:
            found |= {0, len(samples) - 1, int(scores.argmin())}
        return sorted(found)

    def _alone(self, samples: Sequence[int], rows: Mapping[str, Tensor], i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The score `(1)` and the gradients `(1 …)` of a row in a pass of its own."""
        failed: list[Exception] = []
        for copies in [self._copies] if self._copies else sorted({1, 2, self._call.batch}):
            try:
                found = self._some(samples, rows, [i] * copies)
                scores, grads = found.scores, found.input_grads
            except FAILURES as error:
                if out_of_memory(error) or self._copies:
                    raise
                failed.append(error)
                continue
            if copies > 1 and not self._copies:
                self._refuse_company(samples[i], copies)
            self._copies = copies
            return scores[:1], {name: g[:1] for name, g in grads.items()}
        for each in failed:
            if isinstance(each, MulticamError):
                raise each  # what is said of the copies that the model runs
        raise MulticamError(
            f"{type(self._trace.model).__name__} runs {self._call.batch} samples, but neither a variation of sample {samples[i]} alone nor copies of it: "
            f"{failed[0]}"
        ) from failed[0]

    def _refuse_company(self, sample: int, copies: int) -> None:
        """Refuse a model that runs no sample alone and has other scores in other company."""
        before = self._trace.scores[sample]
        score = self._trace.again(self._call.take([sample] * copies), [sample] * copies).scores[0]
        if not alike(score[None], before[None]):
            raise MulticamError(
                f"{type(self._trace.model).__name__} cannot run sample {sample} alone, and with {copies} copies of it the score is {score:.6g} where "
                f"it is {before:.6g} in its batch: scores depend on what else is in the batch, so no gradient explains that of one sample"
            )

    def _some(self, samples: Sequence[int], rows: Mapping[str, Tensor], chosen: Sequence[int]) -> Trace:
        of, changed = [samples[i] for i in chosen], {name: x[list(chosen)] for name, x in rows.items()}
        return self._trace.again(self._call.take(of).replace(changed), of, self._names, self._how)
