"""Gradients of many variations of the samples of a call."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.errors import out_of_memory
from multicam.watch.finite import How
from multicam.watch.module_calls import FAILURES, alike
from multicam.watch.trace import Trace


class Varied:
    """The gradients of variations: of many in one pass, as long as those that may be special have the same alone.

    Special are the first row and the last, and those with the highest and the lowest score, of the first pass; later the one with the highest, as
    other rows are other company. Where a row has another gradient or score alone, or the model does not run so many rows, each runs
    alone from then on.

    Args:
        trace: The pass without changes.
        names: The inputs that the gradients are of.
        how: What is done to the inputs, to be told where a number is not finite.

    Attributes:
        apart: Whether each row runs alone.
    """

    def __init__(self, trace: Trace, names: Sequence[str], how: How) -> None:
        self._trace, self._names, self._how = trace, names, how
        self.apart, self._checked = False, False

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
        each = [self._some(samples, rows, [i]).input_grads for i in range(len(samples))]
        return {name: torch.cat([grads[name] for grads in each]) for name in each[0]}

    def scores(self, rows: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        """The scores of one variation of each sample, in one pass, or alone where the gradients were found so."""
        samples = range(self._trace.inputs.batch)
        if not self.apart:
            return self._some(samples, rows, samples).scores
        return torch.cat([self._some(samples, rows, [i]).scores for i in samples])

    def _together(self, samples: Sequence[int], rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        try:
            pass_ = self._some(samples, rows, range(len(samples)))
            grads, scores = pass_.input_grads, pass_.scores
        except FAILURES as error:
            if out_of_memory(error):
                raise
            self.apart = True
            return None
        unlike = [int(scores.argmax()), int(scores.argmin())]
        for i in unlike[:1] if self._checked else sorted({0, len(samples) - 1, *unlike}):
            alone = self._some(samples, rows, [i])
            same = [alike(alone.scores, scores[i : i + 1])]
            same += [alike(alone.input_grads[name], g[i : i + 1]) for name, g in grads.items()]
            if not all(same):
                self.apart = True
                return None
        self._checked = True
        return grads

    def _some(self, samples: Sequence[int], rows: Mapping[str, Tensor], chosen: Sequence[int]) -> Trace:
        of, changed = [samples[i] for i in chosen], {name: x[list(chosen)] for name, x in rows.items()}
        return self._trace.again(self._trace.take(of).replace(changed), of, self._names, self._how)
