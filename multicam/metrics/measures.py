"""What `evaluate` can ask of an explanation, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from multicam.call.baselines import Baseline
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike
from multicam.call.targets.scores import ClassScore, Probability, Target
from multicam.errors import MulticamError
from multicam.maps import Maps
from multicam.metrics.explanations import Explain
from multicam.metrics.faithfulness import Curve, Masked, deletion, insertion, road, seen_through
from multicam.metrics.localization import complexity, energy_inside, names_input, pointing_game, sparseness
from multicam.metrics.randomization import parameter_randomization
from multicam.metrics.ranking import Better
from multicam.metrics.robustness import Infidelity, infidelity, sensitivity
from multicam.saliency.attributions import Attributions


@dataclass(frozen=True, eq=False)
class Explained:
    """One batch and what one method says of it: all that a `Metric` can ask about.

    Attributes:
        model: The model.
        inputs: The call, its inputs by name.
        target: What was explained: the class that the model chose, if none was given.
        output: Which part of the model's output the target sees.
        explain: The method, to ask it about other inputs or models.
        found: What it returned.
        maps: The same as maps `(b h w)` by the full names of the inputs.
        seconds: How long the method took for each sample.
        regions: Where the evidence is known to be, as masks by the full names of the inputs; None if that is not known.
        baseline: What stands for nothing; None for what each metric has by default.
        steps: Of a curve.
        samples: How many rectangles an explanation predicts the effect of.
        batch_size: How many changed versions of a sample run in one pass.
        seed: Of whatever is random.
    """

    model: nn.Module
    inputs: Inputs
    target: Target
    output: OutputLike
    explain: Explain
    found: Any
    maps: Maps
    seconds: float
    regions: Mapping[str, Bool[Tensor, "b ..."]] | None = None
    baseline: Baseline | Mapping[str, Baseline] | None = None
    steps: int = 20
    samples: int = 100
    batch_size: int = 32
    seed: int = 0

    @property
    def compares(self) -> bool:
        """Whether the maps of several inputs compare; of one input there is nothing to compare."""
        return self.maps.comparable or len(self.maps) == 1

    @property
    def places(self) -> dict[str, Bool[Tensor, "b ..."]]:
        """The regions as masks of the size of each map; all of an input that has none lies outside.

        Raises:
            MulticamError: If there are none, or they do not fit the maps.
        """
        if self.regions is None:
            raise MulticamError("nothing says where the evidence is: give Batch(inputs, regions={input: masks})")
        for name in self.regions:
            if name not in self.maps:
                raise MulticamError(
                    f"there is no map of input {name!r}, which has a region; there are: {', '.join(map(repr, self.maps))}"
                )
        found = {}
        for name, m in self.maps.items():
            region = self.regions.get(name)
            found[name] = torch.zeros_like(m, dtype=torch.bool) if region is None else region.to(m.device)
            if found[name].shape != m.shape:
                raise MulticamError(
                    f"the regions {tuple(found[name].shape)} of input {name!r} are not as large as its maps {tuple(m.shape)}"
                )
        return found

    @property
    def truth(self) -> list[str]:
        """The only input of each sample that has a region.

        Raises:
            MulticamError: If a sample has none, or several.
        """
        held = {name: region.flatten(1).any(1).tolist() for name, region in self.places.items()}
        several = [[name for name in held if held[name][i]] for i in range(self.inputs.batch)]
        for i, names in enumerate(several):
            if len(names) != 1:
                raise MulticamError(
                    f"sample {i} has regions in {len(names)} inputs; to name an input, one alone must hold the evidence"
                )
        return [name for [name] in several]

    @cached_property
    def masked(self) -> Masked:
        """The probability of a class, or the score of any other target, of the inputs and of what is seen through their maps."""
        target = Probability(self.target.index) if isinstance(self.target, ClassScore) else self.target
        return seen_through(self.model, self.inputs, self.maps, target, output=self.output)

    @cached_property
    def infidelity(self) -> Infidelity:
        """What is predicted for random rectangles, and what happens."""
        found = self.found if isinstance(self.found, Attributions) else self.maps.on_one_scale()
        options = _baseline(self) | _options(self)
        return infidelity(self.model, self.inputs, found, self.target, samples=self.samples, **options)


@dataclass(frozen=True)
class Metric:
    """A measure of explanations, with a name.

    Args:
        name: What a table calls it.
        measure: From an `Explained` to a number for each sample `(b)`; NaN where it has no meaning.
        better: Whether more of it is better (`"up"`) or less (`"down"`); None if neither is.
        about: What it tells, for whoever looks for one in a list.

    Example:
        >>> Metric("share of depth", lambda explained: explained.maps.shares()[:, 1])
        Metric(name='share of depth', better=None)
    """

    name: str
    measure: Callable[[Explained], Shaped[Tensor, " b"]] = field(repr=False)
    better: Better = None
    about: str = field(default="", repr=False)


def _options(e: Explained) -> dict[str, Any]:
    return {"output": e.output, "batch_size": e.batch_size, "seed": e.seed}


def _baseline(e: Explained) -> dict[str, Any]:
    return {} if e.baseline is None else {"baseline": e.baseline}


def _area(curve: Callable[..., Curve]) -> Callable[[Explained], Tensor]:
    """The area under a curve that leads to or from a baseline."""
    return lambda e: curve(e.model, e.inputs, e.maps, e.target, steps=e.steps, **_baseline(e), **_options(e)).area


def _imputed(order: Literal["most", "least"]) -> Callable[[Explained], Tensor]:
    """The area under a curve of ROAD."""
    return lambda e: road(e.model, e.inputs, e.maps, e.target, order=order, steps=e.steps, **_options(e)).area


def _randomization(e: Explained) -> Tensor:
    """The mean agreement with the maps of randomised copies, over their stages and the inputs."""
    found = parameter_randomization(e.model, e.inputs, e.explain, e.target, output=e.output, seed=e.seed)
    # A map turned into its opposite depends on the old one as much as one that stayed.
    return torch.stack(list(found.agreement.values())).abs().nanmean((0, 1))


def _named(e: Explained) -> Tensor:
    """Whether the input is named right; a method that explains one of several inputs names none."""
    right = names_input(e.maps, e.truth).float()
    return torch.full_like(right, torch.nan) if len(e.maps) == 1 < len(e.inputs.images) else right


def _beside(values: Mapping[str, Tensor]) -> Shaped[Tensor, "b 1 n"]:
    """The places of all inputs, as one map."""
    return torch.cat([x.flatten(1) for x in values.values()], 1)[:, None]


def _evidence(maps: Maps) -> Float[Tensor, "b 1 n"]:
    """The evidence in each place of all inputs: a density times the share of its input's area."""
    return _beside({name: m / m[0].numel() for name, m in maps.items()})


