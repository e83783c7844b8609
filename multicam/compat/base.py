"""What every method of pytorch-grad-cam does around its formula: its arguments, its scaling, its smoothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike
from multicam.call.targets.scores import Target
from multicam.cam import masking, weighted, wrappers
from multicam.cam.base import CAM
from multicam.cam.laying import input_of, spatial_size
from multicam.compat.targets import Nothing, Targets, per_image
from multicam.compat.utils import Array, Mirrored, array, scaled
from multicam.errors import MulticamError, at_least_one
from multicam.watch.layers import Layer, LayerLike
from multicam.watch.reshape import Reshape, Tokens
from multicam.watch.trace import Site, Trace
from multicam.watch.undisturbed import unwrapped

Layers = LayerLike | Sequence[LayerLike]
Fuse = Callable[[Tensor], Tensor]
T = TypeVar("T")  # not typing.Self, which checkers of annotations at run time refuse in undecorated classes


class BaseCAM(ABC):
    """A method with pytorch-grad-cam's signature.

    Args:
        model: Any module; it is not changed.
        target_layers: Modules, paths or `Layer` objects; the maps of several are averaged.
        reshape_transform: From each layer's output to `(b c *grid)`; None: found where the model proves it.
        output: Which part of the model's output the targets see, as for `multicam.CAM`; None: all of it.

    Attributes:
        batch_size: How many what-ifs are run in one pass, for the methods that need them.
        tta_transforms: What `aug_smooth` averages over: anything with `augment_image` and `deaugment_mask`.
        outputs: What the model returned in the last call, detached.
        fuse: From the maps of all layers `(layers b *size)` to one `(b *size)`.
    """

    batch_size: int = 32

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        *,
        output: OutputLike = None,
    ) -> None:
        self.model = model
        self.target_layers = target_layers
        self.reshape_transform = reshape_transform
        self.output = output
        self.tta_transforms: Iterable[Any] = Mirrored.all()
        self.outputs: Any = None
        self.fuse: Fuse = lambda maps: maps.mean(0)

    @abstractmethod
    def trace(self, inputs: Inputs, target: Target | None) -> Trace:
        """The pass that is explained."""

    @abstractmethod
    def layer_maps(self, trace: Trace, eigen_smooth: bool) -> Float[Tensor, "layers b *size"]:
        """The map of each layer at the size of the input, 0..1."""

    def __call__(
        self, input_tensor: Any, targets: Targets = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> Array:
        """The maps `(b *size)` at the size of the input.

        Args:
            input_tensor: What the model takes: a tensor, or anything that `Inputs.of` takes.
            targets: A callable for each image, from the model's output for this image to a scalar; None: the top class.
            aug_smooth: Average over mirrored, darker and brighter copies; see `tta_transforms`.
            eigen_smooth: The first principal component of the weighted channels instead of their sum.

        Raises:
            MulticamError: If inputs, targets or layers do not fit the model; the message says what does.
        """
        inputs = self.bound(input_tensor)
        return self.explained(inputs, per_image(targets, inputs.batch), aug_smooth, eigen_smooth)

    def bound(self, input_tensor: Any) -> Inputs:
        """The call of the model, on the model's device."""
        inputs = Inputs.of(input_tensor).bind(unwrapped(self.model))
        device = self.device
        return inputs.map(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) and device else leaf)

    def explained(self, inputs: Inputs, target: Target | None, aug_smooth: bool, eigen_smooth: bool) -> Array:
        """The maps of a call; a target that chooses keeps its choice in all copies of the images."""
        trace = self.trace(inputs, target)
        self.outputs = trace.output
        if not aug_smooth:
            return array(scaled(self.fuse(self.layer_maps(trace, eigen_smooth))))
        images = list(inputs.images)
        if len(images) != 1:
            raise MulticamError(f"aug_smooth is for models with one image input, not {images}; see multicam.Augmented")
        maps = []
        for transform in self.tta_transforms:
            copy = trace.again(inputs.replace({images[0]: transform.augment_image(inputs.leaves[images[0]])}))
            found = scaled(self.fuse(self.layer_maps(copy, eigen_smooth)))
            maps.append(transform.deaugment_mask(found[:, None])[:, 0])
        return array(torch.stack(maps).mean(0))

    @property
    def device(self) -> torch.device | None:
        """Where the model's parameters are; None for a model without any."""
        return next((parameter.device for parameter in self.model.parameters()), None)

    @property
    def activations_and_grads(self) -> "ActivationsAndGradients":
        """Only for `release()`, which has nothing to release, and for running the model."""
        return ActivationsAndGradients(self.model)

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """Nothing to release, and nothing swallowed: hooks are there during a call only."""


