"""Which of several methods explains a model best, over a data set, and how sure that is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from multicam.call.baselines import Baseline
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError, at_least_one, out_of_memory, unknown
from multicam.maps import Maps
from multicam.metrics.explanations import Explain, named_maps, refuse_not_finite, refuse_uncallable
from multicam.metrics.measures import METRICS, Explained, Metric
from multicam.metrics.ranking import Evaluation
from multicam.printing import progress
from multicam.watch.trace import Trace


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples to evaluate methods on.

    Args:
        inputs: What the model takes, see `Inputs.of`.
        target: What is explained, as for the call of a `CAM`; None: the class that the model chooses for each sample.
        regions: Where the evidence is known to be: masks `(b h w)` by input, each of its input's size, or one for the only image
            input. Of a sample whose evidence lies in one input, the masks of the others are empty, or left out.

    Example:
        >>> inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 4, 4)}
        >>> batch = Batch(inputs, target=3, regions={"depth": torch.ones(2, 4, 4, dtype=torch.bool)})
    """

    inputs: Any
    target: TargetLike = None
    regions: Mapping[str, Bool[Tensor, "b ..."]] | Bool[Tensor, "b ..."] | None = None


def evaluate(
    model: nn.Module,
    methods: Mapping[str, Explain],
    metrics: Sequence[str | Metric],
    data: Iterable[Any],
    *,
    output: OutputLike = None,
    baseline: Baseline | Mapping[str, Baseline] | None = None,
    steps: int = 20,
    samples: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> Evaluation:
    """Several methods by several metrics, over all samples of a data set.

    Each method explains each batch once, and every metric judges what it found. All methods explain the same: a class that the
    model chooses is chosen once for each sample.

    Better is more (↑) or less (↓) of:

    - `"deletion"` ↓, `"insertion"` ↑, `"road"` ↓, `"road least"` ↑: the area under the curve of the function of that name, for ROAD
      with the most or the least relevant places first.
    - `"average drop"` ↓, `"increase"` ↑: `drop` and `increased` of `seen_through`; of a class, its probability is taken.
    - `"infidelity"` ↓, `"correlation"` ↑: `scaled` and `correlation` of `infidelity`, for which the scale of a method does not matter.
    - `"sensitivity"` ↓: how much the maps change under noise, see `sensitivity`.
    - `"randomization"` ↓: the mean agreement with the maps of randomised copies, see `parameter_randomization`.
    - `"pointing"` ↑, `"energy"` ↑: whether the peak of all maps lies in a region, and the share of the positive evidence that does;
      `"pointing within"` ↑, `"energy within"` ↑: the same in the map of the input that has the region, whatever the others say.
    - `"names input"` ↑: whether this input is the one with the most positive evidence, see `names_input`.
    - `"sparseness"` ↑, `"complexity"` ↓: how few places hold the evidence, those of all inputs together.
    - `"seconds"` ↓: the time of the explanation of each sample; that of a method's first batch includes what it does only once.

    Where the maps of a method do not compare between inputs (`comparable = False`), its places are ranked together with each map
    divided by the mean of its absolute values; what asks for the right input (`pointing`, `energy`, `names input`) has no meaning then.

    Args:
        model: Any module; it is not changed.
        methods: By a name for each: `gradient` and its like as they are, `explainer(GradCAM, layers)`, or any function of model, inputs
            and target that returns a map for each input.
        metrics: Names of the above, or a `Metric` of your own.
        data: Batches: each a `Batch`, or what the model takes, see `Inputs.of`. They are taken one after the other and not kept.
        output: As for `CAM`; methods have their own, as in `explainer(GradCAM, layers, output="logits")`.
        baseline: What stands for nothing, see `multicam.call.baselines.baselines`. None: what each metric has by itself.
        steps: Of each curve.
        samples: For infidelity and correlation, how many rectangles are covered in each sample.
        batch_size: How many changed versions of a sample run in one pass. It bounds the memory and does not change the result.
        seed: Of whatever is random; the global random state is not used.

    Raises:
        MulticamError: If there is no such metric, no data, or a method fails; the message names it.

    Example:
        >>> from multicam.saliency.gradients import gradient, input_x_gradient
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
        >>> methods = {"gradient": gradient, "input x gradient": input_x_gradient}
        >>> found = evaluate(model, methods, ["deletion", "complexity"], [torch.rand(2, 1, 8, 8), torch.rand(3, 1, 8, 8)])
        >>> found.samples, found.compare("input x gradient", "gradient", "deletion").wins
        (5, 1.0)
    """
    judges = _metrics(metrics)
    _refuse_other_methods(methods)
    if isinstance(data, Batch | Inputs | Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise MulticamError(
            f"data is a list of batches, or another iterable of them, not a {type(data).__name__}; write [batch]"
        )
    options = {
        "output": output,
        "baseline": baseline,
        "steps": at_least_one("steps", steps),
        "samples": at_least_one("samples", samples),
        "batch_size": batch_size,
        "seed": seed,
    }
    found: dict[str, dict[str, list[Tensor]]] = {label: {judge.name: [] for judge in judges} for label in methods}
    apart = set()
    total = len(data) * len(methods) if isinstance(data, Sized) else 0  # which makes a bar without an end
    for i, label, explained in progress(_explained(model, methods, data, options), total, "evaluation"):
        if not explained.compares:
            apart.add(label)
        for judge in judges:
            with _told(f"metric {judge.name!r} of method {label!r}, batch {i}"):
                found[label][judge.name].append(_measured(judge, explained))
    if not next(iter(found.values()))[judges[0].name]:
        raise MulticamError("there is no data to evaluate on: the iterable is empty, or was used up before")
    values = {label: {name: torch.cat(parts) for name, parts in each.items()} for label, each in found.items()}
    return Evaluation(values, {judge.name: judge.better for judge in judges}, frozenset(apart))


def _explained(
    model: nn.Module, methods: Mapping[str, Explain], data: Iterable[Any], options: Mapping[str, Any]
) -> Iterator[tuple[int, str, Explained]]:
    """What each method says of each batch, with the number of the batch and the name of the method.

    Args:
        model, methods, data: As for `evaluate`.
        options: Those of `evaluate`, which metrics read from `Explained`.
    """
    for i, given in enumerate(data):
        batch = given if isinstance(given, Batch) else Batch(given)
        with _told(f"batch {i}"):
            trace = Trace(model, batch.inputs, {}, batch.target, options["output"])
            call, regions = trace.inputs, _regions(trace.inputs, batch.regions)
        names: list[str] | None = None
        for label, explain in methods.items():
            with _told(f"method {label!r}, batch {i}"):
                start = perf_counter()
                found = explain(model, call.own(), trace.target)
                maps = refuse_not_finite(named_maps(found, call))
                if any(m.is_cuda for m in maps.values()):
                    torch.cuda.synchronize()  # it may not have finished
                seconds = (perf_counter() - start) / call.batch
                names = names or sorted(maps)
                _refuse_other_places(maps, call, names)
            yield (
                i,
                label,
                Explained(
                    model=model,
                    inputs=call,
                    target=trace.target,
                    explain=explain,
                    found=found,
                    maps=maps,
                    seconds=seconds,
                    regions=regions,
                    **options,
                ),
            )


def _metrics(metrics: Sequence[str | Metric]) -> tuple[Metric, ...]:
    given = [metrics] if isinstance(metrics, str | Metric) else metrics
    if not isinstance(given, Sequence) or not all(isinstance(metric, str | Metric) for metric in given):
        raise MulticamError(f"metrics are names, or each a Metric(name, measure), in a list, not {given!r}")
    found = []
    for metric in given:
        if isinstance(metric, str) and metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        found.append(METRICS[metric] if isinstance(metric, str) else metric)
    names = [metric.name for metric in found]
    if not names or len({*names}) < len(names):
        raise MulticamError(f"give metrics, each of another name, not {names}")
    return tuple(found)


def _refuse_other_methods(methods: Mapping[str, Explain]) -> None:
    if not isinstance(methods, Mapping) or not methods:
        raise MulticamError(f"give methods by name, as in {{'gradient': gradient}}, not {methods!r}")
    for label, explain in methods.items():
        with _told(f"method {label!r}"):
            refuse_uncallable(explain)


def _refuse_other_places(maps: Maps, call: Inputs, names: list[str]) -> None:
    """Refuse maps of other inputs than another method's, of which neither is better, and maps of another size than their input's."""
    if sorted(maps) != names:
        raise MulticamError(
            f"it explains {', '.join(map(repr, sorted(maps)))}, and another method {', '.join(map(repr, names))}: only methods that explain "
            "the same inputs compare"
        )
    for name, m in maps.items():
        leaf = call.leaves[name]
        if leaf.ndim == 4 and tuple(m.shape) != (call.batch, *leaf.shape[-2:]):
            raise MulticamError(
                f"the map {tuple(m.shape)} of input {name!r} {tuple(leaf.shape)} is not of its size, {(call.batch, *leaf.shape[-2:])}"
            )


def _regions(call: Inputs, regions: Any) -> dict[str, Tensor] | None:
    if regions is None:
        return None
    if isinstance(regions, Tensor):
        if len(call.images) != 1:
            raise MulticamError(
                f"say which input each region lies in, as in {{name: masks}}; there are: {', '.join(map(repr, call.images))}"
            )
        regions = dict.fromkeys(call.images, regions)
    named = {call.name(name): region for name, region in regions.items()}
    for name, region in named.items():
        if not isinstance(region, Tensor) or region.dtype != torch.bool or len(region) != call.batch:
            shown = f"{region.dtype} {tuple(region.shape)}" if isinstance(region, Tensor) else repr(region)
            raise MulticamError(
                f"the regions of input {name!r} are masks (b h w) of {call.batch} samples, of dtype bool, not {shown}"
            )
    return named


def _measured(judge: Metric, explained: Explained) -> Float[Tensor, " b"]:
    values = judge.measure(explained)
    batch = explained.inputs.batch
    if not isinstance(values, Tensor) or tuple(values.shape) != (batch,):
        shown = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
        raise MulticamError(f"it must return one number for each sample, ({batch},), not {shown}")
    return values.detach().float().cpu()


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Whatever goes wrong inside says where."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        what = "" if isinstance(error, MulticamError) else f"{type(error).__name__}: "
        raise MulticamError(f"{where}: {what}{error}") from error
