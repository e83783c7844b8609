"""Class activation maps: what every method promises, and how a map is laid on its input."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Generic, overload

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from multicam.call.inputs import Inputs, as_names
from multicam.call.scorer import OutputLike, TargetLike
from multicam.cam.laying import ONLY, laid, refuse_unseen, shown
from multicam.errors import MulticamError
from multicam.maps import Maps
from multicam.watch.finite import first
from multicam.watch.layers import Layer, LayerLike, Taps
from multicam.watch.placing import Placed
from multicam.watch.trace import Site, Trace
from multicam.watch.undisturbed import unwrapped

LayersLike = LayerLike | Mapping[str, LayerLike]
# What a CAM returns is decided by how it was given its layers, one or a mapping of them, so this is a part of its type; the
# defaults are those of subclasses that say nothing of it. The values of a mapping are objects here, because type checkers
# take a path beside a `Layer` for that, and are checked when they are used.
L = TypeVar("L", bound=LayerLike | Mapping[str, object], covariant=True, default=LayerLike | Mapping[str, object])
# The same for the names of an InputCAM. Without names it returns one map or several, as the call has inputs.
N = TypeVar("N", bound=str | Sequence[str], covariant=True, default=str | Sequence[str])


class CAM(ABC, Generic[L]):
    """A class activation mapping: where in its inputs a model found the evidence for a score.

    A map is a density in units of the score: the method's saliency on the layer's grid times the number of grid cells,
    laid on the input by linear interpolation. Its mean is the evidence found there, so maps of different grids, layers
    and inputs compare, unless the method says that its scale means nothing (`comparable = False`).

    Args:
        model: Any module; it is not changed.
        layers: One layer, or a mapping name -> layer. A layer is a path `"encoder.stage4"`, a call of a shared module
            `"encoder.stage4#1"`, a module, or a `Layer`. A name that is an input's puts the map on that input at its
            own size; `Layer(onto=…)` says it otherwise; a model with one image input needs neither. Other maps stay on
            the layer's grid.
        output: Which part of the model's output the target sees: a path (`"logits"`, `1`) or a callable.

    Raises:
        MulticamError: If a layer does not exist.
    """

    comparable: bool = True
    one_pass: ClassVar[bool] = True  # on any layer, from the one forward and backward pass of a trace

    def __init__(self, model: nn.Module, layers: L, *, output: OutputLike = None) -> None:
        self.model = unwrapped(model)
        self.named = isinstance(layers, Mapping)
        self.layers = named_layers(layers)
        Taps(self.model, list(self.layers.values()))  # refuses layers that do not exist
        self.output = output
        self._placed: set[str] = set()

    @abstractmethod
    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The method's formula: one signed number per grid cell."""

    @overload
    def __call__(self: "CAM[LayerLike]", inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor: ...

    @overload
    def __call__(
        self: "CAM[Mapping[str, object]]", inputs: Any, target: TargetLike = None, *, signed: bool = False
    ) -> Maps: ...

    @overload
    def __call__(self, inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor | Maps: ...

    def __call__(self, inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor | Maps:
        """The map of one layer, or `Maps` with the names of the layers, from one forward and one backward pass.

        Args:
            inputs: What the model takes: a tensor, a tuple of positional or a dict of keyword arguments, or `Inputs`.
            target: None for each sample's top class, a class, one class per sample, or any callable from output to
                scores `(b,)`; see `multicam.call.targets.scores`.
            signed: Keep negative evidence instead of cutting it at zero.

        Returns:
            `(b h w)` on an image input or the layer's grid; `(b d h w)` for volumes, `(b l)` for signals.

        Raises:
            MulticamError: If inputs, layers, target or output do not fit the model; the message says what does.
        """
        maps = self.maps(self.trace(inputs, target), signed=signed)
        return maps if self.named else maps[ONLY]

    def trace(self, inputs: Any, target: TargetLike = None) -> Trace:
        """The forward pass that the maps are made of; the arguments are those of a call."""
        return Trace(self.model, inputs, self.layers, target, self.output)

    def maps(self, trace: Trace, *, signed: bool = False) -> Maps:
        """The maps of every site of a trace."""
        found = {}
        for name, site in trace.sites.items():
            found[name] = self._map(site, signed)
        return Maps(found, self.comparable)

    def _map(self, site: Site, signed: bool) -> Tensor:
        saliency = self.checked(site)
        if not signed:
            _warn_if_negative(type(self).__name__, site, saliency)
        density = saliency * prod(saliency.shape[1:])
        _warn_if_by_axes(type(self).__name__, site)
        if site.name not in self._placed:
            refuse_unseen(site)
            self._placed.add(site.name)
        return laid(density if signed else density.relu(), site)

    def checked(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The saliency, with a warning where it is empty or cancels by construction.

        Raises:
            MulticamError: If it is not finite.
        """
        if not torch.isfinite(site.acts).all():
            raise MulticamError(
                f"the activations of layer {shown(site)!r} are NaN or infinite in sample {first(site.acts)}: take another layer; float16 "
                "weights often overflow, use bfloat16 or float32"
            )
        saliency = self.saliency(site)
        if not torch.isfinite(saliency).all():
            raise MulticamError(
                f"{type(self).__name__} of layer {shown(site)!r} is not finite in sample {first(saliency)}: its numbers overflow (with "
                "float16 weights they often do; use bfloat16 or float32)"
            )
        warn_if_cancelled(type(self).__name__, site)
        return saliency

    def __repr__(self) -> str:
        shown = repr(self.layers if self.named else self.layers[ONLY])
        return f"{type(self).__name__}({type(self.model).__name__}, {shown})"


def named_layers(layers: LayerLike | Mapping[str, Any]) -> dict[str, Layer]:
    """Each layer by the caller's name for it; a single one is called `ONLY`.

    Raises:
        MulticamError: If there is none, or one is no layer.
    """
    named = layers if isinstance(layers, Mapping) else {ONLY: layers}
    if not named:
        raise MulticamError("no layer to explain; list_layers(model, inputs) shows those there are")
    return {str(name): Layer.of(layer) for name, layer in named.items()}


def warn_if_cancelled(method: str, site: Site) -> None:
    """Warn where gradients or activations make a map empty by construction, whatever the model saw."""
    dead = (site.acts.flatten(1) == 0).all(1)
    if dead.any():
        _warn(f"{_of(method, site, dead)} is empty: the layer returns zeros for these inputs")
    if "grads" not in vars(site):  # the method did not read them
        return
    product = site.grads * site.acts
    size = reduce(product.abs(), "b c ... -> b (...)", "sum")
    total = reduce(product, "b c ... -> b (...)", "sum").abs()
    silent = ~dead & (site.grads.flatten(1) == 0).all(1)
    cancelled = ~dead & ~silent & (total.amax(1) <= 1e-3 * size.amax(1)) & (product.shape[1] > 1)
    if silent.any():
        _warn(
            f"{_of(method, site, silent)} is empty: the gradient is zero on the whole grid, so behind this layer the target "
            "reads none of its cells (only a class token, say); take an earlier layer, such as the norm in front of the "
            "last attention"
        )
    if cancelled.any():
        _warn(
            f"{_of(method, site, cancelled)} is meaningless: gradient times activation cancels over the channels of every "
            "cell, because a normalisation follows the layer; take a layer further from it, in front or behind"
        )


def _warn_if_negative(method: str, site: Site, saliency: Float[Tensor, "b *grid"]) -> None:
    flat = saliency.flatten(1)
    negative = (flat.amax(1) <= 0) & (flat.amin(1) < 0)
    if negative.any():
        averaged = (
            ". Averaged gradients do this on a branch that attention reads as keys and values, where HiResCAM and LayerCAM "
            "do not average"
        )
        _warn(
            f"{_of(method, site, negative)} is empty: all its evidence is negative; signed=True shows it"
            + (averaged if "grads" in vars(site) else "")
        )


def _warn_if_by_axes(method: str, site: Site) -> None:
    reshape = site.layer.reshape
    if isinstance(reshape, Placed) and reshape.by_axes:
        _warn(
            f"{method} of layer {shown(site)!r}: where its entries come from was lost on the way (behind a warp, a transform or a sort, or in a thread of the model's own), so by the axes of "
            f"a convolution alone its map is laid on {reshape.onto!r} from corner to corner; take a layer in front of that for places that are followed"
        )


def _of(method: str, site: Site, samples: Bool[Tensor, " b"]) -> str:
    return f"the {method} map of layer {shown(site)!r} for {int(samples.sum())} of {len(samples)} samples"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)


class InputCAM(ABC, Generic[N]):
    """A method with one map for each image input, at the input's own size, as a density like those of `CAM`.

    Args:
        model: Any module; it is not changed.
        inputs: The image input to explain, or several of them; None: all there are.
        output: Which part of the model's output the target sees, as for `CAM`.
    """

    comparable: ClassVar[bool] = True

    def __init__(self, model: nn.Module, inputs: N | None = None, *, output: OutputLike = None) -> None:
        self.model = unwrapped(model)
        self.single = isinstance(inputs, str)
        self.inputs = as_names(inputs)
        self.output = output

    @abstractmethod
    def evidence(self, call: Inputs, names: Sequence[str], target: TargetLike) -> dict[str, Tensor]:
        """The signed density of each named input, on its last axes: `(b h w)`, or `(b d h w)` for volumes."""

    @overload
    def __call__(self: "InputCAM[str]", inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor: ...

    @overload
    def __call__(
        self: "InputCAM[list[str] | tuple[str, ...]]", inputs: Any, target: TargetLike = None, *, signed: bool = False
    ) -> Maps: ...

    @overload
    def __call__(self, inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor | Maps: ...

    def __call__(self, inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor | Maps:
        """The map of one input, or `Maps` by input where several are asked for or there are several.

        Args:
            inputs: What the model takes, see `Inputs.of`.
            target: As for the call of a `CAM`.
            signed: Keep negative evidence instead of cutting it at zero.

        Raises:
            MulticamError: If inputs, target or output do not fit the model; the message says what does.
        """
        call = Inputs.of(inputs).bind(self.model)
        images = list(call.images)
        asked = images if self.inputs is None else list(self.inputs)
        names = [call.name(name) for name in asked]
        wrong = [name for name in names if name not in images]
        if wrong or not names:
            raise MulticamError(
                f"{wrong[0] if wrong else 'nothing'!r} is no image input; the image inputs are: "
                + (", ".join(map(repr, images)) or "none")
            )
        found = self.evidence(call, names, target)
        for name, density in found.items():
            if not torch.isfinite(density).all():
                raise MulticamError(f"{type(self).__name__} of input {name!r} is not finite in sample {first(density)}")
        maps = {short: found[name] if signed else found[name].relu() for short, name in zip(asked, names, strict=True)}
        only = self.single or (self.inputs is None and len(names) == 1)
        return maps[asked[0]] if only else Maps(maps, self.comparable)

    def __repr__(self) -> str:
        shown = "" if self.inputs is None else f", {self.inputs[0] if self.single else list(self.inputs)!r}"
        return f"{type(self).__name__}({type(self.model).__name__}{shown})"
