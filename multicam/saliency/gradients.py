"""Evidence entry by entry, in the space of the inputs, from one backward pass: the gradient, plain and guided."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from multicam.call.inputs import Inputs, as_names, frames_second, wide
from multicam.call.scorer import OutputLike, TargetLike
from multicam.cam.base import CAM, LayersLike
from multicam.cam.laying import ONLY, input_of
from multicam.cam.together import refuse_unmade
from multicam.cam.weighted import GradCAM
from multicam.errors import MulticamError, unknown
from multicam.saliency.attributions import Attributions
from multicam.watch.rectifiers import Rectifiers, Rule
from multicam.watch.reshape import Tokens
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import unwrapped


def gradient(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
) -> Attributions:
    """The gradient of the score by each input, signed; zero for an input that the score does not depend on.

    Simonyan et al. 2013, arXiv:1312.6034, section 3, whose saliency map is `.maps()` of it: the largest absolute value of
    the channels. One forward and one backward pass. The numbers are scores per unit of the input, so two inputs with
    different units do not compare.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes: a tensor, a tuple of positional or a dict of keyword arguments, or `Inputs`.
        target: None for each sample's top class, a class, one class per sample, or any callable from output to
            scores `(b,)`; see `multicam.call.targets.scores`.
        wrt: The input to explain, or several: any tensor that has floating-point values for each sample. None: every
            floating-point image input.
        output: Which part of the model's output the target sees: a path (`"logits"`, `1`) or a callable.

    Raises:
        MulticamError: If inputs, target or output do not fit the model, or the score depends on an input other than by a
            gradient; the message says what does.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> gradient(model, torch.rand(2, 3, 8, 8), target=3)
        Attributions(input: (2, 3, 8, 8), comparable=False)
    """
    trace, names = _differentiated(model, inputs, target, wrt, output)
    return Attributions(named(names, trace.input_grads), trace.scores)


def input_x_gradient(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
) -> Attributions:
    """`x G`: the input times its gradient, in units of the score. Shrikumar et al. 2016, arXiv:1605.01713, section 3.

    The evidence adds up to the score in a model that is linear without biases, and to its first-order part elsewhere.

    Args:
        model, inputs, target, wrt, output: As for `gradient`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
        >>> found = input_x_gradient(model, torch.rand(2, 1, 8, 8), target=3)
        >>> torch.allclose(found.evidence["input"], found.scores, atol=1e-5)
        True
    """
    trace, names = _differentiated(model, inputs, target, wrt, output)
    values = {name: times(wide(trace.inputs.leaves[name]), wide(g)) for name, g in trace.input_grads.items()}
    return Attributions(named(names, values), trace.scores, weights=dict.fromkeys(names, 1.0))


def guided_backprop(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
) -> Attributions:
    """Guided backpropagation: the gradient, through ReLUs only where it and what went into the ReLU are positive.

    Springenberg et al. 2014, arXiv:1412.6806, section 3.4. ReLU and ReLU6 follow the rule, as modules, functions or in
    place, used once or many times; other activations (GELU, SiLU, a `clamp`) have their own gradient. It shows what the
    model can see more than what this class needs (Adebayo et al. 2018, arXiv:1810.03292).

    Args:
        model, inputs, target, wrt, output: As for `gradient`.

    Raises:
        MulticamError: As for `gradient`; or TorchScript compiled a part of the model, where ReLUs cannot be told.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> guided_backprop(model, torch.rand(2, 3, 8, 8), target=3)
        Attributions(input: (2, 3, 8, 8), comparable=False)
    """
    trace, names = _differentiated(model, inputs, target, wrt, output)
    return Attributions(named(names, _ruled(trace, "guided")), trace.scores)


def deconvnet(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    wrt: str | Sequence[str] | None = None,
    output: OutputLike = None,
) -> Attributions:
    """The deconvnet: the gradient, through ReLUs only where it is positive, whatever went into the ReLU.

    Zeiler and Fergus 2013, arXiv:1311.2901, section 2.1, with pooling and all else as in the gradient. What counts as a
    ReLU is said under `guided_backprop`.

    Args:
        model, inputs, target, wrt, output: As for `gradient`.

    Raises:
        MulticamError: As for `gradient` and `guided_backprop`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> deconvnet(model, torch.rand(2, 3, 8, 8), target=3)
        Attributions(input: (2, 3, 8, 8), comparable=False)
    """
    trace, names = _differentiated(model, inputs, target, wrt, output)
    return Attributions(named(names, _ruled(trace, "deconvnet")), trace.scores)


def guided_gradcam(
    model: nn.Module,
    inputs: Any,
    layers: LayersLike,
    target: TargetLike = None,
    *,
    method: type[CAM] = GradCAM,
    output: OutputLike = None,
) -> Attributions:
    """Guided Grad-CAM: guided backpropagation times the map of the same input's own branch.

    Selvaraju et al. 2017, arXiv:1610.02391, section 3.2. Two forward and two backward passes. The numbers have no units.

    Args:
        model, inputs: As for `gradient`.
        layers: A layer for each input by the input's name, as for `CAM`; a model with one image input needs no name.
        target: As for `gradient`.
        method: The method of the map.
        output: As for `gradient`.

    Raises:
        MulticamError: As for `gradient` and `CAM`; or a layer is named for no input.

    Example:
        >>> import torch
        >>> from multicam import HiResCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        >>> guided_gradcam(model, torch.rand(2, 3, 8, 8), "0", target=3, method=HiResCAM)
        Attributions(input: (2, 3, 8, 8), comparable=False)
    """
    refuse_unmade(method, CAM, layers, output=output)
    cam = method(model, layers, output=output)
    trace = cam.trace(inputs, target)
    names: dict[str, str] = {}
    for name, site in trace.sites.items():
        onto, _ = input_of(site, trace.inputs)
        if onto is None:
            raise MulticamError(
                f"say which input the layer {trace.paths[name]!r} belongs to, as in {{'rgb': {trace.paths[name]!r}}}; the image "
                f"inputs are: {', '.join(map(repr, trace.inputs.images)) or 'none'}"
            )
        names[onto if name == ONLY else name] = onto
    maps = dict(zip(names, cam.maps(trace).values(), strict=True))
    guided = Trace(model, trace.inputs, {}, trace.target, output, list(names.values()))
    values = named(names, _ruled(guided, "guided"))
    of_tokens = [isinstance(layer.reshape, Tokens) for layer in cam.layers.values()]
    weights = {name: _per_channel(maps[name], values[name], by) for name, by in zip(names, of_tokens, strict=True)}
    return Attributions({name: values[name] * weights[name] for name in names}, trace.scores)


def _differentiated(
    model: nn.Module, inputs: Any, target: TargetLike, wrt: str | Sequence[str] | None, output: OutputLike
) -> tuple[Trace, dict[str, str]]:
    """The pass that can be differentiated, and the full names of the explained inputs by what the caller calls them."""
    names = explained(model, inputs, wrt)
    return Trace(model, inputs, {}, target, output, list(names.values())), names


def explained(
    model: nn.Module, inputs: Any, wrt: str | Sequence[str] | None, *, need_floating: bool = True
) -> dict[str, str]:
    """The full names of the inputs to explain, by what the caller calls them; None: every image input.

    Raises:
        MulticamError: If there is none, or one has no value for each sample.
    """
    call = Inputs.of(inputs).bind(unwrapped(model))
    images = [
        name for name, leaf in call.images.items() if leaf.is_floating_point() or leaf.is_complex() or not need_floating
    ]
    asked = as_names(wrt)
    names = {name: call.name(name) for name in (images if asked is None else asked)}
    if not names:
        what = "floating-point image" if need_floating else "image"
        raise MulticamError(f"there is no {what} input to explain in {call!r}; name other inputs with wrt=…")
    for name, full in names.items():
        if full not in call.batched:
            raise unknown("input with a value for each sample", name, call.batched)
    return names


def named(names: Mapping[str, str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by what the caller calls the inputs, in single precision at least."""
    return {name: wide(values[full]) for name, full in names.items()}