def _over_inputs(measure: Callable[[Explained], Tensor]) -> Callable[[Explained], Tensor]:
    """The measure, without meaning where maps of several inputs do not compare."""

    def measured(e: Explained) -> Tensor:
        values = measure(e).float()
        return values if e.compares else torch.full_like(values, torch.nan)

    return measured


def _within(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Explained], Tensor]:
    """The measure in the map of each sample's own input, the mean if several inputs have regions."""

    def measured(e: Explained) -> Tensor:
        values, held = [], []
        for name, region in e.places.items():
            there = region.flatten(1).any(1)
            # Of samples without a region here everything is inside, and nothing of it counts.
            values.append(measure(e.maps[name], region | ~there.view(-1, *[1] * (region.ndim - 1))).float())
            held.append(there)
        counts = torch.stack(held).sum(0)
        if (counts == 0).any():
            raise MulticamError(
                f"sample {int((counts == 0).nonzero()[0])} has no region in any input: nothing can point into it"
            )
        return (torch.stack(values) * torch.stack(held)).sum(0) / counts

    return measured


METRICS = {
    metric.name: metric
    for metric in (
        Metric("deletion", _area(deletion), "down", "the score while the marked places go"),
        Metric("insertion", _area(insertion), "up", "the score while the marked places come"),
        Metric("road", _imputed("most"), "down", "ROAD: the score while neighbours replace the most relevant places"),
        Metric(
            "road least", _imputed("least"), "up", "ROAD: the score while neighbours replace the least relevant places"
        ),
        Metric(
            "average drop",
            lambda e: e.masked.drop,
            "down",
            "the share of the probability that is lost when the inputs are seen through the maps",
        ),
        Metric(
            "increase",
            lambda e: e.masked.increased,
            "up",
            "how often the probability rises when the inputs are seen through the maps",
        ),
        Metric(
            "infidelity",
            lambda e: e.infidelity.scaled,
            "down",
            "how far what maps predict for random rectangles is from what happens",
        ),
        Metric(
            "correlation",
            lambda e: e.infidelity.correlation,
            "up",
            "how well what maps predict for random rectangles goes with what happens",
        ),
        Metric(
            "sensitivity",
            lambda e: sensitivity(e.model, e.inputs, e.explain, e.target, output=e.output, seed=e.seed),
            "down",
            "how much maps change under slight noise",
        ),
        Metric("randomization", _randomization, "down", "how much maps stay the same as the weights become random"),
        Metric(
            "pointing",
            _over_inputs(lambda e: pointing_game(_beside(e.maps), _beside(e.places))),
            "up",
            "whether the peak of all maps lies in a region",
        ),
        Metric("pointing within", _within(pointing_game), "up", "the same in the map of the input that has the region"),
        Metric(
            "energy",
            _over_inputs(lambda e: energy_inside(_evidence(e.maps), _beside(e.places))),
            "up",
            "how much of the positive evidence of all maps lies in a region",
        ),
        Metric("energy within", _within(energy_inside), "up", "the same in the map of the input that has the region"),
        Metric(
            "names input",
            _over_inputs(_named),
            "up",
            "whether the input that has the region is the one with the most positive evidence",
        ),
        Metric(
            "sparseness",
            lambda e: sparseness(_evidence(e.maps.on_one_scale())),
            "up",
            "how few places hold the evidence, as a Gini index",
        ),
        Metric(
            "complexity",
            lambda e: complexity(_evidence(e.maps.on_one_scale())),
            "down",
            "over how many places the evidence is spread, as an entropy",
        ),
        Metric(
            "seconds",
            lambda e: torch.full((e.inputs.batch,), e.seconds),
            "down",
            "how long the explanation of a sample takes",
        ),
    )
}
