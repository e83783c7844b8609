"""Numbers that are NaN or infinite, refused with the input, the baseline or the layer at fault named.

`Trace`, `Game` and whatever else runs a model ask here before they hand out a score or a gradient, so a method that stands on them need
not look itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines
from multicam.call.inputs import Inputs
from multicam.call.scorer import Scorer
from multicam.chance import value_range
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.undisturbed import undisturbed

OVERFLOW = "float16 weights overflow often; use bfloat16 or float32"
UNDEFINED = (
    "divides by zero, as by the spread of an input that is the same everywhere, takes a logarithm or root of what has none, or a softmax "
    "over nothing"
)
BASELINES: tuple[Baseline, ...] = (
    "mean",
    "blur",
    0.0,
    1.0,
)  # what is tried in the place of a baseline that does not do


@dataclass(frozen=True)
class How:
    """What was done to inputs, in words.

    Attributes:
        words: What they are now, such as "noisy".
        advice: What to do where a score is not finite then.
        baseline: What the caller put in their place, one for all or by name; another one that does is then looked for, and advised.
        part: Of what part of an input that is, such as "a patch of ".
        references: Whether the caller may give references in the place of a baseline.
    """

    words: str = "changed"
    advice: str = "the model cannot be asked about such an input"
    baseline: Any = None
    part: str = ""
    references: bool = False

    def of(self, name: str) -> str:
        """What an input is now.

        Example:
            >>> How().of("rgb"), How(baseline={"depth": "mean"}).of("depth")
            ('changed', "at its baseline 'mean'")
        """
        if self.baseline is None:
            return self.words
        given = self.given(name)
        return "at its baseline" + ("" if isinstance(given, Tensor) and given.ndim else f" {_plain(given)!r}")

    def given(self, name: str) -> Any:
        """The baseline of an input."""
        if not isinstance(self.baseline, Mapping):
            return self.baseline
        return next((value for key, value in self.baseline.items() if f".{name}".endswith(f".{key}")), 0.0)


CHANGED = How()
AUGMENTED = How("mirrored, darker or brighter", "the model is not defined there; take the map without augmentation")
NOISY = How("noisy", "the model is not defined there; take less noise (std=…)")


@dataclass(frozen=True, eq=False)
class Asked:
    """A model, a call, and the score that is asked for.

    Attributes:
        model: The model.
        call: The unchanged call.
        scorer: The score, with everything decided that its target chooses.
    """

    model: nn.Module
    call: Inputs
    scorer: Scorer

    def check(self, scores: Tensor) -> Tensor:
        """The scores of the call itself `(b)`.

        Raises:
            MulticamError: If one is not finite; the message names the inputs that hold such values.
        """
        if torch.isfinite(scores).all():
            return scores
        sample = first(scores)
        value = shown(scores[sample])
        broken = [name for name, p in self.model.named_parameters() if not torch.isfinite(p.detach()).all()]
        if held := holding(self.call, sample):
            why = f"{held}; fill in what is missing"
        elif broken:
            why = f"parameter {broken[0]!r} of {type(self.model).__name__} holds NaN or infinite values"
        elif value == "NaN":
            why = f"no input holds NaN or infinite values, so the model {UNDEFINED}, or overflows ({OVERFLOW})"
        else:
            why = f"what a model masks out has no score to explain: take another target; or the model overflows ({OVERFLOW})"
        raise MulticamError(f"the score of sample {sample} is {value}: {why}")

    def check_changed(self, scores: Tensor, values: Mapping[str, Any], samples: Sequence[int], how: How) -> Tensor:
        """The scores of what-ifs `(n)`.

        Args:
            scores: The scores.
            values: The changed inputs by their full names, each `(n …)`, or None.
            samples: Which sample each row stems from.
            how: What was done to the inputs.

        Raises:
            MulticamError: If one is not finite; the message names the input at fault, and a baseline that does better, if one was found.
        """
        if torch.isfinite(scores).all():
            return scores
        row = first(scores)
        rows = {name: x if x is None else x[row : row + 1] for name, x in values.items()}
        raise self.refusal(shown(scores[row]), rows, samples[row], how)

    def refusal(self, value: str, values: Mapping[str, Any], sample: int, how: How) -> MulticamError:
        """What to say of a score that is NaN or infinite while the inputs of one sample have these values `(1 …)`, or are None."""
        one = self._one(sample)
        rows = {name: x for name, x in values.items() if one is None or not _same(x, one.call.leaves.get(name))}
        alone = {name: self.fails({name: x}, sample) if len(rows) > 1 else None for name, x in rows.items()}
        names = [name for name in rows if alone[name]] or list(rows) or list(values)
        apart = all(alone.get(name) for name in names)
        how_many = " together" * all(fails is False for fails in alone.values()) or ", each alone," * apart
        who = " and ".join(_told(name, values[name], how) for name in names) + how_many * (len(names) > 1)
        known = {name: values[name] for name in names}
        advice = one._advice(known, apart or len(names) == 1, how) if one and how.baseline is not None else how.advice
        return MulticamError(f"with {who} the score of sample {sample} is {value}: {advice}")

    def fails(self, values: Mapping[str, Any], sample: int) -> bool | None:
        """Whether the score of a sample with these inputs `(1 …)` is not finite; None where the model does not run it alone."""
        one = self._one(sample)
        score = one._score(values) if one else None
        return None if score is None else not isfinite(score)

    def _one(self, sample: int) -> "Asked | None":
        """The same of one sample, if its call can be made."""
        try:
            call = self.call if self.call.batch == 1 else self.call.take([sample])
        except MulticamError:
            return None
        return Asked(self.model, call, self.scorer.take([sample]))

    def _score(self, values: Mapping[str, Any]) -> float | None:
        """The score of this one sample with changed inputs; None where the model does not run it alone."""
        call = self.call.replace(values)
        try:
            with undisturbed(self.model, graph=False, call=call) as memory:
                return float(self.scorer.of(memory.call.run(self.model), 1))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if out_of_memory(error):
                raise
            return None

    def _advice(self, values: Mapping[str, Any], apart: bool, how: How) -> str:
        """The way out of baselines: of others the one for each input with which this sample's score changes least.

        At a constant, a spread is often not zero but what rounding leaves of it, and the score is finite and means nothing.

        Args:
            values: The inputs at fault, as they are at their baselines.
            apart: Whether each is at fault alone.
            how: What was done to them.
        """
        changes = {name: self._changes(name, row, how.given(name)) if apart else {} for name, row in values.items()}
        best = {name: min(found, key=found.__getitem__) for name, tried in changes.items() if (found := _finite(tried))}
        if len(best) == len(values):
            shown = ", ".join(f"{name!r}: {other}" for name, other in best.items())
            return f"the model is not defined there; give another baseline, such as baseline={{{shown}}}"
        others = "a tensor that the model takes" + ", or references=… of real inputs" * how.references
        tried = [other for name, each in changes.items() if name not in best for other in each]
        nor = f", nor at {', '.join(dict.fromkeys(tried))}" if tried else ""
        return f"the model is not defined there{nor}; give another baseline, {others}"

    def _changes(self, name: str, row: Any, baseline: Any) -> dict[str, float | None]:
        """By how much the score of this one sample changes with each other baseline of an input; None where there is none."""
        unchanged, given = self._score({}), _plain(baseline)
        if unchanged is None or not isinstance(row, Tensor):
            return {}
        leaf = self.call.leaves[name]
        kept = row.to(leaf) == leaf
        found: dict[str, float | None] = {}
        for other in (other for other in BASELINES if isinstance(given, Tensor) or other != given):
            try:
                instead = torch.where(kept, leaf, baselines(self.call, [name], other)[name])
            except MulticamError:  # this input can have no such baseline
                continue
            score = self._score({name: instead})
            found[repr(other)] = None if score is None else abs(score - unchanged)
        return found


@dataclass(frozen=True, eq=False)
class Change:
    """How the inputs of a pass stem from another call.

    Attributes:
        asked: The other call.
        samples: Which sample of it each sample stems from; None: the same in the same order.
        how: What was done to them.
    """

    asked: Asked
    samples: Sequence[int] | None
    how: How

    def check(self, scores: Tensor, call: Inputs) -> Tensor:
        """The scores of the changed call `(b)`.

        Raises:
            MulticamError: As for `Asked.check_changed`.
        """
        if torch.isfinite(scores).all():
            return scores
        known = self.asked.call.leaves
        values = {name: leaf for name, leaf in call.batched.items() if name in known}
        return self.asked.check_changed(scores, values, self.samples or range(len(scores)), self.how)


def check_gradient(gradient: Tensor, what: str, change: Change | None = None) -> Tensor:
    """A gradient of the scores, which are finite.

    Args:
        gradient: Of any shape with the samples first.
        what: What it is of, such as "input 'depth'".
        change: Of the pass.

    Raises:
        MulticamError: If it is not finite.
    """
    if torch.isfinite(gradient).all():
        return gradient
    row = first(gradient)
    values = gradient[row].flatten()
    sample = row if change is None or change.samples is None else change.samples[row]
    changed = f", with the inputs {change.how.words}," if change else ""
    raise MulticamError(
        f"the gradient of the score by {what} is {shown(values[~torch.isfinite(values)][0])} in sample {sample}{changed} though the score "
        "is finite: roots, norms and spreads have none at zero (add a small number there), and numbers overflow "
        f"({OVERFLOW}); or take what needs no gradients, such as occlusion"
    )


def check_layer(scores: Tensor, label: str, sample: int) -> Tensor:
    """The scores of what-ifs of one sample in which the output of a layer is another.

    Args:
        scores: The scores.
        label: The layer.
        sample: The sample.

    Raises:
        MulticamError: If one is not finite.
    """
    if torch.isfinite(scores).all():
        return scores
    raise MulticamError(
        f"with the output of layer {label!r} changed, the score of sample {sample} is {shown(scores[first(scores)])}: the model is not "
        "defined there; take another layer, or a method that changes nothing, such as HiResCAM"
    )


def value_ranges(call: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """The range of values of each sample of some inputs, which noise is measured by; see `multicam.chance.value_range`.

    Args:
        call: The call.
        names: The inputs, by their full names.

    Raises:
        MulticamError: If an input holds NaN or infinite values, so that it has no range.
    """
    found = {name: value_range(call.leaves[name]) for name in names}
    for name, values in found.items():
        if not torch.isfinite(values).all():
            raise MulticamError(
                f"noise is measured by the range of an input's values, and input {name!r} has none in sample {first(values)}, where it holds "
                "NaN or infinite values: fill in what is missing, or leave that input out"
            )
    return found


def first(values: Tensor) -> int:
    """The first sample that has a value that is not finite."""
    return int((~torch.isfinite(values.detach())).reshape(len(values), -1).any(1).nonzero()[0])


def shown(value: Tensor) -> str:
    """NaN, inf or -inf."""
    number = complex(value.detach())
    return "NaN" if number != number else "-inf" if number.real == -torch.inf else "inf"


def holding(call: Inputs, sample: int) -> str:
    """Which inputs hold NaN, or else infinite values, in words; nothing where none does.

    Args:
        call: The call.
        sample: The sample whose values are looked at before those of the others.
    """
    for kind, test in (("NaN", torch.isnan), ("infinite values", torch.isinf)):
        found = []
        for name, leaf in call.leaves.items():
            if (
                isinstance(leaf, Tensor)
                and (leaf.is_floating_point() or leaf.is_complex())
                and (bad := test(leaf)).any()
            ):
                rows = bad.reshape(len(bad), -1).any(1) if name in call.batched else None
                where = "" if rows is None else f" in sample {sample if rows[sample] else int(rows.nonzero()[0])}"
                found.append(f"input {name!r} holds {kind}{where}")
        if found:
            return " and ".join(found)
    return ""


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if number is not None and isfinite(number)}


def _plain(value: Any) -> Any:
    """A baseline as a message says it."""
    return value.item() if isinstance(value, Tensor) and not value.ndim else value


def _told(name: str, row: Any, how: How) -> str:
    """An input, and what was done to it."""
    return f"input {name!r} None" if row is None else f"{how.part}input {name!r} {how.of(name)}"


def _same(row: Any, leaf: Any) -> bool:
    return isinstance(row, Tensor) and isinstance(leaf, Tensor) and torch.equal(row.to(leaf.device, leaf.dtype), leaf)
