"""Methods of pytorch-grad-cam whose formula is one of multicam's, asked with the arrays that the steps hand on."""

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.scorer import OutputLike
from multicam.cam import wrappers
from multicam.cam.base import CAM, warn_if_cancelled
from multicam.cam.weighted import ChannelCAM, WeightedCAM
from multicam.compat.activations import Layers
from multicam.compat.base import BaseCAM
from multicam.compat.older import spoken
from multicam.compat.pictures import as_array
from multicam.compat.subclasses import foreign
from multicam.errors import MulticamError
from multicam.watch.reshape import Reshape
from multicam.watch.trace import Site

M = TypeVar("M", bound=CAM)


@dataclass(frozen=True)
class Given(Site):
    """A site whose activations and gradients are those that a step was given, which it may have changed.

    Attributes:
        trace: Its pass; None where somebody else ran the model.
        gradients: The gradients; None where there are none.
    """

    trace: Any = field(repr=False)
    gradients: Tensor | None

    @cached_property
    def grads(self) -> Float[Tensor, "b c *grid"]:
        """The gradients.

        Raises:
            MulticamError: If there are none.
        """
        if self.gradients is None:
            raise MulticamError("this method reads gradients, but there are none: leave uses_gradients=True")
        return self.gradients


class LayerMethod(BaseCAM):
    """A method of `multicam` that explains layers.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.

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

    _reads_gradients: ClassVar[bool] = True

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        *,
        output: OutputLike = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=self._reads_gradients, output=output)
        self._engine()  # refuses options that the method does not take

    @abstractmethod
    def _engine(self) -> CAM:
        """The method in `multicam`."""

    def _options(self) -> dict[str, Any]:
        """The options of the method in `multicam`."""
        return {}

    def _made(self, method: type[M]) -> M:
        """A method in `multicam` of this model and layers."""
        return method(self.model, self._layers, output=self.output, **self._options())

    def _given(self, method: type[CAM], target_layer: Any, activations: Any, grads: Any) -> Given:
        """What a step is given, as a method in `multicam` reads it.

        Raises:
            MulticamError: If the method runs passes of its own, but there was no pass of this class.
        """
        acts, gradients = (None if x is None else torch.from_numpy(as_array(x)) for x in (activations, grads))
        assert acts is not None
        sites = {} if self._trace is None else self._trace.sites
        names = dict(zip(self._layers, self.target_layers, strict=True))
        site = next((site for name, site in sites.items() if names[name] is target_layer), None)
        if site is not None:
            device = site.acts.device
            acts, gradients = acts.to(device), None if gradients is None else gradients.to(device)
            return Given(site.name, site.layer, acts, site.scores, site.trace, gradients)
        if not method.one_pass:
            raise MulticamError(
                f"{method.__name__} runs passes of its own, which somebody else's forward or activations_and_grads does not "
                "see: change the model instead, by a small module around it"
            )
        name, layer = next(iter(self._layers.items()))
        return Given(name, layer, acts, acts.new_zeros(len(acts)), None, gradients)


class ImageMethod(LayerMethod):
    """A method of `multicam` with a formula for each cell."""

    _image_class: ClassVar[type[CAM]]
    _asks_weights = False

    def _engine(self) -> CAM:
        """The method in `multicam`."""
        return self._made(self._image_class)

    def get_cam_image(
        self,
        input_tensor: Any,
        target_layer: Any,
        targets: Any,
        activations: Any,
        grads: Any,
        eigen_smooth: bool = False,
    ) -> Any:
        """The map of one layer `(b *grid)`, as for `BaseCAM`."""
        site = self._given(self._image_class, target_layer, activations, grads)
        return as_array(smoothed(self, self._made(self._image_class), eigen_smooth).checked(site))


class ChannelMethod(LayerMethod):
    """A method of `multicam` that weighs whole channels."""

    _weights_class: ClassVar[type[ChannelCAM]]

    def _engine(self) -> CAM:
        """The method in `multicam`."""
        return self._made(self._weights_class)

    def get_cam_weights(self, input_tensor: Any, target_layer: Any, targets: Any, activations: Any, grads: Any) -> Any:
        """The weight of each channel `(b c)`, as for `BaseCAM`."""
        site = self._given(self._weights_class, target_layer, activations, grads)
        weights = self._made(self._weights_class).weights(site)
        warn_if_cancelled(type(self).__name__, site)
        return as_array(weights)


class Asked(CAM):
    """A method of this room as one of multicam's: what its `get_cam_image` says of a layer.

    Args:
        method: The method.
        eigen_smooth: As for its call.
    """

    comparable = False

    def __init__(self, method: BaseCAM, eigen_smooth: bool) -> None:
        super().__init__(method.model, method._layers, output=method.output)
        self.method = method
        self.eigen_smooth = eigen_smooth

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """What `get_cam_image` says."""
        layer = dict(zip(self.method._layers, self.method.target_layers, strict=True))[site.name]
        return torch.from_numpy(self.method._image_of(site, layer, self.eigen_smooth)).to(site.acts)


def as_cam(method: BaseCAM, eigen_smooth: bool) -> CAM:
    """A method of this room as one of multicam's: the one that it is, unless a subclass says otherwise.

    Raises:
        MulticamError: If a subclass replaces other steps than those of its formula, which would not be asked.
    """
    other = ("__call__", "forward", "compute_cam_per_layer", "aggregate_multi_layers", "get_target_width_height")
    unasked = [name for name in other if foreign(type(method), name)]
    if unasked:
        raise MulticamError(
            f"only get_cam_image and get_cam_weights of {type(method).__name__} would be asked, but it defines {unasked[0]}, too"
        )
    own = foreign(type(method), "get_cam_image") or foreign(type(method), "get_cam_weights")
    if own or isinstance(method, ImageMethod) == isinstance(method, ChannelMethod):
        return Asked(method, eigen_smooth)
    assert isinstance(method, LayerMethod)
    return smoothed(method, method._engine(), eigen_smooth)


def smoothed(method: BaseCAM, engine: CAM, eigen_smooth: bool) -> CAM:
    """The method in `multicam`, smoothed; without a target or weighted channels there is nothing to smooth."""
    smooth = eigen_smooth and method._reads_target and isinstance(engine, WeightedCAM)
    return wrappers.EigenSmoothed(engine) if smooth else engine
