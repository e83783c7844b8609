"""pytorch-grad-cam's methods that refine the maps of another one, by their names there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from multicam.call.targets.scores import ClassScore, TopClass
from multicam.cam import sess, wrappers
from multicam.compat.activations import ActivationsAndGradients, Layers, listed
from multicam.compat.base import BaseCAM, T
from multicam.compat.cams import GradCAM, GradCAMPlusPlus
from multicam.compat.formulas import as_cam
from multicam.compat.older import spoken
from multicam.compat.pictures import Array, as_array, scale_cam_image
from multicam.compat.subclasses import Checked
from multicam.compat.targets import FinerWeightedTarget, Targets, per_image
from multicam.errors import MulticamError, at_least_one
from multicam.watch.reshape import Reshape
from multicam.watch.trace import Trace


class Refined(Checked):
    """What refines the maps of a base method.

    Args:
        base_cam: The base method.
    """

    def __init__(self, base_cam: BaseCAM) -> None:
        self.base_cam = base_cam

    @property
    def activations_and_grads(self) -> ActivationsAndGradients:
        """As for `BaseCAM`."""
        return self.base_cam.activations_and_grads

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        """As for `BaseCAM`."""
        self.activations_and_grads.release()


class FinerCAM(Refined):
    """`multicam.FinerCAM` of another method.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
    """

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[BaseCAM] = GradCAM,
    ) -> None:
        super().__init__(_of_layers(base_method)(model, target_layers, reshape_transform))

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The maps `(b *size)`; the arguments are those of `forward`."""
        return self.forward(*args, **kwargs)

    @spoken
    def forward(
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
        base = self.base_cam
        inputs = base._bound(input_tensor)
        if targets is None:
            main = TopClass() if target_idx is None else ClassScore(target_idx)
            similar = tuple((1, 2, 3) if comparison_categories is None else comparison_categories)
            pinned = Trace(base.model, inputs, {}, Finer(main, alpha, similar), base.output).target
            assert isinstance(pinned, wrappers.FinerContrast)
            pairs = zip(pinned.index, pinned.others, strict=True)
            targets = [FinerWeightedTarget(index, others, alpha) for index, others in pairs]
        # The steps are the method's own, but for its forward.
        explain: Callable[[Any], Array] = lambda x: BaseCAM.forward(base, x, targets, eigen_smooth)  # noqa: E731
        return base._averaged(inputs, explain) if aug_smooth else explain(inputs)


@dataclass(frozen=True)
class Finer:
    """The target of Finer-CAM, with as many similar classes as there are."""

    main: ClassScore | TopClass
    alpha: float
    similar: tuple[int, ...]

    def __call__(self, output: Any) -> Tensor:
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
    """The product of the layers' maps, each scaled; `multicam.RefineCAM` is this without the scaling, from one pass.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
        **kwargs: What else it takes.

    Attributes:
        base_cam_per_layer: The method on each of the layers.
    """

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[BaseCAM] = GradCAMPlusPlus,
        **kwargs: Any,
    ) -> None:
        layers = listed(target_layers)
        if not layers:
            raise MulticamError("RefineCAM multiplies the maps of target_layers; give at least one")
        make = _of_layers(base_method)
        self.base_cam_per_layer = [make(model, [layer], reshape_transform, **kwargs) for layer in layers]
        super().__init__(self.base_cam_per_layer[-1])

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The maps `(b *size)`; the arguments are those of `forward`."""
        return self.forward(*args, **kwargs)

    @spoken
    def forward(
        self, input_tensor: Any, targets: Targets = None, eigen_smooth: bool = False, *, aug_smooth: bool = False
    ) -> Array:
        """The maps `(b *size)`; the arguments are those of a call of `BaseCAM`."""
        maps = [cam(input_tensor, targets, aug_smooth, eigen_smooth) for cam in self.base_cam_per_layer]
        return scale_cam_image(np.prod(maps, axis=0))


class SESS(Refined):
    """`multicam.SESS` of another method.

    Args:
        model, target_layers, reshape_transform: As for `BaseCAM`.
        base_method: The class of the method.
        scales: The lengths to which the shorter side is enlarged; None: `num_scales`, each `scale_step_ratio` longer.
        num_scales, scale_step_ratio: As said.
        window_size: Always None: windows have the input's size.
        step_size: From one window to the next, in pixels; None: the shorter side.
        pre_filter_ratio, theta, pool: Always 0.0, 0.0 and `"mean"`: the mean of all windows.
        smooth: Blur the result.
        use_softmax_scores: Always True: a window weighs as much as its class is probable.
        batch_size: How many windows the model is given at once.
        **kwargs: What else the method takes.

    Raises:
        MulticamError: If something is not as it always is.
    """

    _unused = dict.fromkeys(
        ("forward_single_image", "get_scales", "collect_patches", "get_target", "get_scores", "paste_cam"),
        "multicam.SESS does all this; derive from it",
    )

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        base_method: type[BaseCAM] = GradCAM,
        scales: Sequence[int] | None = None,
        num_scales: int = 12,
        scale_step_ratio: float = 2 / 7,
        window_size: int | None = None,
        step_size: int | None = None,
        pre_filter_ratio: float = 0.0,
        theta: float = 0.0,
        pool: str = "mean",
        smooth: bool = True,
        use_softmax_scores: bool = True,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        fixed = {
            "window_size": (window_size, None),
            "pre_filter_ratio": (pre_filter_ratio, 0),
            "theta": (theta, 0),
            "pool": (pool, "mean"),
            "use_softmax_scores": (use_softmax_scores, True),
        }
        for name, (given, only) in fixed.items():
            if given != only:
                raise MulticamError(
                    f"{name} of SESS is always {only!r}, not {given!r}; multicam.SESS tells what it does"
                )
        super().__init__(_of_layers(base_method)(model, target_layers, reshape_transform, **kwargs))
        self.scales = scales
        self.ratios = tuple(1 + scale_step_ratio * i for i in range(at_least_one("num_scales", num_scales)))
        self.step_size = step_size
        self.smooth = smooth
        self.batch_size = batch_size

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The maps `(b *size)`; the arguments are those of `forward`."""
        return self.forward(*args, **kwargs)

    @spoken
    def forward(self, input_tensor: Any, targets: Targets = None, eigen_smooth: bool = False) -> Array:
        """The maps `(b *size)`; the arguments are those of a call of `BaseCAM`."""
        base = self.base_cam
        inputs = base._bound(input_tensor)
        side = min(next(iter(inputs.images.values())).shape[-2:])
        engine = sess.SESS(
            as_cam(base, eigen_smooth),
            scales=self.ratios if self.scales is None else [scale / side for scale in self.scales],
            step=1.0 if self.step_size is None else self.step_size / side,
            smooth=self.smooth,
            batch_size=self.batch_size,
        )
        maps = engine.maps(engine.trace(inputs, per_image(targets, inputs.batch)))
        return scale_cam_image(np.mean([scale_cam_image(as_array(m)) for m in maps.values()], axis=0))


def _of_layers(method: Any) -> type[BaseCAM]:
    """The class of a method, refused if it is something else."""
    if not (isinstance(method, type) and issubclass(method, BaseCAM)):
        raise MulticamError(f"base_method is a class such as GradCAM, not {method!r}")
    return method
