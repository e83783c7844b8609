"""Bodies of subclasses as scripts write them, each a function from pytorch-grad-cam or the drop-in to the subclass."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM as PeerBaseCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor

from multicam import compat

Body = Callable[[Any], Any]


def base_of(m: ModuleType) -> Any:
    return compat.BaseCAM if m is compat else PeerBaseCAM


def weights_of_channels(m: Any) -> Any:
    class Body(base_of(m)):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            assert isinstance(activations, np.ndarray) and isinstance(grads, np.ndarray)
            assert isinstance(input_tensor, Tensor) and target_layer in self.target_layers and len(targets) == 2
            return np.maximum(grads, 0).max(axis=tuple(range(2, grads.ndim)))

    return Body


def weights_of_a_method(m: Any) -> Any:
    class Body(m.GradCAM):
        def get_cam_weights(self, input_tensor, target_layer, target_category, activations, grads):
            mean = super().get_cam_weights(input_tensor, target_layer, target_category, activations, grads)
            assert mean.shape == activations.shape[:2]
            return np.abs(mean) / np.abs(mean).max(axis=1, keepdims=True)

    return Body


def changed_activations(m: Any) -> Any:
    """What the method above is handed on, it explains."""

    class Body(m.XGradCAM):
        def get_cam_weights(self, input_tensor, target_layer, target_category, activations, grads):
            activations *= 2
            return super().get_cam_weights(input_tensor, target_layer, target_category, activations + 1, -grads)

    return Body


def image_of_the_base(m: Any) -> Any:
    class Body(base_of(m)):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth):
            assert grads is None
            return np.abs(activations).max(axis=1)

    return Body


def image_around_a_method(m: Any) -> Any:
    class Body(m.LayerCAM):
        def get_cam_image(self, *args, **kwargs):
            input_tensor, layer, targets, acts, grads, eigen = args
            return np.sqrt(super().get_cam_image(input_tensor, layer, targets, acts**2, grads, eigen))

    return Body


def image_that_ignores_weights(m: Any) -> Any:
    class Body(m.GradCAM):
        def get_cam_weights(self, *given):
            raise AssertionError

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth):
            return np.maximum(-grads * activations, 0).sum(1)

    return Body


def weights_and_image(m: Any) -> Any:
    class Body(base_of(m)):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return np.maximum(grads, 0)

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
            weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
            return (weights * activations).mean(axis=1)

    return Body


def second_level(m: Any) -> Any:
    """The lower class has the weights, of the upper class, which has none of its own."""

    class Upper(m.HiResCAM):
        scale = 1.5

        def signed(self, grads):
            return np.sign(grads) * self.scale

    class Body(Upper):
        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth):
            return super().get_cam_image(input_tensor, target_layer, targets, activations, self.signed(grads), False)

    return Body


def second_level_of_weights(m: Any) -> Any:
    class Upper(base_of(m)):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return grads.sum(axis=tuple(range(2, grads.ndim)))

    class Body(Upper):
        def get_cam_weights(self, *given):
            return np.tanh(super().get_cam_weights(*given))

    return Body


class Rectified:
    def get_cam_weights(self, *given):
        return np.maximum(super().get_cam_weights(*given), 0)


def mixin_first(m: Any) -> Any:
    return type("Body", (Rectified, m.GradCAM), {})


def mixin_last(m: Any) -> Any:
    return type("Body", (m.GradCAM, Rectified), {})


def two_methods(m: Any) -> Any:
    return type("Body", (m.XGradCAM, m.LayerCAM), {})


def negative_evidence(m: Any) -> Any:
    """The loop over layers written anew, without the cut at zero."""

    class Body(m.GradCAM):
        def compute_cam_per_layer(self, input_tensor, targets, eigen_smooth):
            activations = [a.cpu().data.numpy() for a in self.activations_and_grads.activations]
            grads = [g.cpu().data.numpy() for g in self.activations_and_grads.gradients]
            size = self.get_target_width_height(input_tensor)
            maps = []
            for layer, act, grad in zip(self.target_layers, activations, grads, strict=True):
                cam = self.get_cam_image(input_tensor, layer, targets, act, grad, eigen_smooth)
                maps.append(scale_cam_image(-cam, size)[:, None, :])
            return maps

    return Body


def largest_of_layers(m: Any) -> Any:
    class Body(m.HiResCAM):
        def aggregate_multi_layers(self, cam_per_target_layer):
            return np.concatenate(cam_per_target_layer, axis=1).max(axis=1)

    return Body


def maps_of_layers(m: Any) -> Any:
    class Body(m.GradCAMElementWise):
        def aggregate_multi_layers(self, cam_per_target_layer):
            return cam_per_target_layer[-1][:, 0]

        def get_target_width_height(self, input_tensor):
            return tuple(2 * side for side in super().get_target_width_height(input_tensor))

    return Body


def a_forward_of_its_own(m: Any) -> Any:
    class Body(m.GradCAM):
        def forward(self, input_tensor, targets, eigen_smooth=False):
            outputs = self.activations_and_grads(input_tensor)
            assert not self.model.training
            sum(2 * target(output) for target, output in zip(targets, outputs, strict=True)).backward()
            return self.aggregate_multi_layers(self.compute_cam_per_layer(input_tensor, targets, eigen_smooth))

    return Body


def a_forward_that_runs_the_model(m: Any) -> Any:
    class Body(m.LayerCAM):
        def forward(self, input_tensor, targets, eigen_smooth=False):
            self.activations_and_grads.activations, self.activations_and_grads.gradients = [], []
            outputs = self.model(input_tensor)
            outputs.softmax(1)[:, 2].sum().backward()
            return self.aggregate_multi_layers(self.compute_cam_per_layer(input_tensor, targets, eigen_smooth))

    return Body


def a_forward_around(m: Any) -> Any:
    class Body(m.GradCAM):
        def forward(self, input_tensor, targets, eigen_smooth=False):
            return 1 - super().forward(input_tensor, targets, eigen_smooth)

    return Body


def gradient_of_the_input(m: Any) -> Any:
    class Body(base_of(m)):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(model, target_layers, reshape_transform, compute_input_gradient=True)

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth):
            return np.abs(input_tensor.grad.data.cpu().numpy() * input_tensor.data.cpu().numpy()).sum(1)

    return Body


def second_derivatives(m: Any) -> Any:
    class Body(base_of(m)):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(
                model, target_layers, reshape_transform, compute_input_gradient=True, uses_gradients=True, detach=False
            )

        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            (product,) = torch.autograd.grad(grads, activations, activations)
            return (grads - product).flatten(2).mean(2).detach().cpu().numpy()

    return Body


def what_ifs_of_its_own(m: Any) -> Any:
    class Body(base_of(m)):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            with torch.no_grad():
                means = [self.model(input_tensor * (i + 1))[:, 0] for i in range(activations.shape[1])]
            return torch.stack(means, 1).softmax(1).numpy()

    return Body


BODIES: list[Body] = [
    weights_of_channels,
    weights_of_a_method,
    changed_activations,
    image_of_the_base,
    image_around_a_method,
    image_that_ignores_weights,
    weights_and_image,
    second_level,
    second_level_of_weights,
    mixin_first,
    mixin_last,
    two_methods,
    negative_evidence,
    largest_of_layers,
    maps_of_layers,
    a_forward_of_its_own,
    a_forward_that_runs_the_model,
    a_forward_around,
    gradient_of_the_input,
    second_derivatives,
    what_ifs_of_its_own,
]
