"""Which lists, tuples and arrays of a call have one item for each sample: passes of the model tell.

A list of as many items as there are samples may be theirs (lengths, captions), or the same for all (an image size, a kernel), or several
inputs. Each of these is a reading of the call, under which it can be made for its samples in another order and number; the true one gives
back what the model returned for each of them.
"""

import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.items import count
from multicam.call.scorer import OutputLike, Scorer, select_output
from multicam.call.targets.scores import Target
from multicam.call.tree import leaves, rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.module_calls import rounding
from multicam.watch.undisturbed import undisturbed

MOST = 64  # readings that are tried

Reading = tuple[tuple[str, ...], tuple[str, ...]]  # the names of what has rows, and of what is constant


class Fit(IntEnum):
    """What became of the unchanged samples under a reading."""

    RAISED = 0
    OTHER = 1
    SCORES = 2  # the same scores
    OUTPUT = 3  # and the same output


def settled(model: nn.Module, call: Inputs, output: OutputLike = None, target: Target | None = None) -> Inputs:
    """The call with everything marked that has one item for each sample, as far as passes of the model can tell.

    Where nothing is undecided, no pass is made. Where they cannot tell, the call is returned as it is: `Inputs.take` refuses it.

    Args:
        model: Any module.
        call: The call, bound to the model.
        output: Which part of the model's output is compared, see `multicam.call.scorer.select_output`.
        target: What scores are compared by besides; where outputs do not compare row by row, they alone tell.

    Raises:
        MulticamError: If something is undecided, and the model does not run the call as it is.

    Example:
        >>> class Cut(nn.Module):
        ...     def forward(self, series, lengths, stride):
        ...         return torch.stack([x[: n : stride[0]].sum(0) for x, n in zip(series, lengths)])
        >>> call = Inputs(torch.rand(2, 9, 3), [4, 7], (2, 3)).bind(Cut())
        >>> settled(Cut(), call).take([1]).args[1:]
        ([7], (2, 3))
    """
    if not call.undecided:
        return call
    readings = [call.rows(*rows).constant(*constant).only_marked() for rows, constant in islice(_readings(call), MOST)]
    number = _chosen(_Trials(model, call, readings, output, target), len(readings), call.batch)
    return call if number is None else readings[number]


def any_reading(call: Inputs) -> Inputs:
    """The call, and where it has one sample with anything undecided, in the likely reading.

    For what is believed only where passes of the sample alone agree with it: for those, all readings are the same.
    """
    if call.batch > 1 or not call.undecided:
        return call
    rows, constant = next(_readings(call))
    return call.rows(*rows).constant(*constant).only_marked()


def _readings(call: Inputs) -> Iterator[Reading]:
    """All readings of a call, the likely ones first."""
    each = [_of_one(name, value, call.batch) for name, value in call.undecided.items()]
    several = [i for i, some in enumerate(each) if len(some) > 1]
    for unlikely in range(len(several) + 1):
        for which in combinations(several, unlikely):
            parts = [some[1:] if i in which else some[:1] for i, some in enumerate(each)]
            yield from map(_together, product(*parts))


def _of_one(name: str, value: Any, batch: int) -> list[Reading]:
    """The readings of one list, tuple or array."""
    rows, constant = ((name,), ()), ((), (name,))
    if count(value) != batch:  # nobody knows how to take a part of it
        return [constant]
    if [*leaves(value)] == [""]:  # an array
        return [rows, constant]
    several = _as_inputs(name, value, batch)
    tensors = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves(value).values()]
    # With a row for each sample in every tensor, it makes no difference or is a list of inputs.
    found = [*several, rows] if all(tensors) and several else [rows, *several]
    return [*found, constant] if any(tensors) else found


def _as_inputs(name: str, value: Any, batch: int) -> list[Reading]:
    """The readings in which a container is none of samples, but its tensors have a row for each of them."""
    parts: list[list[Reading]] = []
    for path, inner in leaves(value, lambda path, inner: bool(path) and _may_be_listed(inner, batch)).items():
        full = f"{name}.{path}"
        if _may_be_listed(inner, batch):
            parts.append(_of_one(full, inner, batch))
        elif isinstance(inner, Tensor) and inner.ndim:
            if len(inner) != batch:
                return []
            parts.append([((full,), ())])
    return [_together(some) for some in islice(product(*parts), MOST)]


def _may_be_listed(value: Any, batch: int) -> bool:
    return not isinstance(value, Tensor) and count(value) == batch


def _together(readings: Sequence[Reading]) -> Reading:
    return tuple(name for rows, _ in readings for name in rows), tuple(name for _, same in readings for name in same)


