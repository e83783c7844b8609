"""Any algorithm of captum on a model with any inputs, by the inputs' names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.inputs import wide
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError, unknown
from multicam.saliency.attributions import Attributions
from multicam.saliency.gradients import explained
from multicam.watch.finite import Asked, How
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import find_module, undisturbed

CHANGED = How("as captum changed it", "give captum another baseline (baselines=…), if the algorithm takes one")
OURS = {"inputs", "target", "additional_forward_args"}  # of `attribute`, which are given by other names here


def captum_attribution(
    algorithm: str | Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
    **options: Any,
) -> Any:
    """What an algorithm of captum says about named inputs of a model that takes anything.

    Captum takes tensors by position and calls the model with them; here it gets those that are explained, while all
    others, text, masks and nested containers included, follow the rows that it makes of them. The target is ours.

    Args:
        algorithm: The name of a class in `captum.attr`, the class, or a function from a model to an algorithm, such as
            `lambda model: NoiseTunnel(Saliency(model))`.
        model: Any module; it is not changed.
        inputs, target: As for `gradient`.
        wrt: The input to explain, or several: any tensor with values for each sample, integers where the algorithm can.
            None: every image input.
        output: As for `gradient`.
        **options: What the algorithm's constructor or its `attribute` takes, in captum's words. Wherever captum takes a tuple
            with an item for each input, a dict by name does; a layer may be given by its path.

    Returns:
        `Attributions`, without units as captum says nothing about them. Where captum returns more (a convergence delta), a
        tuple of these and the rest; where its result has other shapes (a layer's), what captum returns.

    Raises:
        MulticamError: Captum is missing, there is no such algorithm, option or input, or the call does not fit the model.

    Example:
        >>> model = nn.Bilinear(3, 3, 5)
        >>> inputs = {"input1": torch.rand(2, 3), "input2": torch.rand(2, 3)}
        >>> captum_attribution("FeatureAblation", model, inputs, 3, wrt=["input1", "input2"], baselines={"input1": 0.0, "input2": 1.0})
        Attributions(input1: (2, 3), input2: (2, 3), comparable=False)
    """
    make = _algorithm(algorithm)
    first, *takes = signature(make).parameters if isinstance(make, type) else ("model",)
    if first in ("attribution_method", "attr_method"):
        raise MulticamError(
            f"{algorithm!r} is made of another algorithm, not of a model: give a function, such as "
            "lambda model: NoiseTunnel(Saliency(model))"
        )
    names = explained(model, inputs, wrt, need_floating=False)
    trace = Trace(model, inputs, {}, target, output)
    leaves = {name: trace.inputs.leaves[full] for name, full in names.items()}
    tensors = tuple(x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()) for x in leaves.values())
    options = {key: _option(key, value, trace, names) for key, value in options.items()}
    building = {key: options.pop(key) for key in list(options) if key in takes}
    with undisturbed(trace.model, graph=True), _connected(trace.model):
        view = _Positional(trace, list(names.values()))
        _refuse_misfit(make, view, **building)
        attribution = make(view, **building)
        if not hasattr(attribution, "attribute"):
            raise MulticamError(f"the function of an algorithm returns one of captum's, not {attribution!r}")
        known = {k: p for k, p in signature(attribution.attribute).parameters.items() if k not in OURS}
        for key in options:
            if key not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise unknown(f"option of {type(attribution).__name__}", key, [*takes, *known])
        _refuse_misfit(attribution.attribute, tensors, **options)
        # Captum repeats additional arguments as it repeats the inputs, so the samples' numbers tell which row is whose.
        samples = torch.arange(trace.inputs.batch, device=tensors[0].device)
        try:
            found = attribution.attribute(tensors, additional_forward_args=(samples,), **options)
        except RuntimeError as error:
            if "not have been used in the graph" not in str(error):
                raise
            raise MulticamError(
                f"captum needs a gradient by every explained input, and one of {', '.join(map(repr, names))} has none: the score "
                "does not depend on it, or something behind it is detached; name the other inputs with wrt=…"
            ) from error
    return _by_name(found, leaves, trace.scores)


@contextmanager
def _connected(model: nn.Module) -> Iterator[None]:
    """Parameters that need a gradient, none of which is computed; modules have no more attributes afterwards.

    DeepLift hangs its rule on the tensors of every layer, also where no explained input leads, and leaves them on the
    modules where it is interrupted.
    """
    attributes = [(vars(module), set(vars(module))) for module in model.modules()]
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for found, before in attributes:
            for name in found.keys() - before:
                del found[name]


class _Positional(nn.Module):
    """The model as captum sees it: tensors by position, then the sample of each row; returns scores."""

    def __init__(self, trace: Trace, names: Sequence[str]) -> None:
        super().__init__()
        self.model = trace.model
        self.trace = trace
        self.call = trace.settled  # before captum hangs hooks on the model
        self.names = names

    def forward(self, *args: Tensor) -> Tensor:
        *tensors, numbers = args
        samples = numbers.tolist()
        values = dict(zip(self.names, tensors, strict=True))
        call = self.call.take(samples).own().replace(values)
        # A copy, because a model may write into its inputs.
        returned = call.map(lambda name, leaf: leaf.clone() if name in self.names else leaf).run(self.model)
        asked = Asked(self.trace.model, self.trace.inputs, self.trace.scorer)
        return asked.check_changed(self.trace.scores_of(returned, samples), values, samples, CHANGED)


def _refuse_misfit(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Refuse a call that Python would refuse, such as one without a layer."""
    try:
        signature(call).bind(*args, **options)
    except TypeError as error:
        raise MulticamError(f"{getattr(call, '__qualname__', call)} takes{signature(call)}: {error}") from None


def _algorithm(algorithm: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(algorithm, str):
        if not callable(algorithm):
            raise MulticamError(f"an algorithm is a name or class of captum.attr, or a function, not {algorithm!r}")
        return algorithm
    try:
        import captum.attr
    except ImportError as error:
        raise MulticamError("the algorithms of captum need it: pip install captum") from error
    known = {name: value for name, value in vars(captum.attr).items() if hasattr(value, "attribute")}
    if algorithm not in known:
        raise unknown("algorithm in captum.attr", algorithm, known)
    found: Callable[..., Any] = known[algorithm]
    return found


def _option(key: str, value: Any, trace: Trace, names: Mapping[str, str]) -> Any:
    """An option in captum's terms: a tuple for a dict by name, a module for a path."""
    if key == "layer" and isinstance(value, str):
        return find_module(trace.model, value)
    if not isinstance(value, Mapping):
        return value
    given = {trace.inputs.name(str(name)): item for name, item in value.items()}
    for full in given:
        if full not in names.values():
            raise unknown("explained input", full, names.values())
    for full in names.values():
        if full not in given:
            raise MulticamError(f"{key} by name needs one for each explained input: {full!r} has none")
    return tuple(given[full] for full in names.values())


def _by_name(found: Any, leaves: Mapping[str, Tensor], scores: Tensor) -> Any:
    """What captum returned, with names on what lies on the inputs."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], tuple):
        return _by_name(found[0], leaves, scores), found[1]
    shapes = [x.shape for x in leaves.values()]
    if not isinstance(found, tuple) or [getattr(x, "shape", None) for x in found] != shapes:
        return found
    return Attributions({name: wide(x.detach()) for name, x in zip(leaves, found, strict=True)}, scores)
