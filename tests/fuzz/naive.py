"""The truth by brute force: a fresh model for every pass, one row at a time, formulas as they stand in papers."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil, factorial
from typing import Any

import torch
from torch import Tensor, nn

from multicam.chance import normal
from tests.fuzz.blocks import Around
from tests.fuzz.models import CLASSES, Spec, blocks_of, build, inputs, packed, taken
from tests.fuzz.rows import COMPANY, MEMORY, STATE


class NoAnswerError(Exception):
    """Brute force has no number either: the model raises, it is NaN, or no gradient arrives."""


class Case:
    """A spec with its inputs, and the scores of any rows of them.

    Args:
        spec: What the model and the inputs are made of.
        jitter: How much the inputs are off; where numbers move with that, they are no truth.
    """

    def __init__(self, spec: Spec, jitter: float = 0.0) -> None:
        self.spec = spec
        self.stateful = bool(blocks_of(spec) & {*STATE})
        self._model: nn.Module | None = None
        self.values = inputs(spec)
        noise = torch.Generator().manual_seed(spec.seed + 1)
        for stream in spec.streams:
            x = self.values[stream.name]
            if x.is_floating_point():
                x += jitter * torch.randn(x.shape, generator=noise, dtype=x.dtype)
        self.pair = 2 if spec.batch > 1 and self._raises([0]) else 1  # no fewer rows than this run
        picked = self.logits(self.values).detach()
        if picked.shape != (spec.batch, CLASSES) or not torch.isfinite(picked).all():
            raise NoAnswerError("there is no finite score for each sample")
        self.size = float(picked.abs().max())
        self.classes = picked.argmax(1).tolist()
        self.company = self._company()

    def model(self) -> nn.Module:
        """The model as it was before any call."""
        if self._model is None or self.stateful:
            self._model = build(self.spec).eval()
            for module in self._model.modules():
                if isinstance(module, Around) and module.kind == "checkpoint":
                    # What is computed again reads what the first time left behind, and is another model's gradient.
                    module.kind = "plain"
                if isinstance(module, nn.BatchNorm2d):
                    # PyTorch's kernel pairs the wrong numbers where layouts are uncommon and an axis has one entry.
                    module.register_forward_pre_hook(lambda module, given: (_laid_out(given[0]),))
                    module.register_forward_hook(_gradient_laid_out)
        return self._model

    def logits(self, values: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        """What a fresh model says of rows, as a user would call it."""
        model = self.model() if model is None else model
        copies = {name: clone(x) for name, x in values.items()}
        args, kwargs = packed(self.spec, copies)
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            raise NoAnswerError(f"the model raises {error!r}") from error
        return {"tensor": lambda: output, "dict": lambda: output["logits"], "tuple": lambda: output[1]}[
            self.spec.returns
        ]()

    def target(self, samples: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """From the logits of these samples to their scores."""
        if self.spec.target == "function":
            return squares
        chosen = {
            "class": [1] * len(samples),
            "classes": [i % CLASSES for i in samples],
            "top": [self.classes[i] for i in samples],
        }[self.spec.target]
        return lambda logits: logits[range(len(samples)), chosen]

    def row(self, sample: int, change: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """One sample, as often as the model needs it, with some inputs `(1 …)` changed."""
        rows = taken(self.values, [sample] * self.pair)
        for name, x in (change or {}).items():
            rows[name] = torch.cat([x] * self.pair)
        return rows

    def score(self, sample: int, change: Mapping[str, Tensor] | None = None, model: nn.Module | None = None) -> Tensor:
        """The score of a sample that runs alone."""
        found = self.target([sample] * self.pair)(self.logits(self.row(sample, change), model))[0]
        if not torch.isfinite(found):
            raise NoAnswerError("the score is not finite")
        return found

    def value(self, sample: int, change: Mapping[str, Tensor] | None = None) -> float:
        with torch.no_grad():
            return float(self.score(sample, change))

    def sample(self, name: str, sample: int) -> Tensor:
        return self.values[name][sample : sample + 1]

    def _raises(self, samples: Sequence[int]) -> bool:
        try:
            self.logits(taken(self.values, samples))
        except NoAnswerError:
            return True
        return False

    def _company(self) -> bool:
        """Whether what a row gives depends on the rows beside it."""
        if self.spec.batch == 1:
            return False
        if blocks_of(self.spec) & {*COMPANY, *MEMORY} or self.spec.fuse == "contrast":
            return True
        whole = self.logits(self.values).detach()
        # The kept outputs of an encoder that runs row by row are those of its last.
        return any(
            not torch.allclose(self.logits(self.row(i))[0].detach(), whole[i], 1e-9, 1e-9)
            for i in range(self.spec.batch)
        )


def _laid_out(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


def _gradient_laid_out(module: nn.Module, given: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_laid_out)


def squares(logits: Tensor) -> Tensor:
    return logits.square().sum(1)


def clone(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list):
        return [clone(each) for each in x]
    return x.copy() if hasattr(x, "dtype") else x


# Gradients


def gradients(
    case: Case, names: Sequence[str], sample: int, change: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """The gradient of a sample's score by some of its inputs `(1 …)`."""
    leaves = {name: (change or {}).get(name, case.sample(name, sample)).clone().requires_grad_() for name in names}
    score = case.score(sample, leaves)
    if not score.requires_grad:
        raise NoAnswerError("there is no graph")
    try:
        found = torch.autograd.grad(score, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:  # the model writes over what its gradient needs
        raise NoAnswerError(f"no gradient: {error}") from error
    answers = []
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        if gradient is None:
            other = {**{n: x.detach() for n, x in leaves.items()}, name: 1 - 2 * leaf.detach()}
            if case.value(sample, other) != score.item():
                raise NoAnswerError(f"no gradient by {name}, on which the score depends")
            gradient = torch.zeros_like(leaf)
        answers.append(gradient)
    return answers


def gradient(case: Case, names: Sequence[str]) -> dict[str, Tensor]:
    rows = [gradients(case, names, sample) for sample in range(case.spec.batch)]
    return {name: torch.cat(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


def input_x_gradient(case: Case, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: case.values[name] * g for name, g in gradient(case, names).items()}


def integrated_gradients(case: Case, names: Sequence[str], steps: int, baseline: float) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(case.values[name]) for name in names}
    for sample, step in product(range(case.spec.batch), range(steps)):
        share = (step + 0.5) / steps
        on_way = {name: baseline + share * (case.sample(name, sample) - baseline) for name in names}
        for name, g in zip(names, gradients(case, names, sample, on_way), strict=True):
            found[name][sample] += ((case.sample(name, sample) - baseline) * g / steps)[0]
    return found


def smoothgrad(case: Case, names: Sequence[str], draws: int, std: float) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(case.values[name]) for name in names}
    for sample, draw in product(range(case.spec.batch), range(draws)):
        noisy = {}
        for place, name in enumerate(names):
            x = case.sample(name, sample)
            noise = normal(x.shape[1:], (0, draw, place)).to(x)
            noisy[name] = x + std * (x.max() - x.min()) * noise
        for name, g in zip(names, gradients(case, names, sample, noisy), strict=True):
            found[name][sample] += g[0] / draws
    return found


def noisy(draw: int, mask: Tensor, channel: int) -> Tensor:
    return mask + 2 * normal(mask.shape[1:], (0, draw, channel)).to(mask)


# What-ifs of inputs


def occlusion(case: Case, name: str, patch: int, stride: int, baseline: float) -> Tensor:
    x = case.values[name]
    sides = x.shape[2:] if x.ndim == 4 else x.shape[1:]
    total, times = torch.zeros_like(x), torch.zeros_like(x)
    starts = [[stride * i for i in range(ceil((side - patch) / stride) + 1)] for side in sides]
    for sample, corner in product(range(len(x)), product(*starts)):
        window = (0, ..., *(slice(at, at + patch) for at in corner))
        covered = case.sample(name, sample).clone()
        covered[window] = baseline
        drop = case.value(sample) - case.value(sample, {name: covered})
        total[sample][window[1:]] += drop
        times[sample][window[1:]] += 1
    return total / times


def shapley(players: int, value: Callable[[tuple[bool, ...]], float]) -> Tensor:
    """Exact shares by the definition."""
    values = {there: value(there) for there in product((False, True), repeat=players)}
    found = torch.zeros(players, dtype=torch.float64)
    for i, (there, with_none) in product(range(players), values.items()):
        if not there[i]:
            size = sum(there)
            weight = factorial(size) * factorial(players - size - 1) / factorial(players)
            found[i] += weight * (values[(*there[:i], True, *there[i + 1 :])] - with_none)
    return found


def contribution(case: Case, players: Sequence[Sequence[str]], absent: Mapping[str, Tensor]) -> Tensor:
    """The shares of the players and the scores without and with all of them; what is absent has a mean over rows `(n …)`."""

    def value(sample: int, there: Sequence[bool]) -> float:
        gone = [name for names, here in zip(players, there, strict=True) if not here for name in names]
        count = len(next(iter(absent.values())))
        every = [case.value(sample, {name: absent[name][i : i + 1] for name in gone}) for i in range(count)]
        return sum(every) / count

    rows = []
    for sample in range(case.spec.batch):
        ends = [value(sample, [here] * len(players)) for here in (False, True)]
        shares = shapley(len(players), lambda there, s=sample: value(s, there))
        rows.append(torch.cat([shares, torch.tensor(ends, dtype=shares.dtype)]))
    return torch.stack(rows)


def region_contribution(case: Case, cuts: Mapping[str, tuple[int, int]], baseline: float) -> Tensor:
    regions = [(name, r, c) for name, (rows, columns) in cuts.items() for r in range(rows) for c in range(columns)]

    def value(sample: int, there: Sequence[bool]) -> float:
        changed = {name: case.sample(name, sample).clone() for name in cuts}
        for (name, r, c), here in zip(regions, there, strict=True):
            height, width = changed[name].shape[2:]
            down = torch.arange(height) * cuts[name][0] // height == r
            right = torch.arange(width) * cuts[name][1] // width == c
            if not here:
                changed[name][:, :, down[:, None] & right] = baseline
        return case.value(sample, changed)

    return torch.stack(
        [shapley(len(regions), lambda there, s=sample: value(s, there)) for sample in range(case.spec.batch)]
    )


def deletion(case: Case, maps: Mapping[str, Tensor], steps: int, baseline: float) -> Tensor:
    """The scores while places go, those with the highest value of all maps first; every map's area is the same."""
    found = torch.zeros(case.spec.batch, steps + 1, dtype=torch.float64)
    for sample, step in product(range(case.spec.batch), range(steps + 1)):
        places = [
            (-float(value), 1 / m[sample].numel() / len(maps), name, i)
            for name, m in maps.items()
            for i, value in enumerate(m[sample].flatten())
        ]
        changed = {name: case.sample(name, sample).clone() for name in maps}
        gone = 0.0
        for _, area, name, i in sorted(places):
            if gone + 1e-9 < step / steps:
                changed[name].flatten(2)[..., i] = baseline
            gone += area
        found[sample, step] = case.value(sample, changed)
    return found
