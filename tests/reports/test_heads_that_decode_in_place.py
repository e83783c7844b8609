"""Detectors whose heads decode into what they computed: tools that go through the proxy get the gradients of a head that writes into copies.

YOLOv7's head could not be differentiated by any tool (yolov7 #2063), though the right map exists.
"""

import copy
from collections.abc import Callable
from typing import Any

import captum.attr as captum
import pytest
import torch
from pytorch_grad_cam import HiResCAM
from torch import Tensor, nn

import multicam as mc

Write = Callable[[Tensor], Any]


class Detector(nn.Module):
    """Colours and infrared; `into(x, write)` is `x` after `write(x)`, in place or in a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.ir, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.in_place = True

    def into(self, x: Tensor, write: Write) -> Tensor:
        x = x if self.in_place else x.clone()
        write(x)
        return x

    def forward(self, rgb: Tensor, ir: Tensor) -> Any:
        return self.decoded(self.head(self.rgb(rgb).relu() + self.ir(ir).relu()))

    def decoded(self, raw: Tensor) -> Any:
        raise NotImplementedError


class Yolo7(Detector):
    """Slices of the output of a sigmoid."""

    def decoded(self, raw: Tensor) -> Any:
        def boxes(y: Tensor) -> None:
            y[..., 0:2] = y[..., 0:2] * 2 - 0.5
            y[..., 2:4] = (y[..., 2:4] * 2) ** 2

        rows = raw.movedim(1, -1).flatten(1, 2)
        return self.into(rows.sigmoid(), boxes), [rows]


class YoloX(Detector):
    """An exponential of sizes, scaled by the stride, and centres on a grid, in the raw output itself; scores come from it before."""

    def decoded(self, raw: Tensor) -> Any:
        rows = raw.movedim(1, -1).flatten(1, 2)
        scores = rows[..., 4:5].sigmoid() * rows[..., 5:].softmax(-1)
        area = (rows[..., 2:4] * rows[..., 2:4]).sum(-1, keepdim=True)

        def centres(y: Tensor) -> None:
            y[..., :2] += torch.arange(y.shape[1])[:, None] % 8

        decoded = self.into(rows, centres)
        decoded = self.into(decoded, lambda y: y[..., 2:4].exp_())
        decoded = self.into(decoded, lambda y: y[..., 2:4].mul_(2))
        return torch.cat([decoded[..., :4], scores, (scores * area).sum(-1, keepdim=True)], -1), None


class CentreNet(Detector):
    """A heat map of which all but the peaks is put to zero, after its sigmoid was clamped in place."""

    def decoded(self, raw: Tensor) -> Any:
        heat = self.into(raw.sigmoid(), lambda h: h.clamp_(1e-3, 1 - 1e-3))
        weighted = heat * heat
        peaks = nn.functional.max_pool2d(heat, 3, 1, 1) == heat
        kept = self.into(heat, lambda h: h.masked_fill_(~peaks, 0.0))
        return (kept + weighted).movedim(1, -1).flatten(1, 2), None


class Corners(Detector):
    """Centres and sizes become corners in the same memory, as in torchvision's and ultralytics' helpers."""

    def decoded(self, raw: Tensor) -> Any:
        rows = raw.movedim(1, -1).flatten(1, 2).tanh()
        confidence = rows[..., 4:] * rows[..., :4].prod(-1, keepdim=True)

        def corners(y: Tensor) -> None:
            y[..., :2] -= y[..., 2:4] / 2
            y[..., 2:4] += y[..., :2]

        return torch.cat([self.into(rows, corners)[..., :4], confidence], -1), None


class Unlettered(Detector):
    """Boxes are put back to the size of the photo and cut at its border, each coordinate by itself."""

    def decoded(self, raw: Tensor) -> Any:
        rows = raw.movedim(1, -1).flatten(1, 2)
        boxes = rows[..., :4].exp()
        weights = (boxes * rows[..., 4:]).softmax(1)

        def scaled(y: Tensor) -> None:
            y[..., [0, 2]] -= 0.25
            y /= 0.5
            y[..., 0].clamp_(0, 1.5)
            y[..., 3].clamp_(0, 1.5)

        return torch.cat([weights * self.into(boxes, scaled), weights], -1), None


def score(rows: Tensor) -> Tensor:
    """The confidence and a class of one box; pytorch-grad-cam gives a target the rows of one sample."""
    return rows[..., 5, 4] * rows[..., 5, 6] + rows[..., 9, :4].sum(-1)


def made(kind: type[Detector]) -> tuple[Detector, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval(), {"rgb": torch.rand(1, 3, 16, 16), "ir": torch.rand(1, 1, 16, 16)}


def by_hand(model: Detector, x: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Activations of a layer and their gradients, in a twin that writes into copies."""
    twin, kept = copy.deepcopy(model), list[Tensor]()
    twin.in_place = False
    twin.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    (gradient,) = torch.autograd.grad(score(twin(**x)[0]).sum(), kept)
    return kept[0].detach(), gradient


HEADS = pytest.mark.parametrize("kind", [Yolo7, YoloX, CentreNet, Corners, Unlettered], ids=lambda kind: kind.__name__)


@HEADS
@pytest.mark.parametrize("layer", ["rgb", "ir"])
def test_pytorch_grad_cam_has_the_map_of_a_head_that_copies(kind: type[Detector], layer: str) -> None:
    model, x = made(kind)
    acts, gradient = by_hand(model, x, layer)
    evidence = (acts * gradient).sum(1)
    torch.testing.assert_close(
        mc.HiResCAM(model, {layer: layer}, output=0)(x, score, signed=True)[layer].mean(), evidence.mean() * 64
    )
    packed = mc.PackedModel(model, x, layers=[layer], output=0)
    for _ in range(2):
        with HiResCAM(packed, packed.target_layers) as engine:
            engine(packed.pack(x), [score])
            (seen,), (theirs,) = engine.activations_and_grads.activations, engine.activations_and_grads.gradients
        torch.testing.assert_close((seen * theirs).sum(1), evidence)


@HEADS
def test_captum_has_the_gradients_of_a_head_that_copies(kind: type[Detector]) -> None:
    model, x = made(kind)
    twin = copy.deepcopy(model)
    twin.in_place = False
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    expected = torch.autograd.grad(score(twin(**leaves)[0]).sum(), list(leaves.values()))
    packed = mc.PackedModel(model, x, output=0)
    saliency = captum.Saliency(lambda canvas: score(packed(canvas)))
    for _ in range(2):
        found = packed.unpack(saliency.attribute(packed.pack(x).requires_grad_(), abs=False))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.leaves[name], gradient)
