"""Does an explanation say what the model does under small changes, and does it stay the same under smaller ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines
from multicam.call.inputs import Inputs, wide
from multicam.call.scorer import OutputLike, TargetLike
from multicam.chance import seeded
from multicam.errors import MulticamError, at_least_one, number
from multicam.metrics.explanations import Explain, by_name, explained_maps, refuse_not_finite
from multicam.metrics.localization import correlation
from multicam.printing import progress
from multicam.saliency.attributions import Attributions, channels_second
from multicam.saliency.gradients import explained, times
from multicam.watch.finite import How, value_ranges
from multicam.watch.trace import Trace

Found = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Infidelity:
    """By how much the score changes under perturbations, and by how much an explanation says that it does.

    Attributes:
        predicted: The evidence that the explanation sees in what a perturbation takes away `(b n)`.
        changes: By how much the score falls `(b n)`.
    """

    predicted: Float[Tensor, "b n"]
    changes: Float[Tensor, "b n"]

    @property
    def mean(self) -> Float[Tensor, " b"]:
        """The infidelity: the mean of `(predicted - changes)^2`, in squared units of the score.

        Example:
            >>> Infidelity(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).mean
            tensor([2.])
        """
        return (self.predicted - self.changes).square().mean(1)

    @property
    def scaled(self) -> Float[Tensor, " b"]:
        """The infidelity of the explanation times the factor of at least zero that suits it best, so that its scale does not matter.

        The same as captum's with `normalize=True` where that factor is not negative: an explanation that is the wrong way round is not right.

        Example:
            >>> Infidelity(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])).scaled
            tensor([0.])
        """
        size = self.predicted.square().sum(1)
        factor = (self.predicted * self.changes).sum(1).clamp(min=0) / size.where(size > 0, 1)
        return (factor[:, None] * self.predicted - self.changes).square().mean(1)

    @property
    def correlation(self) -> Float[Tensor, " b"]:
        """Pearson's correlation of the two, known as faithfulness correlation.

        Bhatt et al. 2020, arXiv:2005.00631, definition 3. Zero where either is the same for all perturbations.

        Example:
            >>> Infidelity(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 7.0, 5.0]])).correlation
            tensor([-1.])
        """
        return correlation(self.predicted, self.changes)

    def __repr__(self) -> str:
        return (
            f"Infidelity(mean {self.mean.mean():.4g}, scaled {self.scaled.mean():.4g}, "
            f"correlation {self.correlation.mean():.4g})"
        )


def infidelity(
    model: nn.Module,
    inputs: Any,
    found: Found,
    target: TargetLike = None,
    *,
    samples: int = 100,
    patch: float = 0.25,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    output: OutputLike = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Infidelity:
    """What becomes of the score when random rectangles of the inputs are taken away, beside what an explanation predicts.

    Yeh et al. 2019, arXiv:1901.09392, definition 2.1: `E_I[(I^T phi - (f(x) - f(x - I)))^2]`, whose perturbations `I` put
    `rectangles` of the inputs to their baselines: `I = z (x - x0)`. What is predicted is the sum of the evidence in the
    rectangles: of attributions in units of the score and of maps, which are densities, the numbers themselves; of gradients, `I` times the
    gradient. A perturbation changes several inputs at once as often as not, so an explanation is also asked whether the evidence in one
    adds to that in another. Where numbers have no scale (`comparable = False`, ranks, maps that were normalised) only
    `.scaled` and `.correlation` have a meaning. Evidence cut at zero cannot foresee that a score rises: make maps with `signed=True`.

    Captum's function of the name takes any perturbation and ten samples, Quantus's covers squares of 4 px with black and compares
    with the sum of the attributions in them; given the same perturbations, captum's number is `.mean`, and `.scaled` with
    `normalize=True`.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        found: `Attributions`, or maps by input, each of its input's size; or one map, for the only image input. Inputs without any
            stay as they are.
        target: As for the call of a `CAM`; a top class is that of the unchanged inputs.
        samples: How many perturbations, the same ones for every sample and every explanation: two of these can be told apart sooner
            than the numbers of either are sure.
        patch: The sides of a rectangle as a share of the input's.
        baseline: What stands for nothing, see `multicam.call.baselines.baselines`.
        output: As for `CAM`.
        batch_size: How many perturbed versions run in one pass. It bounds the memory and does not change the result.
        seed: Of the perturbations; the global random state is not used.

    Raises:
        MulticamError: If explanation, inputs, baseline, target or output do not fit each other.

    Example:
        >>> from multicam.saliency.gradients import input_x_gradient
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(2, 1, 8, 8)
        >>> found = infidelity(model, x, input_x_gradient(model, x, 1), 1)
        >>> bool((found.mean < 1e-9).all()), bool((found.correlation > 0.999).all())
        (True, True)
    """
    trace = Trace(model, inputs, {}, target, output)
    call = trace.inputs
    named = _by_full_name(call, found)
    nothing = baselines(call, list(named), baseline)
    masks = rectangles(call, list(named), samples=samples, patch=patch, seed=seed)
    predicted = torch.zeros(call.batch, samples, dtype=torch.float64)
    for name, (given, values) in named.items():
        evidence = _evidence(found, given, values, call.leaves[name], nothing[name])
        if not torch.isfinite(evidence).all():
            raise MulticamError(
                f"the evidence in input {name!r} is not finite: it or its baseline holds NaN or infinite values"
            )
        predicted += evidence.double().cpu().flatten(1) @ masks[name].double().flatten(1).T
    how = How(baseline=baseline, part="a rectangle of ")
    draws = torch.split(torch.arange(samples), at_least_one("batch_size", batch_size))
    parts = [(i, some) for i in range(call.batch) for some in draws]
    scores = [
        trace.rescore(
            {
                name: torch.where(_on(z[some], call.leaves[name]), nothing[name][i], call.leaves[name][i])
                for name, z in masks.items()
            },
            i,
            how,
        )
        for i, some in progress(parts, len(parts), "infidelity")
    ]
    changes = trace.scores[:, None] - torch.cat(scores).view(call.batch, samples)
    return Infidelity(predicted.to(changes.dtype), changes.cpu())


def rectangles(
    call: Inputs, names: Sequence[str], *, samples: int = 100, patch: float = 0.25, seed: int = 0
) -> dict[str, Bool[Tensor, "n ..."]]:
    """The places that the perturbations of `infidelity` take away: one rectangle in each of some inputs, `(n *grid)` by input.

    Every choice of inputs but none is equally likely, and so is every position that lies inside. All rectangles of an input have the same
    size, so that what is predicted does not follow from how much is taken away.

    Args:
        call: The call.
        names: The inputs, by their full names.
        samples, patch, seed: As for `infidelity`.

    Raises:
        MulticamError: If `patch` is no share.

    Example:
        >>> rectangles(Inputs(torch.rand(2, 3, 4, 4)), ["0"], samples=1, patch=0.5, seed=1)["0"].int()
        tensor([[[0, 0, 0, 0],
                 [0, 0, 0, 0],
                 [1, 1, 0, 0],
                 [1, 1, 0, 0]]], dtype=torch.int32)
    """
    if not 0 < number("patch", patch) <= 1:
        raise MulticamError(f"patch is a share of the input's sides, above 0 and up to 1, not {patch!r}")
    generator = seeded(seed)
    n = at_least_one("samples", samples)
    chosen = torch.randint(1, 2 ** len(names), (n,), generator=generator, device="cpu")
    masks = {}
    for i, name in enumerate(names):
        grid = _grid(call.leaves[name])
        masks[name] = (chosen >> i & 1).bool().view(n, *[1] * len(grid)).expand(n, *grid)
        for axis, side in enumerate(grid):
            length = max(1, round(patch * side))
            first = torch.randint(side - length + 1, (n, 1), generator=generator, device="cpu")
            at = torch.arange(side, device="cpu")
            inside = (first <= at) & (at < first + length)
            masks[name] = masks[name] & inside.view(n, *[1] * axis, side, *[1] * (len(grid) - axis - 1))
    return masks


def sensitivity(
    model: nn.Module,
    inputs: Any,
    explain: Explain,
    target: TargetLike = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    seed: int = 0,
) -> Float[Tensor, " b"]:
    """The largest change of an explanation under noise that can hardly be seen, as a share of its size: max-sensitivity.

    Yeh et al. 2019, arXiv:1901.09392, definition 3.1: `max |phi(x + d) - phi(x)| / |phi(x)|` over noise `d` that is uniform in
    `-radius … radius`. The norm is that of the maps of all inputs together, as they are; for attributions rather than their maps, give
    `lambda *call: dict(gradient(*call))`. Zero where nothing changes, infinite where an empty explanation becomes another.

    Captum's `sensitivity_max` has the same radius and number of samples, in units of the inputs and not of their range; Quantus's
    `MaxSensitivity` has a radius of 0.2 and 200 samples. A larger number of samples can only give a larger maximum, so
    numbers of two settings do not compare.

    Args:
        model, inputs: As for `infidelity`.
        explain: What makes the explanation, such as `gradient` or `explainer(GradCAM, layers)`.
        target: As for the call of a `CAM`; a top class is that of the inputs without noise.
        radius: Of the noise, as a share of each sample's range of values.
        samples: How many times noise is drawn.
        wrt: The inputs that are noisy, all at once. None: every floating-point image input.
        output: As for `CAM`, to choose the class where `target` is None; `explain` has its own.
        seed: Of the noise, which is the same for every sample; the global random state is not used.

    Raises:
        MulticamError: If inputs, explanation, target or output do not fit each other.

    Example:
        >>> from multicam.saliency.gradients import gradient, input_x_gradient
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(2, 1, 8, 8)
        >>> sensitivity(model, x, gradient, 1)  # of a linear model, it is the same everywhere
        tensor([0., 0.])
        >>> bool((sensitivity(model, x, input_x_gradient, 1) > 0).all())
        True
    """
    trace = Trace(model, inputs, {}, target, output)
    names = list(explained(model, trace.inputs, wrt).values())
    number("radius", radius)
    ranges = value_ranges(trace.inputs, names)
    before = _flat(explain, trace, trace.inputs)
    worst = torch.zeros(len(before), dtype=before.dtype, device=before.device)
    for draw in progress(range(at_least_one("samples", samples)), samples, "sensitivity"):
        noisy = {}
        for i, name in enumerate(names):
            leaf = trace.inputs.leaves[name]
            noise = torch.rand(leaf.shape[1:], generator=seeded(seed, draw, i), device="cpu") * 2 - 1
            noisy[name] = leaf + (radius * ranges[name] * noise.to(leaf.device)).to(leaf.dtype)
        try:
            after = _flat(explain, trace, trace.settled.replace(noisy))
        except MulticamError as error:
            raise MulticamError(f"with noise of radius={radius} on {', '.join(map(repr, names))}: {error}") from error
        worst = torch.maximum(worst, (after - before).norm(dim=1))
    return torch.where(worst == 0, worst, worst / before.norm(dim=1)).cpu()


def _flat(explain: Explain, trace: Trace, call: Inputs) -> Float[Tensor, "b n"]:
    maps = refuse_not_finite(explained_maps(explain, trace.model, call, trace.target))
    return torch.cat([m.reshape(call.batch, -1).float() for m in maps.values()], 1)


def _by_full_name(call: Inputs, found: Found) -> dict[str, tuple[str, Tensor]]:
    """Of each explained input what the explanation calls it, and its values."""
    named = {call.name(name): (name, values.detach()) for name, values in by_name(found, call).items()}
    for name, (_, values) in named.items():
        leaf = call.leaves[name]
        if name not in call.batched:
            raise MulticamError(f"input {name!r} has no value for each sample, so nothing of it can be taken away")
        size = tuple(leaf.shape) if isinstance(found, Attributions) else (call.batch, *_grid(leaf))
        if tuple(values.shape) != size:
            raise MulticamError(
                f"the explanation {tuple(values.shape)} does not lie on input {name!r} {tuple(leaf.shape)}; it should be {size}"
                + ("" if isinstance(found, Attributions) else ", or Attributions for a number for each entry")
            )
        if not torch.isfinite(values).all():
            raise MulticamError(f"the explanation of input {name!r} has NaN or infinite values")
    return named


def _evidence(found: Found, name: str, values: Tensor, leaf: Tensor, nothing: Tensor) -> Float[Tensor, "b *grid"]:
    """What taking a place away takes from the score, as far as the explanation says."""
    if not isinstance(found, Attributions):
        return values / prod(values.shape[1:])
    each = times(wide(leaf) - wide(nothing), values) if found.weights is None else found.weights[name] * values
    return channels_second(each).sum(1) if each.ndim > 2 else each


def _grid(leaf: Tensor) -> tuple[int, ...]:
    return tuple(channels_second(leaf).shape[2:] if leaf.ndim > 2 else leaf.shape[1:])


def _on(mask: Bool[Tensor, "n ..."], leaf: Tensor) -> Bool[Tensor, "n ..."]:
    """A mask of places on axes that broadcast against the input."""
    if leaf.ndim < 3:
        return mask.to(leaf.device)
    frames_first = channels_second(leaf).shape != leaf.shape
    return mask.unsqueeze(2 if frames_first else 1).to(leaf.device)
