"""pytorch-grad-cam's methods, by their names there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike
from multicam.call.targets.scores import ClassScore, Target, TopClass
from multicam.cam import components, fullgrad, masking, sess, weighted, wrappers
from multicam.compat.base import ActivationsAndGradients, BaseCAM, LayerMethod, Layers, ManyPasses, T
from multicam.compat.targets import Targets, per_image
from multicam.compat.utils import Array, array, scaled
from multicam.errors import MulticamError
from multicam.watch.reshape import Reshape
from multicam.watch.trace import Trace


class GradCAM(LayerMethod):
    """`multicam.GradCAM`."""

    engine_class = weighted.GradCAM


class HiResCAM(LayerMethod):
    """`multicam.HiResCAM`."""

    engine_class = weighted.HiResCAM


class GradCAMElementWise(LayerMethod):
    """`multicam.GradCAMElementWise`."""

    engine_class = weighted.GradCAMElementWise


class GradCAMPlusPlus(LayerMethod):
    """`multicam.GradCAMPlusPlus`."""

    engine_class = weighted.GradCAMPlusPlus


class XGradCAM(LayerMethod):
    """`multicam.XGradCAM`."""

    engine_class = weighted.XGradCAM


class LayerCAM(LayerMethod):
    """`multicam.LayerCAM`."""

    engine_class = weighted.LayerCAM


class EigenGradCAM(LayerMethod):
    """`multicam.EigenGradCAM`."""

    engine_class = components.EigenGradCAM


class SegEigenCAM(LayerMethod):
    """`multicam.SegEigenCAM`."""

    engine_class = components.SegEigenCAM


class ShapleyCAM(LayerMethod):
    """`multicam.ShapleyCAM`."""

    engine_class = weighted.ShapleyCAM


class RandomCAM(LayerMethod):
    """`multicam.RandomCAM`, with the same weights in every call."""

    engine_class = weighted.RandomCAM


class EigenCAM(LayerMethod):
    """`multicam.EigenCAM`."""

    engine_class = components.EigenCAM
    reads_target = False


class KPCA_CAM(LayerMethod):  # noqa: N801
    """`multicam.KPCACAM`.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        kernel, gamma: As for `multicam.KPCACAM`.
    """

    engine_class = components.KPCACAM
    reads_target = False

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
        super().__init__(model, target_layers, reshape_transform, output=output, kernel=kernel, gamma=gamma)


class FEM(LayerMethod):
    """`multicam.FEM`.

    Args:
        model, target_layers, reshape_transform, output: As for `BaseCAM`.
        k: How many standard deviations above its mean a channel stands out.
    """

    engine_class = weighted.FEM
    reads_target = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        k: float = 2.0,
        *,
        output: OutputLike = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, output=output, k=k)


class ScoreCAM(ManyPasses):
    """`multicam.ScoreCAM`."""

    engine_class = masking.ScoreCAM


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

    engine_class = masking.AblationCAM

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
        super().__init__(model, target_layers, reshape_transform, output=output)
        self.batch_size = batch_size


class FullGrad(BaseCAM):
    """`multicam.FullGrad`, which has no layers to choose: `target_layers` and `reshape_transform` are not used.

    Args:
        model, output: As for `BaseCAM`.
        target_layers, reshape_transform: Not used.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers = (),
        reshape_transform: Reshape | None = None,
        *,
        output: OutputLike = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, output=output)

    def trace(self, inputs: Inputs, target: Target | None) -> Trace:
        """The pass that chooses the target."""
        return Trace(self.model, inputs, {}, target, self.output)

    def layer_maps(self, trace: Trace, eigen_smooth: bool) -> Float[Tensor, "layers b *size"]:
        """The one map that there is."""
        name, *others = trace.inputs.images
        if others:
            raise MulticamError(f"the model has several image inputs, {[name, *others]}; see multicam.FullGrad")
        if not eigen_smooth:
            found = fullgrad.FullGrad(self.model, name, output=self.output)(trace.inputs, trace.target)
            assert isinstance(found, Tensor)
            return found[None]
        image, *layers = fullgrad.full_gradients(self.model, trace.inputs, [name], trace.target, self.output)[name]
        size = tuple(image.shape[2:])
        strengths = [_each_scaled(image, size), *(_each_scaled(x, size).sum(1, keepdim=True) for x in layers)]
        # At an eighth of the size, as pytorch-grad-cam does: the component of many maps.
        coarse = _each_scaled(torch.cat(strengths, 1), [max(side // 8, 1) for side in size])
        return scaled(components.first_component(coarse), size)[None]


def _each_scaled(x: Float[Tensor, "b c *grid"], size: Sequence[int]) -> Float[Tensor, "b c *size"]:
    return scaled(x.abs().flatten(0, 1), size).view(*x.shape[:2], *size)


class Refined:
    """What refines the maps of a base method.

    Args:
        base_cam: The base method.
    """

    def __init__(self, base_cam: LayerMethod) -> None:
        self.base_cam = base_cam

    @property
    def activations_and_grads(self) -> ActivationsAndGradients:
        """As for `BaseCAM`."""
        return self.base_cam.activations_and_grads

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        """As for `BaseCAM`."""


class FinerCAM(Refined):
    """`multicam.FinerCAM` of another method.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[LayerMethod] = GradCAM,
    ) -> None:
        super().__init__(base_method(model, target_layers, reshape_transform))

    def __call__(
        self,
        input_tensor: Any,
        targets: Targets = None,
        eigen_smooth: bool = False,
        alpha: float = 1.0,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
        *,
        aug_smooth: bool = False,
    ) -> Array:
        """The maps `(b *size)`.

        Args:
            input_tensor: As for a call of `BaseCAM`.
            targets: As for a call of `BaseCAM`, which then decide alone.
            eigen_smooth: As for a call of `BaseCAM`.
            aug_smooth: As for a call of `BaseCAM`.
            alpha: How much the similar classes count.
            comparison_categories: Which of them, as ranks from 1, the most similar; those that a model has.
            target_idx: The class to explain; None: each image's top class.
        """
        inputs = self.base_cam.bound(input_tensor)
        main = TopClass() if target_idx is None else ClassScore(target_idx)
        similar = tuple((1, 2, 3) if comparison_categories is None else comparison_categories)
        target = per_image(targets, inputs.batch) or Finer(main, alpha, similar)
        return self.base_cam.explained(inputs, target, aug_smooth, eigen_smooth)


@dataclass(frozen=True)
class Finer:
    """The target of Finer-CAM, with as many similar classes as there are."""

    main: ClassScore | TopClass
    alpha: float
    similar: tuple[int, ...]

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return self.pin(output)(output)

    def pin(self, output: Any) -> wrappers.FinerContrast:
        """The target with its classes chosen."""
        self.main(output)  # refuses outputs without classes
        there = tuple(rank for rank in self.similar if rank < output.shape[1])
        if not there:
            raise MulticamError(f"FinerCAM compares classes, but the output has {output.shape[1]} in all")
        return wrappers.FinerScore(self.main, self.alpha, there).pin(output)


class RefineCAM(Refined):
    """The product of the layers' maps, each scaled; `multicam.RefineCAM` is this without the scaling.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
        **kwargs: What else it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[LayerMethod] = GradCAMPlusPlus,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_method(model, target_layers, reshape_transform, **kwargs))
        self.base_cam.fuse = lambda maps: torch.stack([scaled(m) for m in maps]).prod(0)

    def __call__(
        self, input_tensor: Any, targets: Targets = None, eigen_smooth: bool = False, *, aug_smooth: bool = False
    ) -> Array:
        """The maps `(b *size)`; call it as a `BaseCAM`."""
        return self.base_cam(input_tensor, targets, aug_smooth, eigen_smooth)


class SESS(Refined):
    """`multicam.SESS` of another method.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
        scales: The lengths to which the shorter side is enlarged; None: `num_scales`, each `scale_step_ratio` longer.
        num_scales, scale_step_ratio: As said.
        step_size: From one window to the next, in pixels; None: the shorter side.
        smooth: Blur the result.
        batch_size: How many windows the model is given at once.
        **kwargs: What else the method takes.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[LayerMethod] = GradCAM,
        scales: Sequence[int] | None = None,
        num_scales: int = 12,
        scale_step_ratio: float = 2 / 7,
        *,
        step_size: int | None = None,
        smooth: bool = True,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_method(model, target_layers, reshape_transform, **kwargs))
        self.scales = scales
        self.ratios = tuple(1 + scale_step_ratio * i for i in range(num_scales))
        self.step_size = step_size
        self.smooth = smooth
        self.batch_size = batch_size

    def __call__(self, input_tensor: Any, targets: Targets = None, eigen_smooth: bool = False) -> Array:
        """The maps `(b *size)`; call it as a `BaseCAM`."""
        inputs = self.base_cam.bound(input_tensor)
        side = min(next(iter(inputs.images.values())).shape[-2:])
        engine = sess.SESS(
            self.base_cam.smoothed() if eigen_smooth else self.base_cam.engine,
            scales=self.ratios if self.scales is None else [scale / side for scale in self.scales],
            step=1.0 if self.step_size is None else self.step_size / side,
            smooth=self.smooth,
            batch_size=self.batch_size,
        )
        maps = engine.maps(engine.trace(inputs, per_image(targets, inputs.batch)))
        return array(scaled(torch.stack([scaled(m) for m in maps.values()]).mean(0)))
