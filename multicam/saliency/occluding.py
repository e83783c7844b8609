"""Evidence without gradients: what becomes of the score when a part of an input is covered."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError, at_least_one, unknown
from multicam.printing import progress
from multicam.saliency.attributions import Attributions
from multicam.saliency.gradients import explained
from multicam.watch.finite import How
from multicam.watch.trace import Trace

Sides = int | Sequence[int]


def occlusion(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    patch: Sides | Mapping[str, Sides] | None = None,
    stride: Sides | Mapping[str, Sides] | None = None,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    batch_size: int = 32,
) -> Attributions:
    """Occlusion: how much the score drops when a patch of one input is covered, the mean of all patches over a place.

    Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2. A patch covers all channels, and of clips all frames, of one
    input; all others stay, and what only depends on them is not run again. It needs no gradients, so inputs of any
    dtype can be explained. As evidence, a patch's drop counts once, spread over its area.

    Args:
        model, inputs, target: As for `gradient`.
        patch: The height and width of a patch, or one number for both, or one of these for each input by name; as many
            numbers as there are axes to cover (three for a volume, one for a signal). None: an eighth of each side.
        stride: How far patches are apart, in the same way. None: the size of a patch.
        baseline: What a patch shows instead, as for `integrated_gradients`.
        wrt: As for `gradient`; None: every image input.
        output: As for `gradient`.
        batch_size: How many covered versions run in one pass. It bounds the memory and does not change the result.

    Raises:
        MulticamError: As for `gradient`; or a patch or stride does not fit an input, or a score is not finite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        >>> found = occlusion(model, torch.rand(2, 1, 8, 8), target=3, patch=4)
        >>> found["input"].shape, found["input"].unique().numel()
        (torch.Size([2, 1, 8, 8]), 8)
    """
    names = explained(model, inputs, wrt, need_floating=False)
    trace = Trace(model, inputs, {}, target, output)
    covers, how = baselines(trace.inputs, list(names.values()), baseline), How(baseline=baseline, part="a patch of ")
    patches, strides = (_by_name(sides, trace.inputs, list(names.values())) for sides in (patch, stride))
    values, weights = {}, {}
    for name, full in names.items():
        leaf, cover = trace.inputs.leaves[full], covers[full]
        sides = _sides("patch", patches.get(full), full, leaf, [ceil(side / 8) for side in _spatial(leaf)])
        steps = _sides("stride", strides.get(full), full, leaf, sides)
        if len(steps) != len(sides):
            raise MulticamError(f"the stride {steps} of input {name!r} needs as many numbers as its patch {sides}")
        if any(step > side for step, side in zip(steps, sides, strict=True)):
            raise MulticamError(f"patches {sides} at a stride of {steps} leave gaps in input {name!r}")
        covered = leaf.shape[leaf.ndim - len(sides) :]
        windows = _windows(covered, sides, steps)
        parts = [windows[i : i + batch_size] for i in range(0, len(windows), at_least_one("batch_size", batch_size))]
        drops = torch.zeros(leaf.shape, dtype=trace.scores.dtype, device=leaf.device)
        times = torch.zeros(covered, device=leaf.device)
        for window in windows:
            times[window] += 1
        for sample, part in progress(product(range(len(leaf)), parts), len(leaf) * len(parts), f"occlusion {name}"):
            # The unchanged sample runs along, as passes of other sizes and kernels round otherwise.
            rows = leaf[sample].repeat(1 + len(part), *[1] * (leaf.ndim - 1))
            for row, window in zip(rows[1:], part, strict=True):
                row[..., *window] = cover[sample][..., *window]
            before, *scores = trace.rescore({full: rows}, sample, how)
            for after, window in zip(scores, part, strict=True):
                drops[sample][..., *window] += before - after
        values[name] = drops / times
        weights[name] = 1 / (prod(sides) * prod(leaf.shape[1 : leaf.ndim - len(sides)]))
    return Attributions(values, trace.scores, weights=weights)


def _spatial(leaf: Tensor) -> tuple[int, ...]:
    return tuple(leaf.shape[1:][-2:] if leaf.ndim > 3 else leaf.shape[1:][-1:])


def _by_name(sides: Sides | Mapping[str, Sides] | None, inputs: Inputs, names: Sequence[str]) -> dict[str, Any]:
    """The sides that were given for each explained input."""
    if not isinstance(sides, Mapping):
        return dict.fromkeys(names, sides)
    given = {inputs.name(short): each for short, each in sides.items()}
    for name in given:
        if name not in names:
            raise unknown("explained input", name, names)
    return given


def _sides(what: str, asked: Sides | None, name: str, leaf: Tensor, default: Sequence[int]) -> list[int]:
    """The sides of a patch or stride along the last axes of an input; one number is for as many axes as the default has."""
    if asked is None:
        return list(default)
    sides = list(asked) if isinstance(asked, Sequence) else [asked] * len(default)
    limits = leaf.shape[-len(sides) :] if 0 < len(sides) < leaf.ndim else ()
    if not limits or not all(
        isinstance(side, int) and 1 <= side <= limit for side, limit in zip(sides, limits, strict=True)
    ):
        raise MulticamError(f"the {what} {asked!r} does not fit input {name!r} {tuple(leaf.shape)}")
    return sides


def _windows(size: Sequence[int], sides: Sequence[int], steps: Sequence[int]) -> list[tuple[slice, ...]]:
    """Windows that cover all of a size; those at the end may be cut."""
    along = [
        [slice(i * step, min(i * step + side, length)) for i in range(ceil((length - side) / step) + 1)]
        for length, side, step in zip(size, sides, steps, strict=True)
    ]
    return list(product(*along))
