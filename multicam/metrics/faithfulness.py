"""Is a map faithful: what becomes of the score when what it marks is taken away, or nothing else is left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.call.targets.scores import Probability
from multicam.errors import MulticamError, at_least_one
from multicam.maps import Maps
from multicam.metrics.explanations import named_maps, refuse_not_finite
from multicam.metrics.imputing import impute
from multicam.printing import progress
from multicam.watch.finite import How
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import unwrapped

MapsLike = Tensor | Mapping[str, Tensor]
IMPUTED = How(
    "imputed from what is left", "the model is not defined there; take deletion, with a baseline", part="places of "
)
SEEN_THROUGH = How("seen through its map", "the model is not defined there; take deletion, with a baseline")


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """How the score follows as more and more of the inputs is changed.

    Attributes:
        fractions: The share of the inputs' area that is changed `(n)`, from 0 to 1.
        scores: The score at each of them `(b n)`.
    """

    fractions: Float[Tensor, " n"]
    scores: Float[Tensor, "b n"]

    @property
    def area(self) -> Float[Tensor, " b"]:
        """The area under each curve, by trapezoids: the mean score on the way.

        Example:
            >>> Curve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[4.0, 1.0, 0.0]])).area
            tensor([1.5000])
        """
        return torch.trapezoid(self.scores, self.fractions, dim=1)

    def __repr__(self) -> str:
        mean = ", ".join(f"{score:.3g}" for score in self.scores.mean(0).tolist())
        return f"Curve(area {self.area.mean():.4g}, mean scores {mean})"


def deletion(
    model: nn.Module,
    inputs: Any,
    maps: MapsLike,
    target: TargetLike = None,
    *,
    baseline: Baseline | Mapping[str, Baseline] = 0.0,
    output: OutputLike = None,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """The score while the places with the most evidence are replaced by a baseline, most first. A faithful map makes it fall fast.

    Petsiuk et al. 2018, arXiv:1806.07421, section 4.2. With maps of several inputs, the places of all of them are ranked together by
    their density, and a place counts by its share of the area of all: for maps that compare, this also judges what a map says about
    which input matters; those that do not are put on one scale, each divided by its mean absolute value. Places that are alike come in random order.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        maps: Raw maps `(b h w)` by input, each of its input's size, or `Attributions`, whose maps are taken; or one tensor, for the
            only image input. Inputs without a map stay as they are.
        target: As for the call of a `CAM`; a top class is that of the unchanged inputs.
        baseline: What stands for nothing, see `multicam.call.baselines.baselines`.
        output: As for `CAM`.
        steps: In how many equal steps.
        batch_size: How many changed versions run in one pass. It bounds the memory and does not change the result.
        seed: Of the order of places that are alike; the global random state is not used.

    Raises:
        MulticamError: If maps, inputs, baseline, target or output do not fit each other.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False)), torch.rand(2, 1, 4, 4)
        >>> curve = deletion(model, x, x[:, 0], target=0)
        >>> curve.scores.shape, torch.equal(curve.scores[:, -1], torch.zeros(2))
        (torch.Size([2, 21]), True)
    """
    call, ranks = _ranked(model, inputs, maps, seed)
    changed = _replaced(ranks, call.leaves, baselines(call, list(ranks), baseline))
    how = How(baseline=baseline, part="places of ")
    return _followed(Trace(model, call, {}, target, output), list(ranks), changed, steps, batch_size, "deletion", how)


def insertion(
    model: nn.Module,
    inputs: Any,
    maps: MapsLike,
    target: TargetLike = None,
    *,
    baseline: Baseline | Mapping[str, Baseline] = "blur",
    output: OutputLike = None,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """The score while the places with the most evidence are put onto a baseline, most first. A faithful map makes it rise fast.

    Petsiuk et al. 2018, arXiv:1806.07421, section 4.2, whose baseline is the blurred image. Ranks and shares are those of `deletion`.

    Args:
        model, inputs, maps, target, baseline, output, steps, batch_size, seed: As for `deletion`.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False)), torch.rand(2, 1, 4, 4)
        >>> curve = insertion(model, x, x[:, 0], target=0, baseline=0.0)
        >>> torch.allclose(curve.scores[:, -1], model(x)[:, 0], atol=1e-6)
        True
    """
    call, ranks = _ranked(model, inputs, maps, seed)
    changed = _replaced(ranks, baselines(call, list(ranks), baseline), call.leaves)
    how = How(baseline=baseline, part="places of ")
    return _followed(Trace(model, call, {}, target, output), list(ranks), changed, steps, batch_size, "insertion", how)


def road(
    model: nn.Module,
    inputs: Any,
    maps: MapsLike,
    target: TargetLike = None,
    *,
    order: Literal["most", "least"] = "most",
    output: OutputLike = None,
    steps: int = 10,
    noise: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """ROAD: the score while places are replaced by what their neighbours let one expect, the most relevant or the least first.

    Rong et al. 2022, arXiv:2202.00449. Noisy linear imputation (see `multicam.metrics.imputing.impute`) leaves no edge that shows the model what was
    removed. A faithful map makes the score fall fast with the most relevant first (MoRF) and slowly with the least first
    (LeRF). Ranks and shares are those of `deletion`.

    Args:
        model, inputs, maps, target: As for `deletion`.
        order: Which places go first.
        output: As for `deletion`.
        steps: As for `deletion`; the last step, at which nothing is left to impute from, is the mean colour.
        noise: The standard deviation of the noise.
        batch_size: As for `deletion`.
        seed: Of the noise, and as for `deletion`.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False)), torch.rand(2, 1, 4, 4)
        >>> road(model, x, x[:, 0], target=0, steps=4).scores.shape
        torch.Size([2, 5])
    """
    if order not in ("most", "least"):
        raise MulticamError(f"order is 'most' or 'least' relevant first, not {order!r}")
    call, ranks = _ranked(model, inputs, maps, seed, least=order == "least")

    def changed(name: str, sample: int, share: float) -> Tensor:
        keep = ranks[name][sample] >= share
        image = call.leaves[name][sample : sample + 1]
        return image if keep.all() else impute(image, keep[None], noise=noise, seed=seed)

    trace = Trace(model, call, {}, target, output)
    return _followed(trace, list(ranks), changed, steps, batch_size, "ROAD", IMPUTED)


@dataclass(frozen=True, eq=False, repr=False)
class Masked:
    """The scores of inputs that are seen through their maps.

    Attributes:
        scores: The scores of the whole inputs `(b)`.
        masked: Those of the masked ones `(b)`.
    """

    scores: Float[Tensor, " b"]
    masked: Float[Tensor, " b"]

    @property
    def drop(self) -> Float[Tensor, " b"]:
        """The part of the score that is lost, from 0 to 1; its mean is the average drop."""
        return (self.scores - self.masked).clamp(min=0) / self.scores

    @property
    def increased(self) -> Bool[Tensor, " b"]:
        """Whether the score rises; its mean is the increase in confidence."""
        return self.masked > self.scores

    def __repr__(self) -> str:
        return f"Masked(average drop {self.drop.mean():.1%}, increase {self.increased.float().mean():.1%})"


def seen_through(
    model: nn.Module, inputs: Any, maps: MapsLike, target: TargetLike, *, output: OutputLike = None
) -> Masked:
    """The score when each input is multiplied with its map, scaled to 0 … 1: a faithful map loses little of it.

    Chattopadhyay et al. 2018, arXiv:1710.11063, section 4.1: average drop and increase in confidence. The maps of a sample are
    divided by the largest value of all of them if they compare, so that an input without evidence is left out; else each by its own.
    A map that is empty everywhere leaves nothing.

    Args:
        model, inputs: As for `deletion`.
        maps: As for `deletion`; what is negative counts as zero.
        target: A target with positive scores, such as `Probability(3)`: a share of a logit has no meaning.
        output: As for `deletion`.

    Raises:
        MulticamError: As for `deletion`; or a score is not positive, or the probability of an only class.

    Example:
        >>> from multicam.call.targets.scores import Probability
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4)
        >>> seen_through(model, x, torch.ones(2, 4, 4), Probability(1))
        Masked(average drop 0.0%, increase 0.0%)
    """
    call, named = _checked_maps(model, inputs, maps)
    trace = Trace(model, call, {}, target, output)
    if isinstance(trace.target, Probability) and isinstance(trace.output, Tensor) and trace.output.shape[1:] == (1,):
        raise MulticamError(
            "the probability of the only class is always 1; of a binary classifier take lambda output: output[:, 0].sigmoid()"
        )
    if (trace.scores <= 0).any():
        raise MulticamError(
            f"a share of the score has no meaning where it is not positive, as {trace.scores.min().item():.4g} is: take "
            "Probability(…) as target"
        )
    tops = {name: m.clamp(min=0).flatten(1).amax(1) for name, m in named.items()}
    if named.comparable:
        tops = dict.fromkeys(named, torch.stack(list(tops.values())).amax(0))
    changed = {}
    for name, m in named.items():
        mask = m.clamp(min=0) / tops[name].where(tops[name] > 0, 1)[:, None, None]
        seen = call.leaves[name] * mask[:, None]
        changed[name] = (seen if call.leaves[name].is_floating_point() else seen.round()).to(call.leaves[name])
    return Masked(trace.scores, trace.again(call.replace(changed), how=SEEN_THROUGH).scores)


def _replaced(
    ranks: Mapping[str, Tensor], first: Mapping[str, Tensor], then: Mapping[str, Tensor]
) -> Callable[[str, int, float], Tensor]:
    """One sample of an input in which the first places, this share of the area, have gone from one value to another.

    Args:
        ranks: The share of the area that comes before each place `(b h w)`, by input.
        first: The values to start from.
        then: Those to end with.
    """

    def changed(name: str, sample: int, share: float) -> Tensor:
        return torch.where(ranks[name][sample] < share, then[name][sample], first[name][sample])[None]

    return changed


def _followed(
    trace: Trace,
    names: Sequence[str],
    changed: Callable[[str, int, float], Tensor],
    steps: int,
    batch_size: int,
    title: str,
    how: How,
) -> Curve:
    """The scores while these inputs are changed step by step."""
    batch = trace.inputs.batch
    fractions = torch.linspace(0, 1, at_least_one("steps", steps) + 1, dtype=torch.float64)
    parts = torch.split(fractions, at_least_one("batch_size", batch_size))
    rows = [(sample, part) for sample in range(batch) for part in parts]
    found = [
        trace.rescore(
            {name: torch.cat([changed(name, sample, share) for share in part.tolist()]) for name in names}, sample, how
        )
        for sample, part in progress(rows, len(rows), title)
    ]
    return Curve(fractions.float(), torch.cat(found).cpu().view(batch, len(fractions)))


def _checked_maps(model: nn.Module, inputs: Any, maps: MapsLike) -> tuple[Inputs, Maps]:
    """The call, and the maps by the full names of their inputs."""
    call = Inputs.of(inputs).bind(unwrapped(model)).own()
    named = refuse_not_finite(named_maps(maps, call)).on_one_scale()
    for name, m in named.items():
        size = (call.batch, *call.leaves[name].shape[-2:])
        if name not in call.images or call.leaves[name].ndim != 4 or tuple(m.shape) != size:
            raise MulticamError(
                f"the map {tuple(m.shape)} does not lie on input {name!r} {tuple(call.leaves[name].shape)}; it should be {size}"
            )
    return call, named


def _ranked(
    model: nn.Module, inputs: Any, maps: MapsLike, seed: int, *, least: bool = False
) -> tuple[Inputs, dict[str, Float[Tensor, "b h w"]]]:
    """The call, and for every place of the mapped inputs the share of all area that comes before it.

    The highest values come first, or the lowest; equal ones in random order.
    """
    call, named = _checked_maps(model, inputs, maps)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat([m.detach().flatten(1).float().cpu() for m in named.values()], 1)
    sizes = [m[0].numel() for m in named.values()]
    areas = torch.cat([torch.full((n,), 1 / n / len(named), dtype=torch.float64) for n in sizes])
    shuffled = torch.randperm(flat.shape[1], generator=generator, device="cpu")
    order = shuffled[flat[:, shuffled].argsort(dim=1, descending=not least, stable=True)]
    before = areas[order].double().cumsum(1) - areas[order]
    ranks = torch.empty_like(before).scatter_(1, order, before)
    parts = zip(named.items(), torch.split(ranks, sizes, 1), strict=True)
    # Places that lie exactly at a step belong to the next, also where sums of shares round.
    return call, {name: (part + 1e-9).view(m.shape).to(m.device) for (name, m), part in parts}