def _chosen(trials: "_Trials", readings: int, batch: int) -> int | None:
    """The number of the reading that is true; None if that cannot be told."""
    last = batch - 1
    turned = [*range(batch)][::-1]
    # A list of one item, of the usual number, and of more: a size of two sides is not a list of three.
    orders = [[0, 0], [0, 0, 0]] if batch == 1 else [turned, [last], [*turned, last]]
    # In these, a score that depends on the batch's mean stays as it is, and one that depends on the first row.
    company = [] if batch == 1 else [turned * 2, [0, *turned[:-1], 0]]
    for wanted in (Fit.OUTPUT, Fit.SCORES):
        for number in range(readings):
            if all(trials(number, order) >= wanted for order in orders):
                return number
        left: list[int] = [*range(readings)]
        fitted = told = False
        for order in [*orders, *company]:
            fit = [number for number in left if trials(number, order) >= wanted]
            if fit:
                left, fitted, told = fit, True, told or len(order) != batch
            if fitted and len(left) == 1:
                return left[0]
        if told or (fitted and not trials.moved):
            # Alike in all that compares. That which runs more often is the true one: a size of two sides is no list of a sample's.
            return min(left, key=lambda number: sum(trials(number, order) is Fit.RAISED for order in orders))
    # With one sample, which cannot be run twice, nothing ever moves.
    return 0 if batch == 1 and not trials.moved else None


class _Trials:
    """The model run for the samples of a call, under each reading, in any order and number.

    Args:
        model, output, target: As for `settled`.
        call: The call as it is.
        readings: The call as each reading has it.
    """

    def __init__(
        self, model: nn.Module, call: Inputs, readings: Sequence[Inputs], output: OutputLike, target: Target | None
    ) -> None:
        self._model, self._readings, self._output, self._batch = model, readings, output, call.batch
        try:
            self._before = self._run(call)
        except Exception as error:
            if out_of_memory(error) or isinstance(error, MulticamError):
                raise
            name = next(iter(call.undecided))
            raise MulticamError(
                f"{type(model).__name__} does not run these samples together ({error}), so no pass tells what has one item for each of them: "
                f"say it of {', '.join(map(repr, call.undecided))} with Inputs(…).rows({name!r}) or Inputs(…).constant({name!r})"
            ) from error
        self._scorer = None if target is None else Scorer(target, output).pinned(self._before)
        self._scores = None if self._scorer is None else self._scorer.of_picked(self._before, self._batch)
        self._rounding = max(map(rounding, [*model.parameters(), *_tensors(self._before).values()]), default=0.0)
        self._known: dict[tuple[int, tuple[int, ...]], Fit] = {}

    @property
    def moved(self) -> bool:
        """Whether any other number of samples ran, under any reading."""
        return any(fit > Fit.RAISED for (_, order), fit in self._known.items() if len(order) != self._batch)

    def __call__(self, number: int, samples: Sequence[int]) -> Fit:
        """How well a reading fits."""
        key = number, tuple(samples)
        if key not in self._known:
            self._known[key] = self._fit(self._readings[number], samples)
        return self._known[key]

    def _fit(self, reading: Inputs, samples: Sequence[int]) -> Fit:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of a false reading would mislead
                picked = self._run(reading.take(samples))
                scores = None if self._scorer is None else self._scorer.take(samples).of_picked(picked, len(samples))
        except Exception as error:  # whatever a model raises when it is not called as it should be
            if out_of_memory(error):
                raise
            return Fit.RAISED
        if scores is None or self._scores is None:
            return Fit.OUTPUT if self._same_rows(picked, samples) else Fit.OTHER
        # A score may be a small difference of an output's numbers, which round.
        if not self._close(scores, self._scores[[*samples]], *_tensors(self._before).values()):
            return Fit.OTHER
        return Fit.OUTPUT if self._same_rows(picked, samples) else Fit.SCORES

    def _run(self, call: Inputs) -> Any:
        with undisturbed(self._model, graph=False, call=call) as memory:
            picked = select_output(memory.call.run(self._model), self._output)
            return rebuild(picked, lambda _, leaf: memory.apart(leaf))

    def _same_rows(self, picked: Any, samples: Sequence[int]) -> bool:
        """Whether an output has the rows of these samples, in every part that has a row for each."""
        before = self._before
        lists = isinstance(before, list | tuple) and isinstance(picked, list | tuple)
        counted = lists and (len(before), len(picked)) == (self._batch, len(samples))
        if counted and all(self._same(before[sample], one) for sample, one in zip(samples, picked, strict=True)):
            return True  # detections, sample by sample
        after = _tensors(picked)
        pairs = [
            (x[[*samples]], after[path])
            for path, x in _tensors(before).items()
            if len(x) == self._batch and path in after and after[path].shape == (len(samples), *x.shape[1:])
        ]
        return bool(pairs) and all(self._close(y, x) for x, y in pairs)

    def _same(self, x: Any, y: Any) -> bool:
        first, second = _tensors(x), _tensors(y)
        return first.keys() == second.keys() and all(self._close(second[path], leaf) for path, leaf in first.items())

    def _close(self, x: Tensor, y: Tensor, *others: Tensor) -> bool:
        """Whether two tensors are equal up to the rounding of numbers as large as theirs and those of others."""
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if not (y.is_floating_point() or y.is_complex()):
            return torch.equal(x, y)
        size = max(map(_size, [y, *others]))
        return torch.allclose(x, y, 0, max(self._rounding, rounding(y)) * size, equal_nan=True)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of an output that may have rows, by path."""
    found = {path: leaf for path, leaf in leaves(value).items() if isinstance(leaf, Tensor) and leaf.ndim}
    return {path: leaf for path, leaf in found.items() if leaf.layout is torch.strided and not leaf.is_nested}


def _size(x: Tensor) -> float:
    """The largest value that is no filling."""
    sizes = x.abs()
    return float(sizes.where(sizes < 1e30, 0).max()) if x.numel() else 0.0
