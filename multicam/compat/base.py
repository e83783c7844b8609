"""What every method of pytorch-grad-cam does around its formula, in the same steps, so that a subclass may replace any of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike
from multicam.call.targets.scores import TopClass
from multicam.call.tree import rebuild
from multicam.cam.components import first_component
from multicam.cam.laying import input_of, spatial_size
from multicam.compat.activations import Layers, Lent, listed
from multicam.compat.older import spoken
from multicam.compat.pictures import Array, Mirrored, as_array, scale_cam_image
from multicam.compat.subclasses import Checked, asked, foreign, refuse_unasked
from multicam.compat.targets import Nothing, PerImage, Targets, chosen, each_target, per_image, scalar
from multicam.errors import MulticamError
from multicam.watch.backward import gradients
from multicam.watch.layers import Layer, Taps
from multicam.watch.reshape import Reshape, Tokens
from multicam.watch.trace import Site, Trace
from multicam.watch.undisturbed import undisturbed, unwrapped

T = TypeVar("T")  # not typing.Self, which checkers of annotations at run time refuse in undecorated classes


class BaseCAM(Checked):
    """A method with pytorch-grad-cam's signature, and its steps: a subclass may replace each, as there.

    A call is `forward`, which runs the model and asks `compute_cam_per_layer` for maps and `aggregate_multi_layers` for the
    mean of them; the former asks `get_cam_image` of each layer, and that one `get_cam_weights`.

    Args:
        model: Any module; it is not changed.
        target_layers: Modules, paths or `Layer` objects; the maps of several are averaged.
        reshape_transform: From each layer's output to `(b c *grid)`; None: found where the model proves it.
        compute_input_gradient: Whether the `input_tensor` that the steps are given has its gradient in `.grad`.
        uses_gradients: Whether the steps are given gradients, which takes a backward pass.
        tta_transforms: What `aug_smooth` averages over: anything with `augment_image` and `deaugment_mask`.
        detach: Whether the steps are given arrays; else tensors with their history, of a pass with a graph of its gradients.
        output: Which part of the model's output the targets see, as for `multicam.CAM`; None: all of it.

    Attributes:
        batch_size: How many what-ifs are run in one pass, for the methods that need them.
        outputs: What the model returned in the last call, detached.
        activations_and_grads: What the layers did in the last call. A pass runs the object that is put in its place, and the
            maps are then of its `activations` and `gradients`.

    Raises:
        MulticamError: If a layer does not exist, or a step of the subclass would not be asked.

    Example:
        >>> class Positive(BaseCAM):
        ...     def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
        ...         return np.maximum(grads, 0).mean(axis=(2, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> Positive(model, [model[1]])(torch.rand(2, 3, 16, 16), targets=None).shape
        (2, 16, 16)
    """

    batch_size: int = 32
    _reads_target: ClassVar[bool] = True  # else any output will do
    _asks_weights: ClassVar[bool] = True  # else its get_cam_image has a formula of its own

    @spoken
    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Iterable[Any] | None = None,
        detach: bool = True,
        *,
        output: OutputLike = None,
    ) -> None:
        self.model = model
        self.target_layers = listed(target_layers)
        self.reshape_transform = reshape_transform
        self.compute_input_gradient = compute_input_gradient
        self.uses_gradients = uses_gradients
        self.tta_transforms = Mirrored.all() if tta_transforms is None else tta_transforms
        self.detach = detach
        self.output = output
        self.outputs: Any = None
        self.device = next((parameter.device for parameter in unwrapped(model).parameters()), torch.device("cpu"))
        self.cuda = self.device.type == "cuda"  # what older versions called it
        self.activations_and_grads = self._lent = Lent(model, self.target_layers, reshape_transform, detach)
        self._trace: Trace | None = None  # during a call
        refuse_unasked(type(self), self._asks_weights)
        Taps(unwrapped(model), list(self._layers.values()))  # refuses layers that do not exist

    @property
    def _layers(self) -> dict[str, Layer]:
        """Each target layer by a name that no input has, with the reshape where it has none of its own."""
        return named_layers(self.target_layers, self.reshape_transform)

    @property
    def _runs_elsewhere(self) -> bool:
        """Whether somebody else's object is in the place of `activations_and_grads`, and runs the model."""
        return self.activations_and_grads is not self._lent

    @spoken
    def __call__(
        self, input_tensor: Any, targets: Targets = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> Array:
        """The maps `(b *size)` at the size of the input.

        Args:
            input_tensor: What the model takes: a tensor, or anything that `Inputs.of` takes.
            targets: A callable for each image, from the model's output for this image to a scalar, or a class for each image or
                for all; None: the top class.
            aug_smooth: Average over mirrored, darker and brighter copies; see `tta_transforms`.
            eigen_smooth: The first principal component of the weighted channels instead of their sum.

        Raises:
            MulticamError: If inputs, targets or layers do not fit the model; the message says what does.
        """
        step = "forward_augmentation_smoothing" if aug_smooth else "forward"
        # A forward of somebody else's may run the model itself, and then read what the layers did.
        own = foreign(type(self), "forward") or "forward" in vars(self)
        hooked = self._lent.attached() if own else nullcontext()
        with evaluating(self.model), hooked:
            found: Array = asked(self, BaseCAM, step, input_tensor, targets, eigen_smooth)
            return found

    @spoken
    def forward(self, input_tensor: Any, targets: Targets, eigen_smooth: bool = False) -> Array:
        """The maps `(b *size)` of one pass; the arguments are those of a call."""
        inputs = self._bound(input_tensor)
        each = each_target(targets, inputs.batch)
        with evaluating(self.model):
            if self._runs_elsewhere or not self.detach:
                x, each = self._run(inputs, each)
            else:
                x, each = self._observe(inputs, each)
            try:
                maps = asked(self, BaseCAM, "compute_cam_per_layer", x, each, eigen_smooth)
            finally:
                self._trace = None
            found: Array = asked(self, BaseCAM, "aggregate_multi_layers", maps)
            return found

    def forward_augmentation_smoothing(self, input_tensor: Any, targets: Targets, eigen_smooth: bool = False) -> Array:
        """The mean of the maps of all copies; a target that chooses keeps its choice in all of them."""
        inputs = self._bound(input_tensor)
        if targets is None and self._reads_target and not self._runs_elsewhere:
            targets = chosen(Trace(self.model, inputs, {}, None, self.output).target, inputs.batch)
        return self._averaged(inputs, lambda copy: asked(self, BaseCAM, "forward", copy, targets, eigen_smooth))

    def _averaged(self, inputs: Inputs, explain: Callable[[Any], Array]) -> Array:
        """The mean of what explains each copy of the images, laid back on them."""
        images = list(inputs.images)
        if len(images) != 1:
            raise MulticamError(f"aug_smooth is for models with one image input, not {images}; see multicam.Augmented")
        maps = []
        for transform in self.tta_transforms:
            copy = transform.augment_image(inputs.leaves[images[0]])
            found = explain(copy if len(inputs.leaves) == 1 else inputs.replace({images[0]: copy}))
            maps.append(transform.deaugment_mask(torch.from_numpy(found)[:, None])[:, 0].numpy())
        return np.asarray(np.mean(maps, axis=0))

    def compute_cam_per_layer(self, input_tensor: Any, targets: Any, eigen_smooth: bool) -> Any:
        """The map of each layer `(b 1 *size)`, cut at zero, scaled, and enlarged to the input."""
        seen = self.activations_and_grads
        if len(seen.activations) != len(self.target_layers):
            raise MulticamError(
                f"there are {len(self.target_layers)} target layers and {len(seen.activations)} activations: give each layer "
                "that is called, and one that is called more often as Layer(…, call=…)"
            )
        gradients = seen.gradients if self.uses_gradients else [None] * len(self.target_layers)
        if len(gradients) != len(self.target_layers):
            raise MulticamError(
                f"there are {len(self.target_layers)} target layers, but {len(gradients)} gradients came back to them"
            )
        maps = []
        for layer, acts, grads in zip(self.target_layers, seen.activations, gradients, strict=True):
            given = [as_array(x) if self.detach and x is not None else x for x in (acts, grads)]
            found = self._image(input_tensor, layer, targets, *given, eigen_smooth)
            size = asked(self, BaseCAM, "get_target_width_height", input_tensor)
            maps.append(scale_cam_image(np.maximum(found, 0), size)[:, None])
        return maps

    def _image_of(self, site: Site, layer: Any, eigen_smooth: bool) -> Array:
        """What `get_cam_image` says of a layer in a pass of somebody else's."""
        trace = self._trace = site.trace
        x = _only(trace.inputs)
        target = trace.target
        each = list(target.targets) if isinstance(target, PerImage) else chosen(target, trace.inputs.batch)
        try:
            grads = as_array(site.grads) if self.uses_gradients else None
            return self._image(x, layer, each, as_array(site.acts), grads, eigen_smooth)
        finally:
            self._trace = None

    def _image(self, *given: Any) -> Array:
        found = as_array(asked(self, BaseCAM, "get_cam_image", *given))
        if found.ndim < 2 or not np.isfinite(found).all():
            what = f"shape {found.shape}, not (b *grid)" if found.ndim < 2 else "NaN or infinity"
            raise MulticamError(f"get_cam_image of {type(self).__name__} returned {what}")
        return found

    def get_cam_image(
        self,
        input_tensor: Any,
        target_layer: Any,
        targets: Any,
        activations: Any,
        grads: Any,
        eigen_smooth: bool = False,
    ) -> Any:
        """The map of one layer `(b *grid)`: its channels, weighted by `get_cam_weights`, added up.

        Args:
            input_tensor: The images.
            target_layer: The layer, as it was given.
            targets: The target of each image.
            activations: What the layer returned `(b c *grid)`.
            grads: The gradient by it; None without `uses_gradients`.
            eigen_smooth: As for a call.
        """
        weights = asked(self, BaseCAM, "get_cam_weights", input_tensor, target_layer, targets, activations, grads)
        weighted = _weighted(type(self).__name__, as_array(weights), as_array(activations))
        return as_array(first_component(torch.from_numpy(weighted))) if eigen_smooth else weighted.sum(axis=1)

    def get_cam_weights(self, input_tensor: Any, target_layer: Any, targets: Any, activations: Any, grads: Any) -> Any:
        """The weight of each channel `(b c)`, or of each cell of each channel; the arguments are those of `get_cam_image`."""
        raise MulticamError(f"{type(self).__name__} defines neither get_cam_weights nor get_cam_image")

    def aggregate_multi_layers(self, cam_per_target_layer: Any) -> Array:
        """The mean of the layers' maps, cut at zero and scaled."""
        return scale_cam_image(np.maximum(np.concatenate(cam_per_target_layer, axis=1), 0).mean(1))

    def get_target_width_height(self, input_tensor: Any) -> tuple[int, ...]:
        """The size of the maps, width first.

        Raises:
            MulticamError: If layers lie on inputs of several sizes, or on none.
        """
        if self._trace is None and isinstance(input_tensor, Tensor):
            return tuple(reversed(input_tensor.shape[2:]))
        sizes = {_size(site) for site in (self._trace.sites.values() if self._trace else ())}
        if len(sizes) != 1:
            raise MulticamError(
                "the target layers lie on inputs of several sizes; multicam's own CAMs give a map for each"
            )
        return tuple(reversed(sizes.pop()))

    def _bound(self, input_tensor: Any) -> Inputs:
        """The call of the model, on the model's device; or of what runs it, which takes one argument."""
        if self._runs_elsewhere:
            inputs = input_tensor if isinstance(input_tensor, Inputs) else Inputs(input_tensor)
        else:
            inputs = Inputs.of(input_tensor).bind(unwrapped(self.model))
        device = next((parameter.device for parameter in self.model.parameters()), None)
        return inputs.map(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) and device else leaf)

    def _observe(self, inputs: Inputs, each: Any) -> tuple[Any, Any]:
        """The quiet pass: what the steps are given as `input_tensor` and as `targets`."""
        self._lent.unhook()
        wrt = _floating(inputs) if self.compute_input_gradient and self.uses_gradients else {}
        target = per_image(each, inputs.batch) if self._reads_target else Nothing(inputs.batch)
        self._trace = trace = Trace(self.model, inputs, self._layers, target, self.output, tuple(wrt))
        self.outputs = trace.output
        # Copies, because steps may write into what they are given.
        self._lent.activations = [site.acts.to("cpu", copy=True) for site in trace.sites.values()]
        grads = trace.grads.values() if self.uses_gradients else ()
        self._lent.gradients = [x.to("cpu", copy=True) for x in grads]
        for name, leaf in wrt.items():
            leaf.grad = trace.input_grads[name]
        return _only(inputs.replace(wrt)), chosen(trace.target, inputs.batch) if each is None else each

    def _run(self, inputs: Inputs, each: Any) -> tuple[Any, Any]:
        """The same, where somebody else's `activations_and_grads` runs the model, or the steps want a history."""
        floating = _floating(inputs)
        with undisturbed(self.model, graph=True):
            # Copies, because a model may write into its inputs.
            copies = inputs.replace({name: leaf.clone() for name, leaf in floating.items()})
            outputs = self.activations_and_grads(*copies.args, **copies.kwargs)
            self.outputs = rebuild(outputs, lambda _, x: x.detach() if isinstance(x, Tensor) else x)
            each = chosen(TopClass().pin(outputs), inputs.batch) if each is None else each
            rows = list(outputs)
            if len(rows) != len(each):
                raise MulticamError(f"there are {len(each)} targets for {len(rows)} outputs; give one for each")
            if self.uses_gradients:
                loss = torch.stack([scalar(target, target(row)) for target, row in zip(each, rows, strict=True)]).sum()
                if not loss.requires_grad:
                    raise MulticamError(
                        "no gradient leads from the targets to the inputs, which must be of floating point"
                    )
                history = not self.detach
                found = gradients(loss, [*floating.values()], retain_graph=True, create_graph=history)
                for leaf, gradient in zip(floating.values(), found, strict=True):
                    leaf.grad = gradient if self.compute_input_gradient else None
        return _only(inputs.replace(floating)), each

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is swallowed; what the last call saw is forgotten."""
        self.activations_and_grads.release()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """With the model in evaluation mode, for steps of a subclass that run it; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def named_layers(layers: Layers, reshape: Reshape | None) -> dict[str, Layer]:
    """Each target layer by a name that no input has, with the reshape where it has none of its own."""
    each = [Layer.of(layer) for layer in listed(layers)]
    return {
        f"target_layers[{i}]": layer if reshape is None or layer.reshape else replace(layer, reshape=reshape)
        for i, layer in enumerate(each)
    }


def _weighted(
    name: str, weights: Float[np.ndarray, "..."], acts: Float[np.ndarray, "b c *grid"]
) -> Float[np.ndarray, "b c *grid"]:
    """Activations times the weights of their channels, or of their cells."""
    if weights.shape == acts.shape[:2]:
        weights = weights.reshape(*weights.shape, *[1] * (acts.ndim - 2))
    fits = weights.ndim == acts.ndim and all(w in (1, n) for w, n in zip(weights.shape, acts.shape, strict=True))
    if not fits or not np.isfinite(weights).all():
        what = f"the shape {weights.shape}" if not fits else "NaN or infinity"
        raise MulticamError(
            f"get_cam_weights of {name} returned {what}; it is one weight for each channel, {acts.shape[:2]}, or for each cell of "
            f"each channel, {acts.shape}"
        )
    return np.asarray(weights * acts)


def _floating(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that have a gradient, by name, ready for it."""
    leaves = {name: leaf for name, leaf in inputs.leaves.items() if isinstance(leaf, Tensor)}
    return {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x.is_floating_point()}


def _only(inputs: Inputs) -> Any:
    """The only tensor of a call as it is, as steps expect it; else the call."""
    return next(iter(inputs.leaves.values())) if len(inputs.leaves) == 1 else inputs


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
