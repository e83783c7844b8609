"""Models with several inputs for the engines of others, and the engines' maps before they are scaled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor, nn

from multicam import CAM, PackedModel, Site, Trace
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded

CLASS = 1


@dataclass(frozen=True)
class Subject:
    """A model with several inputs, and one of its layers."""

    model: nn.Module
    inputs: dict[str, Tensor]
    layer: str

    def packed(self) -> tuple[PackedModel, Tensor]:
        packed = PackedModel(self.model, self.inputs, self.layer)
        return packed, packed.pack(self.inputs)

    def site(self, target: Any = CLASS) -> Site:
        return Trace(self.model, self.inputs, {"it": self.layer}, target).sites["it"]

    def saliency(self, method: type[CAM], target: Any = CLASS) -> Tensor:
        return method(self.model, self.layer).saliency(self.site(target))


def phases() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {name: torch.rand(2, 3, 32, 32, generator=g) for name in ("before", "after")}


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "rgb branch": lambda: Subject(seeded(Fusion), fusion_inputs(), "rgb"),
    "depth branch": lambda: Subject(seeded(Fusion), fusion_inputs(), "depth"),
    "in place behind": lambda: Subject(seeded(Fusion), fusion_inputs(), "texture.net.0"),
    "shared, first call": lambda: Subject(seeded(Siamese), phases(), "encoder#0"),
    "shared, second call": lambda: Subject(seeded(Siamese), phases(), "encoder#1"),
    "cross-attention": lambda: Subject(seeded(Fusion), fusion_inputs(), "attn"),
    "sequence first": lambda: Subject(seeded(Fusion, batch_first=False), fusion_inputs(), "attn"),
    "frozen": lambda: Subject(seeded(Fusion).requires_grad_(False), fusion_inputs(), "rgb"),
}
every_subject = pytest.mark.parametrize("subject", [pytest.param(make, id=name) for name, make in SUBJECTS.items()])


def score_of_class(factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """What pytorch-grad-cam and torchcam take: from the output of one sample to its score."""
    return lambda output: factor * output[CLASS]


def pgc_raw(
    engine: type[pgc.base_cam.BaseCAM], model: nn.Module, layer: nn.Module, x: Tensor, factor: float = 1.0
) -> Tensor:
    """The engine's map on the layer's grid, before it is cut at zero and scaled."""
    targets = [score_of_class(factor)] * len(x)
    with engine(model, [layer]) as cam:
        cam(x, targets)
        acts, grads = ([t.numpy() for t in kept] for kept in (cam.activations_and_grads.activations,
                                                              cam.activations_and_grads.gradients))  # fmt: skip
        raw = cam.get_cam_image(x, layer, targets, acts[0], grads[0] if grads else None, eigen_smooth=False)
    return torch.as_tensor(raw)


def as_pgc_scales(saliency: Tensor, canvas: Tensor) -> np.ndarray:
    """What pytorch-grad-cam makes of a map: cut, scaled to 0 … 1, resized, and scaled once more."""
    size = (canvas.shape[-1], canvas.shape[-2])
    return scale_cam_image(scale_cam_image(saliency.relu().numpy(), size))


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Close in units of the largest value of the map."""
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * float(expected.abs().max()))
