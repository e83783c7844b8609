"""pytorch-grad-cam's guided backpropagation and deep feature factorisation, by their names there."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from multicam.compat.base import named_layers
from multicam.compat.utils import array, create_labels_legend, scaled, show_factorization_on_image
from multicam.inside.concepts import factorize
from multicam.saliency.gradients import guided_backprop
from multicam.watch.layers import LayerLike
from multicam.watch.reshape import Reshape
from multicam.watch.undisturbed import unwrapped


class GuidedBackpropReLUModel:
    """Guided backpropagation: the gradient by the image, passing through each ReLU only where it is positive.

    Springenberg et al. 2014, arXiv:1412.6806, section 3.4.

    Args:
        model: Any module; it is not changed.
        device: Where the image goes; None: where the model is.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> GuidedBackpropReLUModel(model)(torch.rand(1, 3, 16, 16), target_category=3).shape
        (16, 16, 3)
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        self.model = unwrapped(model)
        self.device = next((p.device for p in model.parameters()), None) if device is None else device

    def __call__(
        self, input_img: Float[Tensor, "b c h w"], target_category: int | None = None
    ) -> Float[np.ndarray, "h w c"]:
        """The guided gradient of the first image's class."""
        image = input_img[:1].to(self.device)
        (gradient,) = guided_backprop(self.model, image, target_category).values()
        return array(rearrange(gradient, "1 c h w -> h w c"))


class DeepFeatureFactorization:
    """The concepts of a layer; `multicam.inside.concepts.factorize` in NumPy.

    Args:
        model: Any module; it is not changed.
        target_layer: The layer.
        reshape_transform: As for `BaseCAM`.
        computation_on_concepts: What the model does behind the layer, such as its head.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: LayerLike,
        reshape_transform: Reshape | None = None,
        computation_on_concepts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.layer = named_layers(target_layer, reshape_transform)
        self.computation_on_concepts = computation_on_concepts

    def __call__(self, input_tensor: Any, n_components: int = 16) -> tuple[Any, ...]:
        """The concepts `(c k)`, for each image their maps `(k h w)` in 0..1, and what the head makes of the concepts."""
        (found,) = factorize(
            self.model, input_tensor, self.layer, n_components, head=self.computation_on_concepts
        ).values()
        maps = [array(scaled(each)) for each in found.maps]
        scores = () if found.scores is None else (array(found.scores),)
        return array(found.vectors.T), maps, *scores

    def __enter__(self) -> "DeepFeatureFactorization":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""


def run_dff_on_image(
    model: nn.Module,
    target_layer: LayerLike,
    classifier: Callable[[Tensor], Tensor],
    img_pil: Any,
    img_tensor: Float[Tensor, "c h w"],
    reshape_transform: Reshape | None = None,
    n_components: int = 5,
    top_k: int = 2,
) -> UInt8[np.ndarray, "h _ 3"]:
    """An image, its concepts, and the classes of each; `model.config.id2label` names them."""
    factorization = DeepFeatureFactorization(model, target_layer, reshape_transform, classifier)
    _, maps, scores = factorization(img_tensor[None], n_components)
    labels: Mapping[int, str] = model.config.id2label  # type: ignore[assignment, union-attr]
    legend = create_labels_legend(torch.from_numpy(scores).softmax(-1).numpy(), labels, top_k)
    image = np.asarray(img_pil)
    shown = show_factorization_on_image(image / 255, maps[0], image_weight=0.3, concept_labels=legend)
    return np.hstack([image, shown])
