"""pytorch-grad-cam's guided backpropagation and deep feature factorisation, by their names there."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from multicam.compat.base import named_layers
from multicam.compat.older import refuse_elsewhere, spoken
from multicam.compat.pictures import array, create_labels_legend, scaled, show_factorization_on_image
from multicam.compat.subclasses import Checked, foreign
from multicam.inside.concepts import factorize
from multicam.saliency.gradients import guided_backprop
from multicam.watch.layers import LayerLike
from multicam.watch.reshape import Reshape
from multicam.watch.undisturbed import unwrapped


class GuidedBackpropReLUModel(Checked):
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

    _unused = dict.fromkeys(
        ("recursive_replace_relu_with_guidedrelu", "recursive_replace_guidedrelu_with_relu"),
        "no ReLU is replaced; every one is guided, whatever way it is written",
    )

    @spoken
    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        refuse_elsewhere(model, "device", device)
        self.model = unwrapped(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(self, input_img: Tensor) -> Any:
        """The output that the class is of; a subclass may say another."""
        return self.model(input_img)

    @spoken
    def __call__(
        self, input_img: Float[Tensor, "b c h w"], target_category: int | None = None
    ) -> Float[np.ndarray, "h w c"]:
        """The guided gradient of the first image's class."""
        image = input_img[:1].to(self.device)
        model = Forward(self.model, self.forward) if foreign(type(self), "forward") else self.model
        (gradient,) = guided_backprop(model, image, target_category).values()
        return array(rearrange(gradient, "1 c h w -> h w c"))


class Forward(nn.Module):
    """A model that is run by a function of somebody else's.

    Args:
        model: The model that the function runs.
        run: From the image to the output.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, x: Tensor) -> Any:
        """What the function returns."""
        return self.run(x)


class DeepFeatureFactorization:
    """The concepts of a layer; `multicam.inside.concepts.factorize` in NumPy.

    Args:
        model: Any module; it is not changed.
        target_layer: The layer.
        reshape_transform: As for `BaseCAM`.
        computation_on_concepts: What the model does behind the layer, such as its head.
    """

    @spoken
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
