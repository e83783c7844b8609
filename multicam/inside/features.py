"""What the inside of a model looks like: the maps that a layer returns, and the kernels that it looks through."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.convolved import Convolved
from multicam.watch.layers import LayerLike, Tap, Taps
from multicam.watch.survey import located
from multicam.watch.undisturbed import module_paths, undisturbed, unwrapped

Kind = Literal["dense", "depthwise", "grouped", "pointwise"]
_Convolution = nn.modules.conv._ConvNd


@overload
def feature_maps(model: nn.Module, inputs: Any, layers: LayerLike) -> Float[Tensor, "b c *grid"]: ...


@overload
def feature_maps(model: nn.Module, inputs: Any, layers: Mapping[str, LayerLike]) -> dict[str, Tensor]: ...


def feature_maps(
    model: nn.Module, inputs: Any, layers: LayerLike | Mapping[str, LayerLike]
) -> Tensor | dict[str, Tensor]:
    """What a layer returns, as `(b c *grid)`, or what several do, by name, from one forward pass without a graph.

    The model runs in evaluation mode. The maps are copies in float32 (float64 where the layer's are), which no operation
    behind the layer reaches.

    Args:
        model: Any module; it is not changed.
        inputs: What the model takes, see `Inputs.of`.
        layers: One layer, or a mapping name -> layer; see `Layer` for all that can be said of one.

    Raises:
        MulticamError: If inputs or layers do not fit the model, or nothing proves how a layer's output is a grid.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))
        >>> maps = feature_maps(model, torch.rand(2, 3, 8, 8), {"before": "0", "after": "1"})
        >>> maps["before"].shape, torch.equal(maps["before"].relu(), maps["after"])
        (torch.Size([2, 4, 6, 6]), True)
    """
    if isinstance(layers, Mapping):
        return _observed(unwrapped(model), inputs, layers)
    return _observed(unwrapped(model), inputs, {"": layers})[""]


def _observed(model: nn.Module, inputs: Any, layers: Mapping[str, LayerLike]) -> dict[str, Tensor]:
    if not layers:
        raise MulticamError("no layer to look at; list_layers(model, inputs) shows those there are")
    call = Inputs.of(inputs).bind(model)
    batch, found_layers = call.batch, located(model, call, layers)
    found: dict[int, Tensor] = {}

    def keep(i: int, tap: Tap, x: Tensor) -> Tensor:
        found[i] = tap.grid(x, batch).clone()  # what is behind the layer may write into its output
        return x

    taps = Taps(model, list(found_layers.values()))
    with undisturbed(model, graph=False, call=call) as memory, taps.observe(keep):
        memory.call.run(model)
    return {name: found[i] for i, name in enumerate(layers)}


@dataclass(frozen=True, eq=False)
class Kernels:
    """The weights of a convolution, and which of its input channels each output channel reads.

    Attributes:
        weights: `(out in *k)`, where `in` counts the input channels of one group: output channel `o` reads the channels
            from `in * (o // (out / groups))` on. A transposed convolution has them in the same order; its weights are
            what one cell of an input channel adds to an output channel.
        groups: Into how many groups the channels fall, none of which reads another.

    Raises:
        MulticamError: If these are no kernels, or the groups do not divide them.

    Example:
        >>> Kernels(torch.rand(8, 1, 3, 3), groups=8)
        Kernels(8 x 1 x 3 x 3, depthwise)
    """

    weights: Float[Tensor, "out in *k"]
    groups: int = 1

    def __post_init__(self) -> None:
        shape = tuple(self.weights.shape)
        if len(shape) < 3 or not self.weights.is_floating_point() or 0 in shape:
            raise MulticamError(f"kernels are real numbers (out in *k), not {self.weights.dtype} {shape}")
        if self.groups < 1 or shape[0] % self.groups:
            raise MulticamError(f"{shape[0]} output channels do not fall into {self.groups} groups")

    @property
    def kind(self) -> Kind:
        """Which channels are mixed, and whether places are.

        `"pointwise"` mixes all channels of one place (1 x 1) and `"dense"` those of several places. `"grouped"` mixes the
        channels of each group and `"depthwise"` none, whatever the size of their kernels: one of 1 x 1 that is depthwise
        scales each channel by a number.
        """
        if self.groups > 1:
            return "grouped" if self.weights.shape[1] > 1 else "depthwise"
        return "dense" if self.weights[0, 0].numel() > 1 else "pointwise"

    def __repr__(self) -> str:
        return f"Kernels({' x '.join(map(str, self.weights.shape))}, {self.kind})"


def kernels(layer: nn.Module) -> Kernels:
    """The kernels of a convolution, as a copy in float32 (float64 where the layer's are).

    They are the weights that the layer really convolves with, which the layer is run once on ones to see: of a
    normalised, parametrised or standardised convolution (`weight_norm`, timm's `StdConv2d`) they differ from its parameters.

    Args:
        layer: Any `nn.Conv…` or `nn.ConvTranspose…`, or a subclass, such as `model.get_submodule("encoder.stem.0")`.

    Raises:
        MulticamError: If the layer is no convolution (the message names those inside it), or has no values yet.

    Example:
        >>> conv = nn.Conv2d(3, 64, 7)
        >>> kernels(conv), torch.equal(kernels(conv).weights, conv.weight)
        (Kernels(64 x 3 x 7 x 7, dense), True)
    """
    if not isinstance(layer, nn.Module):  # callers without a type checker
        raise MulticamError(
            f"kernels are those of a module, such as model.get_submodule('stem.0'), not of a {type(layer).__name__}"
        )
    layer = unwrapped(layer)
    if not isinstance(layer, _Convolution):
        raise MulticamError(f"kernels are those of a convolution, and {_instead_of(layer)}")
    with undisturbed(layer, graph=False):  # a weight may be computed whenever it is asked for
        call = Inputs(_ones(layer))
    with undisturbed(layer, graph=False, call=call) as memory:
        try:
            with Convolved() as seen:
                memory.call.run(layer)
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise MulticamError(_by_hand(layer, f"cannot be run alone ({error})")) from error
        if len(seen.found) != 1:
            raise MulticamError(_by_hand(layer, f"computes {len(seen.found)} convolutions where one is expected"))
        weights, transposed, groups = seen.found[0]
        if transposed:
            weights = rearrange(weights, "(g i) o ... -> (g o) i ...", g=groups)
        return Kernels(weights.to(torch.promote_types(weights.dtype, torch.float32), copy=True), groups)


def _ones(layer: _Convolution) -> Tensor:
    """A sample that is large enough for any kernel and padding of the layer; what it returns tells whether its weights change."""
    padding = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    sides = [d * (k - 1) + 1 + 2 * p for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)]
    return layer.weight.new_ones(1, layer.in_channels, *sides)


def _instead_of(layer: nn.Module) -> str:
    inside = [path for path, module in module_paths(layer).items() if isinstance(module, _Convolution)]
    kind = type(layer).__name__
    if not inside:
        return f"{kind} is none and has none inside it"
    more = f" and {len(inside) - 20} more" if len(inside) > 20 else ""
    return (
        f"{kind} is none. Inside it are {', '.join(map(repr, inside[:20]))}{more}: "
        f"take one, as in kernels(layer.get_submodule({inside[0]!r}))"
    )


def _by_hand(layer: nn.Module, why: str) -> str:
    return f"{type(layer).__name__} {why}; give the weights yourself, as Kernels(weights, groups)"