def _ruled(trace: Trace, rule: Rule) -> dict[str, Tensor]:
    with Rectifiers(rule) as rectifiers:
        found = trace.input_grads
    if rectifiers.compiled:
        raise MulticamError(
            f"TorchScript compiled a part of this {type(trace.model).__name__}, where ReLUs cannot be told from other operations; "
            "explain the model that the script was made of, or take the gradient"
        )
    if not rectifiers.met:
        warnings.warn(
            f"no gradient passed a ReLU of {type(trace.model).__name__}, so this is the plain gradient: the {rule} rule has no "
            "meaning for other activations",
            stacklevel=3,
        )
    return found


def times(x: Tensor, gradient: Tensor) -> Tensor:
    """`x G`; for complex numbers the first-order change of the score, which is real."""
    return (x.conj() * gradient).real if gradient.is_complex() else x * gradient


def _per_channel(map: Tensor, values: Tensor, of_tokens: bool) -> Tensor:
    """A map on axes that broadcast against the attributions of its input."""
    if of_tokens and values.ndim == 3 and map.shape == values.shape[:2]:
        return map[:, :, None]  # features (b n c), one cell for each
    if values.ndim == 5 and map.ndim == 4:
        return map[:, :, None] if frames_second(values, map.shape[1]).shape != values.shape else map[:, None]
    return map.view(len(map), *[1] * (values.ndim - map.ndim), *map.shape[1:])