@dataclass(frozen=True)
class ActivationsAndGradients:
    """What is left of pytorch-grad-cam's hooks: `multicam.Trace` has activations and gradients."""

    model: nn.Module

    def __call__(self, x: Any) -> Any:
        """The model's output."""
        return self.model(x)

    def release(self) -> None:
        """Nothing: there are no hooks."""


class LayerMethod(BaseCAM):
    """A method of `multicam` that explains layers.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        **options: Those of the method in `multicam`.

    Raises:
        MulticamError: If a layer does not exist.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> from multicam.compat import HiResCAM
        >>> with HiResCAM(model, target_layers=[model[1]]) as cam:
        ...     maps = cam(input_tensor=torch.rand(2, 3, 16, 16), targets=[lambda output: output[3]] * 2)
        >>> maps.shape, maps.dtype
        ((2, 16, 16), dtype('float32'))
    """

    engine_class: ClassVar[type[CAM]]
    reads_target: ClassVar[bool] = True  # else any output will do

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        *,
        output: OutputLike = None,
        **options: Any,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, output=output)
        self.engine = self.engine_class(model, named_layers(target_layers, reshape_transform), output=output, **options)

    def trace(self, inputs: Inputs, target: Target | None) -> Trace:
        """The pass that is explained."""
        return self.engine.trace(inputs, target if self.reads_target else Nothing(inputs.batch))

    def layer_maps(self, trace: Trace, eigen_smooth: bool) -> Float[Tensor, "layers b *size"]:
        """The map of each layer, cut at zero, scaled, and enlarged to the input."""
        engine = self.smoothed() if eigen_smooth else self.engine
        maps = [scaled(engine.checked(site).relu(), _size(site)) for site in trace.sites.values()]
        if len({m.shape for m in maps}) > 1:
            raise MulticamError(
                "the target layers lie on inputs of several sizes; multicam's own CAMs give a map for each"
            )
        return torch.stack(maps)

    def smoothed(self) -> CAM:
        """The engine that `eigen_smooth` means; methods without a target or weighted channels have no other."""
        smooth = self.reads_target and isinstance(self.engine, weighted.WeightedCAM)
        return wrappers.EigenSmoothed(self.engine) if smooth else self.engine


class ManyPasses(LayerMethod):
    """A method of `multicam` that runs what-ifs of the model, `batch_size` of them in a pass."""

    engine: masking.AblationCAM | masking.MaskingCAM

    @property
    def batch_size(self) -> int:
        """That of the engine."""
        return self.engine.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.engine.batch_size = at_least_one("batch_size", size)


def named_layers(layers: Layers, reshape: Reshape | None) -> dict[str, Layer]:
    """Each target layer by a name that no input has, with the reshape where it has none of its own."""
    each = [Layer.of(layer) for layer in ([layers] if isinstance(layers, LayerLike) else layers)]
    return {
        f"target_layers[{i}]": layer if reshape is None or layer.reshape else replace(layer, reshape=reshape)
        for i, layer in enumerate(each)
    }


def _size(site: Site) -> tuple[int, ...]:
    inputs = site.trace.inputs
    name, _ = input_of(site, inputs)
    tokens = isinstance(site.layer.reshape, Tokens)
    size = None if name is None else spatial_size(inputs.leaves[name], tuple(site.acts.shape[2:]), tokens)
    if size is None:
        raise MulticamError(
            f"the map of layer {site.trace.paths[site.name]!r} has the grid {tuple(site.acts.shape[2:])}; say on which "
            f"input it lies with Layer(…, onto=…): {', '.join(map(repr, inputs.images)) or 'there is no image input'}"
        )
    return size
