"""pytorch-grad-cam's methods, by their names there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.scorer import OutputLike
from multicam.cam import components, fullgrad, masking, weighted
from multicam.cam.base import CAM
from multicam.compat.activations import Layers
from multicam.compat.base import BaseCAM
from multicam.compat.formulas import ChannelMethod, Given, ImageMethod
from multicam.compat.older import spoken
from multicam.compat.pictures import Array, as_array, scale_cam_image, scaled
from multicam.errors import MulticamError, at_least_one
from multicam.watch.layers import Layer
from multicam.watch.reshape import Reshape


class GradCAM(ChannelMethod):
    """`multicam.GradCAM`."""

    _weights_class = weighted.GradCAM


class HiResCAM(ImageMethod):
    """`multicam.HiResCAM`."""

    _image_class = weighted.HiResCAM


class GradCAMElementWise(ImageMethod):
    """`multicam.GradCAMElementWise`."""

    _image_class = weighted.GradCAMElementWise


class GradCAMPlusPlus(ChannelMethod):
    """`multicam.GradCAMPlusPlus`."""

    _weights_class = weighted.GradCAMPlusPlus


class XGradCAM(ChannelMethod):
    """`multicam.XGradCAM`."""

    _weights_class = weighted.XGradCAM


class LayerCAM(ImageMethod):
    """`multicam.LayerCAM`."""

    _image_class = weighted.LayerCAM


class EigenGradCAM(ImageMethod):
    """`multicam.EigenGradCAM`."""

    _image_class = components.EigenGradCAM


class SegEigenCAM(ImageMethod):
    """`multicam.SegEigenCAM`."""

    _image_class = components.SegEigenCAM


class ShapleyCAM(ChannelMethod):
    """`multicam.ShapleyCAM`."""

    _weights_class = weighted.ShapleyCAM
    _unused = dict.fromkeys(
        ("get_cam_weights", "get_cam_image"),
        "here steps are given arrays, without the history that second derivatives take; derive from BaseCAM, with "
        "super().__init__(model, target_layers, compute_input_gradient=True, detach=False)",
    )


class RandomCAM(ChannelMethod):
    """`multicam.RandomCAM`, with the same weights in every call."""

    _weights_class = weighted.RandomCAM


class EigenCAM(ImageMethod):
    """`multicam.EigenCAM`."""

    _image_class = components.EigenCAM
    _reads_target = _reads_gradients = False


class KPCA_CAM(ImageMethod):  # noqa: N801
    """`multicam.KPCACAM`.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        kernel, gamma: As for `multicam.KPCACAM`.
    """

    _image_class = components.KPCACAM
    _reads_target = _reads_gradients = False

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        kernel: str = "sigmoid",
        gamma: float | None = None,
        *,
        output: OutputLike = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        super().__init__(model, target_layers, reshape_transform, output=output)

    def _options(self) -> dict[str, Any]:
        """`kernel` and `gamma`."""
        return {"kernel": self.kernel, "gamma": self.gamma}


class FEM(ImageMethod):
    """`multicam.FEM`.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        k: How many standard deviations above its mean a channel stands out.
    """

    _image_class = weighted.FEM
    _reads_target = _reads_gradients = False

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        k: float = 2.0,
        *,
        output: OutputLike = None,
    ) -> None:
        self.k = k
        super().__init__(model, target_layers, reshape_transform, output=output)

    def _options(self) -> dict[str, Any]:
        """`k`."""
        return {"k": self.k}


class ManyPasses(ChannelMethod):
    """A method of `multicam` that runs what-ifs of the model, `batch_size` of them in a pass."""

    _reads_gradients = False

    def _options(self) -> dict[str, Any]:
        """`batch_size`."""
        return {"batch_size": at_least_one("batch_size", self.batch_size)}


class ScoreCAM(ManyPasses):
    """`multicam.ScoreCAM`."""

    _weights_class = masking.ScoreCAM


class AblationLayer:
    """A name that scripts hand to `AblationCAM`, which needs none: it ablates any layer by running again what follows."""


class AblationLayerVit(AblationLayer):
    """As `AblationLayer`."""


class AblationLayerFasterRCNN(AblationLayer):
    """As `AblationLayer`."""


class AblationCAM(ManyPasses):
    """`multicam.AblationCAM`.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        ablation_layer: One of this module's; it is not needed.
        batch_size: How many channels are ablated in one pass.
        ratio_channels_to_ablate: Always 1.
    """

    _weights_class = masking.AblationCAM
    _unused = dict.fromkeys(
        ("save_activation", "assemble_ablation_scores"),
        "only what follows the layer runs again, with zeros for a channel; multicam.AblationCAM is one function to write anew",
    )

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        ablation_layer: AblationLayer | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
        *,
        output: OutputLike = None,
    ) -> None:
        if type(ablation_layer) not in (type(None), AblationLayer, AblationLayerVit, AblationLayerFasterRCNN):
            raise MulticamError(f"channels are ablated by zeros; {type(ablation_layer).__name__} would not be used")
        if ratio_channels_to_ablate != 1:
            raise MulticamError("all channels are ablated: leave out ratio_channels_to_ablate")
        self.batch_size = batch_size
        super().__init__(model, target_layers, reshape_transform, output=output)

    def _given(self, method: type[CAM], target_layer: Any, activations: Any, grads: Any) -> Given:
        """As for every method, but channels are ablated from what the layer returned, whatever a step makes of it."""
        site = super()._given(method, target_layer, activations, grads)
        return replace(site, acts=site.trace.sites[site.name].acts)


class FullGrad(BaseCAM):
    """`multicam.FullGrad`, which has no layers to choose: `target_layers` and `reshape_transform` are not used.

    Args:
        model, output: As for `BaseCAM`.
        target_layers, reshape_transform: Not used.
    """

    _unused = dict.fromkeys(
        ("get_cam_image", "get_cam_weights", "get_bias_data"),
        "its map is of all layers together; multicam.CompleteFullGrad has another, and BaseCAM asks for each layer's",
    )

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers = (),
        reshape_transform: Reshape | None = None,
        *,
        output: OutputLike = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False, output=output)

    @property
    def _layers(self) -> dict[str, Layer]:
        """None: it looks at all that have a bias."""
        return {}

    def compute_cam_per_layer(self, input_tensor: Any, targets: Any, eigen_smooth: bool) -> Any:
        """The sum of all layers' maps and the image's `(b 1 *size)`."""
        trace = self._trace
        if trace is None:
            raise MulticamError(
                "FullGrad runs a pass of its own, which somebody else's forward or activations_and_grads is not"
            )
        name, *others = trace.inputs.images
        if others:
            raise MulticamError(f"the model has several image inputs, {[name, *others]}; see multicam.FullGrad")
        if not eigen_smooth:
            found = fullgrad.FullGrad(self.model, name, output=self.output)(trace.inputs, trace.target)
            assert isinstance(found, Tensor)
            return as_array(found)[:, None]
        image, *layers = fullgrad.full_gradients(self.model, trace.inputs, [name], trace.target, self.output)[name]
        size = tuple(image.shape[2:])
        strengths = [_each_scaled(image, size), *(_each_scaled(x, size).sum(1, keepdim=True) for x in layers)]
        # At an eighth of the size, as pytorch-grad-cam does: the component of many maps.
        coarse = _each_scaled(torch.cat(strengths, 1), [max(side // 8, 1) for side in size])
        return as_array(scaled(components.first_component(coarse), size))[:, None]

    def aggregate_multi_layers(self, cam_per_target_layer: Any) -> Array:
        """The sum of the maps, scaled."""
        return scale_cam_image(cam_per_target_layer.sum(axis=1))


def _each_scaled(x: Float[Tensor, "b c *grid"], size: Sequence[int]) -> Float[Tensor, "b c *size"]:
    return scaled(x.abs().flatten(0, 1), size).view(*x.shape[:2], *size)
