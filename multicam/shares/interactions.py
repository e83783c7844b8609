"""With what a region of one input works together: interaction maps on the other inputs, of any fusion."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines
from multicam.call.inputs import Inputs, wide
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError
from multicam.saliency.attributions import Attributions
from multicam.saliency.gradients import explained, gradient, times
from multicam.saliency.occluding import Sides, occlusion
from multicam.shares.regions import placed
from multicam.watch.finite import How
from multicam.watch.trace import Trace

Region = Tensor | slice | tuple[slice, ...]


def double_occlusion(
    model: nn.Module,
    inputs: Any,
    region: Mapping[str, Region],
    target: TargetLike = None,
    *,
    patch: Sides | Mapping[str, Sides] | None = None,
    stride: Sides | Mapping[str, Sides] | None = None,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    batch_size: int = 32,
) -> Attributions:
    """How much more the score drops for a patch of another input while the region is there than while it is covered.

    `(v - v without P) - (v without R - v without R and P)` for the region R and every patch P: above zero the two need each
    other (synergy), below they say the same (redundancy), and zero wherever a model adds up what it finds in its inputs. It
    takes two runs of `occlusion`, which spreads patches in the same way.

    Args:
        model, inputs, target, output: As for `contribution`.
        region: By the name of its input, a mask `(h w)` or `(b h w)`, or slices of rows and columns, as `numpy.s_[8:16, 0:8]`
            makes them (a signal's last axis has one); of several inputs, all are one region.
        patch, stride: As for `occlusion`.
        baseline: As for `occlusion`, in the region as in the patches.
        wrt: The inputs to map, without that of the region; None: every other image input.
        batch_size: As for `occlusion`.

    Raises:
        MulticamError: As for `occlusion`; or the region does not fit its input, or no other input is left.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> class Pooled(nn.Module):
        ...     def forward(self, rgb, depth):
        ...         return model(rgb.mean((1, 2)), depth.mean((1, 2)))
        >>> inputs = {"rgb": torch.rand(1, 2, 2, 2), "depth": torch.rand(1, 2, 2, 2)}
        >>> found = double_occlusion(Pooled(), inputs, {"rgb": (slice(0, 1), slice(0, 2))}, 0, patch=2)
        >>> found.keys()
        dict_keys(['depth'])
    """
    trace, known, covered = _both(model, inputs, region, target, wrt, baseline, output, need_floating=False)
    names = list(known)
    options: dict[str, Any] = {
        "patch": patch,
        "stride": stride,
        "baseline": known,
        "wrt": names,
        "output": output,
        "batch_size": batch_size,
    }
    there = occlusion(model, trace.inputs, trace.target, **options)
    gone = occlusion(model, covered, trace.target, **options)
    return Attributions({name: there[name] - gone[name] for name in there}, trace.scores, weights=there.weights)


def second_order_gradient(
    model: nn.Module,
    inputs: Any,
    region: Mapping[str, Region],
    target: TargetLike = None,
    *,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
) -> Attributions:
    """By how much the region changes what each entry of another input counts for, to the first order in that entry.

    `(x_j - b_j) (ds/dx_j (x) - ds/dx_j (x with R covered))`, which is `(x_j - b_j)` times the integral over t of
    `sum_{i in R} (x_i - b_i) d2s / dx_i dx_j` with the region at `b + t (x - b)`: the second derivatives that Liang et al. 2022,
    arXiv:2207.00056, section 3.2, look at in one point, summed up exactly on the way from the baseline to the region (Janizek et al.
    2020, arXiv:2002.04138, integrate along both). So it needs no second backward pass, which fused attention does not have, and it
    sees the kinks of ReLUs, whose second derivative is zero everywhere else. Two forward and two backward passes.

    Args:
        model, inputs, region, target, baseline, wrt, output: As for `double_occlusion`.

    Raises:
        MulticamError: As for `gradient` and `double_occlusion`.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> class Pooled(nn.Module):
        ...     def forward(self, rgb, depth):
        ...         return model(rgb.mean((2, 3)), depth.mean((2, 3)))
        >>> inputs = {"rgb": torch.rand(1, 2, 2, 2), "depth": torch.rand(1, 2, 2, 2)}
        >>> found = second_order_gradient(Pooled(), inputs, {"rgb": torch.ones(2, 2, dtype=torch.bool)}, 0)
        >>> torch.allclose(found.evidence["depth"], found.scores, atol=1e-6)  # all of the score needs both
        True
    """
    trace, known, covered = _both(model, inputs, region, target, wrt, baseline, output, need_floating=True)
    there = gradient(model, trace.inputs, trace.target, wrt=list(known), output=output)
    gone = gradient(model, covered, trace.target, wrt=list(known), output=output)
    values = {}
    for name, base in known.items():
        leaf = trace.inputs.leaves[trace.inputs.name(name)]
        values[name] = times(wide(leaf) - wide(base), there[name] - gone[name])
    return Attributions(values, trace.scores, weights=dict.fromkeys(values, 1.0))


def _both(
    model: nn.Module,
    inputs: Any,
    region: Mapping[str, Region],
    target: TargetLike,
    wrt: str | Sequence[str] | None,
    baseline: Baseline | Mapping[str, Baseline],
    output: OutputLike,
    *,
    need_floating: bool,
) -> tuple[Trace, dict[str, Tensor], Inputs]:
    """The call as it is, the baselines of the inputs to map by what the caller calls them, and the call with the region covered."""
    trace = Trace(model, inputs, {}, target, output)
    call = trace.settled  # what has items for each sample is better seen without a region covered
    if not isinstance(region, Mapping) or not region:
        raise MulticamError(f"a region is given by the name of its input, as {{'rgb': mask}}, not {region!r}")
    where = {call.name(name): part for name, part in region.items()}
    masks = {name: _mask(name, call.leaves[name], placed(call, name)[1], part) for name, part in where.items()}
    names = explained(model, inputs, wrt, need_floating=need_floating)
    if wrt is None:
        names = {name: full for name, full in names.items() if full not in where}
    if inside := [name for name, full in names.items() if full in where]:
        raise MulticamError(
            f"the region is in input {inside[0]!r} itself: region_contribution tells the interactions within an input"
        )
    if not names:
        raise MulticamError(
            f"there is no image input to map besides those of the region, {', '.join(map(repr, where))}"
        )
    known = baselines(call, [*where, *names.values()], baseline)
    covered = {name: torch.where(mask, known[name], call.leaves[name]) for name, mask in masks.items()}
    rest = call.replace(covered)
    trace.again(rest, how=How(baseline=baseline, part="a region of "))  # refuses scores that are not finite
    return trace, {name: known[full] for name, full in names.items()}, rest


def _mask(name: str, leaf: Tensor, places: tuple[int, ...], part: Region) -> Bool[Tensor, "..."]:
    """The region as a mask that goes with its input."""
    along = (part,) if isinstance(part, slice) else part
    if isinstance(along, tuple) and len(along) == len(places) and all(isinstance(each, slice) for each in along):
        mask = torch.zeros(places, dtype=torch.bool)
        mask[along] = True
    elif isinstance(part, Tensor) and part.dtype == torch.bool and tuple(part.shape) in (places, (len(leaf), *places)):
        mask = part
    else:
        shown = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
        raise MulticamError(
            f"the region of input {name!r} {tuple(leaf.shape)} is a boolean mask {places} or {(len(leaf), *places)}, or {len(places)} slices, "
            f"not {shown}"
        )
    if not mask.any():
        raise MulticamError(f"the region of input {name!r} is empty")
    per_sample = mask.expand(len(leaf), *places)
    return per_sample.reshape(len(leaf), *[1] * (leaf.ndim - 1 - len(places)), *places).to(leaf.device)
