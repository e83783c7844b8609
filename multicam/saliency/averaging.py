"""Evidence from many gradients: averaged over noise, integrated along the way from a baseline."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines, references_of
from multicam.call.inputs import wide
from multicam.call.scorer import OutputLike, TargetLike
from multicam.chance import normal, seeded
from multicam.errors import at_least_one, number
from multicam.printing import progress
from multicam.saliency.attributions import Attributions
from multicam.saliency.gradients import explained, named, times
from multicam.saliency.varied import Varied
from multicam.watch.finite import NOISY, How, value_ranges
from multicam.watch.trace import Trace

INCOMPLETE = 0.05  # the share of the change that integrated gradients may miss without a warning


def smoothgrad(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    samples: int = 25,
    std: float = 0.15,
    batch_size: int = 32,
    seed: int = 0,
) -> Attributions:
    """SmoothGrad: the gradient averaged over noisy versions of the inputs. Smilkov et al. 2017, arXiv:1706.03825.

    All inputs of `wrt` are noisy at once.

    Args:
        model, inputs: As for `gradient`.
        target: As for `gradient`; a top class is that of the inputs without noise.
        wrt, output: As for `gradient`.
        samples: How many noisy versions.
        std: The standard deviation of the noise as a share of each sample's range of values, 0.1 to 0.2 in the paper.
        batch_size: How many rows run in one pass. It bounds the memory and does not change the result.
        seed: Of the noise, which is the same for every sample; the global random state is not used.

    Example:
        >>> from multicam.saliency.gradients import gradient
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(smoothgrad(model, x, 3, std=0.0)["input"], gradient(model, x, 3)["input"], atol=1e-6)
        True
    """
    names = explained(model, inputs, wrt)
    trace = Trace(model, inputs, {}, target, output)
    means, _ = _moments(trace, list(names.values()), samples=samples, std=std, batch_size=batch_size, seed=seed)
    return Attributions(named(names, means), trace.scores)


def vargrad(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    samples: int = 25,
    std: float = 0.15,
    batch_size: int = 32,
    seed: int = 0,
) -> Attributions:
    """VarGrad: the variance of the gradient over noisy versions of the inputs.

    Adebayo et al. 2018, arXiv:1810.03307, section 2.

    Args:
        model, inputs: As for `gradient`.
        target: As for `smoothgrad`.
        wrt, output: As for `gradient`.
        samples, std, batch_size, seed: As for `smoothgrad`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        >>> vargrad(model, torch.rand(2, 1, 8, 8), 3)["input"].abs().max() < 1e-12
        tensor(True)
    """
    names = explained(model, inputs, wrt)
    trace = Trace(model, inputs, {}, target, output)
    _, variances = _moments(trace, list(names.values()), samples=samples, std=std, batch_size=batch_size, seed=seed)
    return Attributions(named(names, variances), trace.scores)


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    steps: int = 100,
    batch_size: int = 32,
) -> Attributions:
    """Integrated gradients: `(x - x0) int_0^1 G(x0 + a (x - x0)) da`, in units of the score.

    Sundararajan et al. 2017, arXiv:1703.01365, eq. 3, with the gradient in the middle of each step: networks of ReLUs have
    kinks, where finer rules gain nothing. All inputs of `wrt` go from their baselines to their values together. Their
    evidence adds up to `.change`, the score less that of the baselines; `.error` says what is missing of it, and a
    warning tells where that is more than a twentieth.

    Args:
        model, inputs, target: As for `gradient`.
        baseline: What counts as nothing to see, see `multicam.call.baselines.baselines`: a number, `"mean"`, `"blur"`, a tensor,
            or one of these for each input by name.
        wrt, output: As for `gradient`.
        steps: Points on the way.
        batch_size: As for `smoothgrad`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> found = integrated_gradients(model, torch.rand(2, 3, 8, 8), target=3, baseline="blur")
        >>> torch.allclose(found.evidence["input"], found.change, rtol=0.05, atol=0.01)
        True
    """
    names = explained(model, inputs, wrt)
    trace = Trace(model, inputs, {}, target, output)
    full = list(names.values())
    start = baselines(trace.inputs, full, baseline)
    at_least_one("steps", steps)

    def between(name: str, samples: Sequence[int], draws: Sequence[int]) -> Tensor:
        return _between(start[name][samples], trace.inputs.leaves[name][samples], [(d + 0.5) / steps for d in draws])

    sums = {name: torch.zeros_like(wide(leaf)) for name, leaf in start.items()}
    varied = Varied(trace, full, How("on the way from the baseline", "give another baseline"))
    for samples, _, grads in _passes(trace, full, steps, between, batch_size, "integrated gradients", varied):
        for name, gradients in grads.items():
            sums[name].index_add_(0, torch.tensor(samples, device=gradients.device), wide(gradients) / steps)
    values = {name: times(wide(trace.inputs.leaves[name] - start[name]), sums[name]) for name in full}
    ends = Varied(trace, full, How(baseline=baseline))
    ends.apart = varied.apart
    scores = ends.scores({name: trace.inputs.leaves[name] for name in full}) if varied.apart else trace.scores
    change = scores - ends.scores(start)
    found = Attributions(named(names, values), trace.scores, weights=dict.fromkeys(names, 1.0), change=change)
    _warn_if_incomplete(found)
    return found


def expected_gradients(
    model: nn.Module,
    inputs: Any,
    references: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    samples: int = 50,
    batch_size: int = 32,
    seed: int = 0,
) -> Attributions:
    """Expected gradients: integrated gradients whose baseline is drawn from real inputs, in units of the score.

    `E[(x - r) G(r + a (x - r))]` over references r and a in 0 … 1. Erion et al. 2021, arXiv:1906.10670, eq. 3. No
    choice of a baseline decides what counts as nothing to see, but it is an estimate: every reference is used equally
    often, up to one, and the values of a are spread evenly. The evidence adds up to the score less the mean score of
    the references, as `samples` grows.

    Args:
        model, inputs: As for `gradient`.
        references: Inputs as the model takes them, with any number of samples; those that are not explained may be anything.
        target, wrt, output: As for `gradient`.
        samples: How many draws.
        batch_size: As for `smoothgrad`.
        seed: Of the draws, which are the same for every sample; the global random state is not used.

    Raises:
        MulticamError: As for `gradient`; or a reference has another shape than its input.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        >>> x, references = torch.rand(2, 1, 8, 8), torch.rand(10, 1, 8, 8)
        >>> evidence = expected_gradients(model, x, references, target=3).evidence["input"]
        >>> torch.allclose(evidence, (model(x)[:, 3] - model(references)[:, 3].mean()).detach(), atol=1e-4)
        True
    """
    names = explained(model, inputs, wrt)
    trace = Trace(model, inputs, {}, target, output)
    full = list(names.values())
    known = references_of(trace.model, trace.inputs, references, full)
    count = len(next(iter(known.values())))
    generator = seeded(seed)
    rounds = ceil(at_least_one("samples", samples) / count)
    drawn = torch.cat([torch.randperm(count, generator=generator, device="cpu") for _ in range(rounds)])
    jitter = torch.rand(samples, generator=generator, device="cpu")
    along = (torch.randperm(samples, generator=generator, device="cpu") + jitter) / samples

    def reference(name: str, draws: Sequence[int]) -> Tensor:
        return known[name][drawn[list(draws)].to(known[name].device)]

    def between(name: str, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return _between(reference(name, draws), trace.inputs.leaves[name][rows], along[list(draws)])

    sums = {name: torch.zeros_like(wide(trace.inputs.leaves[name]).real) for name in full}
    how = How("on the way from a reference", "give other references")
    for rows, draws, grads in _passes(
        trace, full, samples, between, batch_size, "expected gradients", Varied(trace, full, how)
    ):
        for name, gradients in grads.items():
            way = trace.inputs.leaves[name][rows] - reference(name, draws)
            parts = times(wide(way), wide(gradients)) / samples
            sums[name].index_add_(0, torch.tensor(rows, device=gradients.device), parts)
    return Attributions(named(names, sums), trace.scores, weights=dict.fromkeys(names, 1.0))


def _passes(
    trace: Trace,
    names: Sequence[str],
    draws: int,
    variant: Callable[[str, Sequence[int], Sequence[int]], Tensor],
    batch_size: int,
    title: str,
    varied: Varied,
) -> Iterator[tuple[list[int], list[int], dict[str, Tensor]]]:
    """The gradients of each sample's variations, a part of them at a time.

    Args:
        trace: The pass without changes.
        names: The inputs that vary, and that the gradients are of.
        draws: How many variations of each sample.
        variant: Called as `variant(name, samples, draws)`, for the rows of an input.
        batch_size: How many rows run in one pass.
        title: Of the progress bar.
        varied: What runs them.

    Yields:
        The sample and the draw of each row, and the gradients of the rows by input.
    """
    pairs = list(product(range(trace.inputs.batch), range(at_least_one("samples", draws))))
    parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), at_least_one("batch_size", batch_size))]
    for part in progress(parts, len(parts), title):
        samples, drawn = [sample for sample, _ in part], [draw for _, draw in part]
        rows = {name: variant(name, samples, drawn) for name in names}
        yield samples, drawn, varied.gradients(samples, rows)
    varied.doubt()


def _moments(
    trace: Trace, names: Sequence[str], *, samples: int, std: float, batch_size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean and the variance of the gradient over noisy inputs, by input; the arguments as for `smoothgrad`."""
    number("std", std)
    leaves: dict[str, Tensor] = {name: trace.inputs.leaves[name] for name in names}
    strengths = {name: std * values for name, values in value_ranges(trace.inputs, names).items()}

    def noisy(name: str, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        leaf = leaves[name]
        dtype = torch.complex64 if leaf.is_complex() else torch.float32
        noise = [normal(leaf.shape[1:], (seed, draw, names.index(name)), dtype) for draw in draws]
        return leaf[rows] + (strengths[name][rows] * torch.stack(noise).to(leaf)).to(leaf)

    # Double, because the variance is the small difference of two sums.
    sums = {name: torch.zeros_like(leaf, dtype=_double(leaf)) for name, leaf in leaves.items()}
    squares = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    for rows, _, grads in _passes(
        trace, names, samples, noisy, batch_size, "noisy gradients", Varied(trace, names, NOISY)
    ):
        for name, gradients in grads.items():
            at, parts = torch.tensor(rows, device=gradients.device), gradients.to(sums[name].dtype) / samples
            sums[name].index_add_(0, at, parts)
            squares[name].index_add_(0, at, parts.abs() ** 2 * samples)
    variances = {name: (squares[name] - sums[name].abs() ** 2).clamp(min=0) for name in names}

    def single(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(_single(leaves[name], x)) for name, x in values.items()}

    return single(sums), single(variances)


def _double(leaf: Tensor) -> torch.dtype:
    return torch.complex128 if leaf.is_complex() else torch.float64


def _single(leaf: Tensor, x: Tensor) -> torch.dtype:
    """The dtype of a result `x` about an input: the input's precision, at least single."""
    exact = leaf.dtype in (torch.float64, torch.complex128)
    if x.is_complex():
        return torch.complex128 if exact else torch.complex64
    return torch.float64 if exact else torch.float32


def _between(start: Tensor, end: Tensor, shares: Any) -> Tensor:
    """The places on the ways from `start` to `end`, a share of its way for each row."""
    return start + _per_row(shares, start) * (end - start)


def _per_row(values: Any, like: Tensor) -> Tensor:
    """One number for each row, on axes that broadcast against `like`."""
    numbers: Tensor = torch.as_tensor(values, dtype=like.real.dtype, device=like.device)
    return numbers[(..., *[None] * (like.ndim - 1))]


def _warn_if_incomplete(found: Attributions) -> None:
    assert found.change is not None
    missing = found.error * found.change.abs()
    bad = (found.error > INCOMPLETE) & (missing > 1e-3 * found.scores.abs())
    if bad.any():
        warnings.warn(
            f"integrated gradients miss up to {found.error[bad].max().item():.0%} of the change of the score, for {int(bad.sum())} of "
            f"{len(bad)} samples: take more steps, and float32 if the model computes in less",
            stacklevel=3,
        )
