"""What the other libraries, and a careful user by hand, do for one map."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_grad_cam
import torch
import torch.nn.functional as F
import torchcam.methods
from jaxtyping import Float
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

CLASS = 3


def bare_forward(model: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    """No map: the unit of every table."""

    def run() -> None:
        with torch.no_grad():
            model(*inputs)

    return run


def targets(batch: int) -> list[ClassifierOutputTarget]:
    """The class, as pytorch-grad-cam wants it: once for each sample."""
    return [ClassifierOutputTarget(CLASS)] * batch


def grad_cam(method: str, model: nn.Module, layer: nn.Module, x: Tensor, **options: bool) -> Any:
    """The maps of a method of pytorch-grad-cam."""
    with getattr(pytorch_grad_cam, method)(model, [layer]) as cam:
        cam.batch_size = 32  # ScoreCAM's default is 16
        return cam(x, targets(len(x)), **options)


def torch_cam(method: str, model: nn.Module, layer: nn.Module, x: Tensor, *options: Any, **named: Any) -> Any:
    """The maps of a method of torchcam, on the layer's grid."""
    with getattr(torchcam.methods, method)(model, layer, *options, **named) as cam:
        reads_gradients = isinstance(cam, torchcam.methods.gradient._GradCAM)
        with torch.set_grad_enabled(reads_gradients):
            scores = model(x)
        return cam(CLASS, scores)


class SomeChannels(pytorch_grad_cam.AblationLayer):
    """The first channels only: all of them take minutes, and each takes the same time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def activations_to_be_ablated(self, activations: Any, ratio_channels_to_ablate: float = 1.0) -> Any:
        """The channels that are ablated."""
        del activations, ratio_channels_to_ablate
        self.indices = np.arange(self.channels)
        return self.indices


def ablation_cam(model: nn.Module, layer: nn.Module, x: Tensor, channels: int) -> Any:
    """Pytorch-grad-cam's AblationCAM of some channels."""
    some = SomeChannels(channels)
    with pytorch_grad_cam.AblationCAM(model, [layer], ablation_layer=some, batch_size=32) as cam:
        return cam(x, targets(len(x)))


def cut_graph(model: nn.Module, layer: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Grad-CAM by hand at the least cost: no parameter gets a gradient, and the graph starts at the layer."""
    kept: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = layer.register_forward_hook(cut)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        score = model(x)[:, CLASS].sum()
        (gradient,) = torch.autograd.grad(score, kept)
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    weights = gradient.mean((2, 3), keepdim=True)
    grid = (weights * kept[0].detach()).sum(1, keepdim=True).relu()
    return F.interpolate(grid, x.shape[2:], mode="bilinear")[:, 0]
