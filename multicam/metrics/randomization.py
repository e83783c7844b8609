"""Does an explanation depend on what the model has learned: maps of the model beside those of randomised copies."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.chance import seeded
from multicam.errors import MulticamError, out_of_memory
from multicam.maps import Maps
from multicam.metrics.explanations import Explain, explained_maps, refuse_not_finite
from multicam.metrics.localization import agreement
from multicam.printing import aligned, progress
from multicam.watch.layer_table import list_layers
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import LOCK, find_module, undisturbed, unwrapped

# The path of a module, and the names of those of its parameters that belong to no later module as well.
Stage = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Randomization:
    """How much the maps of randomised copies of a model are like its own.

    Attributes:
        stages: The modules in the order in which they were randomised; `""` is the model's own parameters.
        agreement: For each input, Spearman's rank correlation of the map after each stage and the map before `(stages b)`: 1 where
            nothing changed, near 0 where nothing is left. NaN where there is no finite map.
        scores: The randomised scores of the target `(stages b)`.
        before: The scores of the model as it is `(b)`.
    """

    stages: tuple[str, ...]
    agreement: dict[str, Float[Tensor, "stages b"]]
    scores: Float[Tensor, "stages b"]
    before: Float[Tensor, " b"]

    @property
    def mean(self) -> dict[str, Float[Tensor, " stages"]]:
        """The mean agreement of the samples, by input.

        Example:
            >>> values = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
            >>> Randomization(("head", "stem"), {"rgb": values}, values, values[0]).mean
            {'rgb': tensor([0.7500, 0.2500])}
        """
        return {name: values.mean(1) for name, values in self.agreement.items()}

    def __repr__(self) -> str:
        rows = [
            ["randomised", "score", *self.mean],
            ["-", f"{self.before.mean():.4g}", *["1.00"] * len(self.agreement)],
        ]
        for i, stage in enumerate(self.stages):
            means = [f"{mean[i]:.2f}" for mean in self.mean.values()]
            rows.append([stage or "(model)", f"{self.scores[i].mean():.4g}", *means])
        return aligned(rows)


def parameter_randomization(
    model: nn.Module,
    inputs: Any,
    explain: Explain,
    target: TargetLike = None,
    *,
    order: Literal["cascading", "independent"] = "cascading",
    within: str | Sequence[str] | None = None,
    output: OutputLike = None,
    seed: int = 0,
) -> Randomization:
    """How the maps change as the model's parameters are made random, from the output to the input: what does not change is no explanation.

    Adebayo et al. 2018, arXiv:1810.03292, section 3. The modules of a copy of the model that have parameters of their own are taken in the
    order of their last use, the last first, and one that calls others after these. A module that can is reset as PyTorch initialises it
    (`reset_parameters`, which gives a batch norm its initial statistics, too); the entries of any other's parameters are shuffled. A module
    that is used several times, or a parameter of several modules, is one. After each stage the maps of the same target are made again, and
    compared with those of the model by their ranks (`agreement`), signs and all.

    With `within` only a part is randomised: of a model with several inputs, the branch of one (`branch_of`). Its own map should then
    change; whether others do says if they depend on what this branch finds.

    Where the randomised model has no finite map the agreement is NaN; a warning says why if the method refused to make one.

    Args:
        model: Any module; it is not changed, and neither is the global random state. The copy takes its memory once more.
        inputs: What it takes, see `Inputs.of`.
        explain: What makes the maps, such as `gradient` or `explainer(GradCAM, layers)`. It is called with the copy, so it must use the
            model that it is given, and name layers by their paths.
        target: As for the call of a `CAM`; a top class is that of the model as it is.
        order: `"cascading"`, each stage on top of those before, or `"independent"`, each alone.
        within: The path of the module whose parts are randomised, or several paths. None: the whole model.
        output: As for `CAM`, for the score; `explain` has its own.
        seed: Of the parameters.

    Raises:
        MulticamError: If the model cannot be copied, a path does not exist, nothing has parameters, or inputs, explanation and target do
            not fit each other.

    Example:
        >>> from multicam.saliency.gradients import gradient
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> found = parameter_randomization(model, torch.rand(2, 3, 8, 8), gradient)
        >>> found.stages, found.agreement["input"].shape
        (('3', '0'), torch.Size([2, 2]))
    """
    if order not in ("cascading", "independent"):
        raise MulticamError(f"order is 'cascading' or 'independent', not {order!r}")
    call = Inputs.of(inputs).bind(unwrapped(model))  # refuses what no pass can take, before it is copied
    copy = _copied(model)
    trace = Trace(copy, call, {}, target, output)
    stages = _stages(copy, trace.inputs, within)
    maps = refuse_not_finite(explained_maps(explain, copy, trace.inputs, trace.target))
    scores, alike = [], []
    for stage in progress(stages, len(stages), "randomization"):
        if order == "independent":
            copy = _copied(model)
        _randomize(copy, stage, seed)
        # No trace, which would refuse a score that is not finite; what randomised weights make of the inputs is told as it is.
        with undisturbed(copy, graph=False, call=trace.inputs) as memory:
            scores.append(trace.scorer.of(memory.call.run(copy), trace.inputs.batch).cpu())
        alike.append(_agreement(maps, explain, copy, trace, stage))
    return Randomization(
        tuple(path for path, _ in stages),
        {name: torch.stack([found[name] for found in alike]) for name in maps},
        torch.stack(scores),
        trace.scores.cpu(),
    )


def branch_of(model: nn.Module, inputs: Any, name: str) -> tuple[str, ...]:
    """The paths of the modules that see one input and no other: its branch, up to where inputs meet; without the parts of each.

    Args:
        model: As for `parameter_randomization`, but nothing is copied.
        inputs: As for `parameter_randomization`.
        name: The input; one of floating-point values.

    Raises:
        MulticamError: If there is no such input, or no such module: the input may share its encoder with another.

    Example:
        >>> class Sum(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rgb, self.depth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(1, 4, 3)
        ...     def forward(self, rgb, depth):
        ...         return (self.rgb(rgb) + self.depth(depth)).mean((2, 3))
        >>> branch_of(Sum(), {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}, "rgb")
        ('rgb',)
    """
    model = unwrapped(model)
    call = Inputs.of(inputs).bind(model)
    full = call.name(name)
    seen: dict[str, set[str]] = {}
    for info in list_layers(model, call):
        seen.setdefault(_path(info.path), set()).update(info.sees)
    alone = [path for path, sees in seen.items() if sees == {full}]
    if not alone:
        raise MulticamError(
            f"no module sees input {full!r} and no other; list_layers(model, inputs) shows what each sees, and within=… takes any paths"
        )
    return tuple(path for path in alone if not any(path.startswith(f"{other}.") for other in alone))


def _copied(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    try:
        # Nobody's hooks and flags are copied with it, and TorchScript's parameters not as results of the old ones.
        with LOCK, torch.no_grad():
            return deepcopy(model)
    except Exception as error:  # what a model holds that cannot be copied raises anything
        if out_of_memory(error):
            raise
        raise MulticamError(
            f"{type(model).__name__} cannot be copied, and only a copy is randomised ({error}); tensors that were computed, open files and "
            "locks that it holds as attributes are the usual reason"
        ) from error


def _stages(model: nn.Module, call: Inputs, within: str | Sequence[str] | None) -> list[Stage]:
    roots: Sequence[str] = ("",) if within is None else (within,) if isinstance(within, str) else within
    if not isinstance(roots, Sequence):  # callers without a type checker
        raise MulticamError(f"within=… takes the paths of modules, such as 'encoder.rgb', not a {type(roots).__name__}")
    inside = {id(module) for root in roots for module in find_module(model, root).modules()}
    last = {_path(info.path): i for i, info in enumerate(list_layers(model, call))}

    def used(path: str) -> int:
        """When a module is used last, in the order in which modules return."""
        parts = [i for other, i in last.items() if not path or other.startswith(f"{path}.")]
        if parts:  # its own parameters are positions and class tokens more often than anything else
            return min(parts)
        return last[path] if path in last else used(path.rpartition(".")[0]) if path else -1

    modules = sorted(model.named_modules(), key=lambda named: (-used(named[0]), -named[0].count(".") - bool(named[0])))
    met: set[int] = set()
    stages = []
    for path, module in modules:
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in met}
        if own and id(module) in inside:
            met.update(map(id, own.values()))
            stages.append((path, tuple(own)))
    if len(stages) > 1 and not any(path in last for path, _ in stages):
        raise MulticamError(
            f"no module of {type(model).__name__} that has parameters is called, as where TorchScript or torch.export runs it, so that "
            "none comes last: explain the module that it was made of, or randomise one of them, within=…"
        )
    if not stages:
        raise MulticamError(
            f"nothing in {', '.join(map(repr, roots))} of {type(model).__name__} has parameters to randomise"
        )
    return stages


def _randomize(model: nn.Module, stage: Stage, seed: int) -> None:
    path, names = stage
    module = model.get_submodule(path)
    # The module's place in the model: the same values whatever else is randomised.
    generator = seeded(seed, [other for other, _ in model.named_modules()].index(path))
    own = dict(module.named_parameters(recurse=False))  # TorchScript gives none by name
    before = {name: own[name].detach().clone() for name in names}
    whole = len(names) == len(list(module.parameters(recurse=False))) and not any(module.children())
    if whole and hasattr(module, "reset_parameters"):
        # On the CPU, which has one generator to restore: the same values on every device.
        fresh = deepcopy(module).cpu()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(generator.initial_seed())
            fresh.reset_parameters()  # type: ignore[operator]
        module.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        for name, values in before.items():
            parameter = own[name]
            if torch.equal(parameter, values):  # nothing reset it
                shuffled = torch.randperm(values.numel(), generator=generator, device="cpu").to(values.device)
                parameter.copy_(values.flatten()[shuffled].view(values.shape))


def _agreement(maps: Maps, explain: Explain, model: nn.Module, trace: Trace, stage: Stage) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that maps are empty is what the numbers say
            found = explained_maps(explain, model, trace.inputs, trace.target)
    except MulticamError as error:
        warnings.warn(f"with {stage[0]!r} randomised there is no map to compare: {error}", stacklevel=3)
        found = Maps({name: torch.full_like(m, torch.nan) for name, m in maps.items()})
    alike = {}
    for name, m in maps.items():
        finite = found[name].flatten(1).isfinite().all(1)
        alike[name] = torch.where(finite, agreement(m, found[name].nan_to_num()), torch.nan).cpu()
    return alike


def _path(label: str) -> str:
    """The path of a layer without the number of its call."""
    return label.partition("#")[0]
