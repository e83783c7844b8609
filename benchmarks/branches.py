"""Models with several inputs, and what maps of all of them cost."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerAttribution, LayerGradCam
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.meter import Part, Setting, Side, measure
from benchmarks.peers import CLASS, bare_forward, grad_cam, targets
from benchmarks.tables import side_by_side
from multicam import CAM, GradCAM, HiResCAM, PackedModel, explain_methods
from multicam.cam.catalogue import ONE_PASS

BRANCHES = ("rgb", "frequency", "texture", "depth")

Maps = Sequence[Any]  # one map per branch `(b h w)`, a tensor or an array


class Fused(nn.Module):
    """A ResNet-18 trunk for each input; the tokens of `rgb` read those of all others by cross-attention."""

    def __init__(self, setting: Setting, branches: int) -> None:
        super().__init__()
        self.names = BRANCHES[:branches]
        for name in self.names:
            resnet = list(setting.resnet(18).named_children())
            # Without the pooling and the head.
            self.add_module(name, nn.Sequential(OrderedDict(resnet[:-2])))
        head = resnet[-1][1]
        assert isinstance(head, nn.Linear)
        self.attention = nn.MultiheadAttention(head.in_features, num_heads=8, batch_first=True)
        self.head = nn.Linear(head.in_features, 10)
        self.eval().to(setting.device)

    def forward(
        self,
        rgb: Float[Tensor, "b 3 h w"],
        frequency: Float[Tensor, "b 3 h w"] | None = None,
        texture: Float[Tensor, "b 3 h w"] | None = None,
        depth: Float[Tensor, "b 3 h w"] | None = None,
    ) -> Float[Tensor, "b 10"]:
        """The class scores `(b 10)`."""
        query = rearrange(self.get_submodule("rgb")(rgb), "b c h w -> b (h w) c")
        given = zip(self.names[1:], (frequency, texture, depth), strict=False)
        read = query
        if others := [self.get_submodule(name)(x) for name, x in given]:
            context = rearrange(torch.cat(others, dim=2), "b c h w -> b (h w) c")
            read = query + self.attention(query, context, context, need_weights=False)[0]
        scores: Tensor = self.head(read.mean(1))
        return scores


class OneInput(nn.Module):
    """The wrapper that users of a tool for one input write today: the other inputs are fixed."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], free: int) -> None:
        super().__init__()
        self.model, self.inputs, self.free = model, inputs, free

    def forward(self, x: Tensor) -> Tensor:
        """The class scores for `x` in the place of the free input."""
        call = list(self.inputs)
        call[self.free] = x
        scores: Tensor = self.model(*call)
        return scores


class Workload:
    """A model with several inputs, and every way to explain all of them that is compared."""

    def __init__(self, setting: Setting, branches: int, batch: int, size: int = 224) -> None:
        self.model = Fused(setting, branches)
        self.inputs = tuple(setting.image(batch, size) for _ in self.model.names)

    @property
    def rows(self) -> dict[str, Callable[[], object]]:
        """What is measured, by the name it has in the table; the bare forward is first."""
        return {
            "bare forward, `no_grad`": bare_forward(self.model, *self.inputs),
            "**multicam** GradCAM, layer4": lambda: self.multicam(GradCAM, "layer4"),
            "**multicam** HiResCAM, layer4": lambda: self.multicam(HiResCAM, "layer4"),
            "**multicam** GradCAM, layer2": lambda: self.multicam(GradCAM, "layer2"),
            f"**multicam** `explain_methods`, {len(ONE_PASS)} methods, layer4": self.multicam_methods,
            "pytorch-grad-cam on `PackedModel`, one engine": self.packed_grad_cam,
            "pytorch-grad-cam on `PackedModel`, an engine per tap": self.packed_grad_cam_by_tap,
            "torchcam on `PackedModel`": self.packed_torchcam,
            "captum on `PackedModel`, a call per tap": self.packed_captum,
            "pytorch-grad-cam, a wrapper per branch": self.raw_grad_cam,
            "torchcam, raw model": self.raw_torchcam,
            "captum, raw model, a call per branch": self.raw_captum,
        }

    def multicam(self, method: type[CAM], layer: str) -> Maps:
        """All branches in one call."""
        cam = method(self.model, {branch: f"{branch}.{layer}" for branch in self.model.names})
        return list(cam(self.inputs, CLASS).values())

    def multicam_methods(self) -> Maps:
        """All branches and all methods from one trace; the maps of the first method stand for the rest."""
        layers = {branch: f"{branch}.layer4" for branch in self.model.names}
        return list(explain_methods(self.model, self.inputs, layers, ONE_PASS, CLASS)["GradCAM"].values())

    def packed_grad_cam(self) -> Maps:
        """One engine for all taps. Its call averages them; the maps of single layers are read from what it keeps."""
        packed, x = self.packed()
        with pytorch_grad_cam.GradCAM(packed, packed.target_layers) as cam:
            cam(x, targets(len(x)))
            return [maps[:, 0] for maps in cam.compute_cam_per_layer(x, targets(len(x)), eigen_smooth=False)]

    def packed_grad_cam_by_tap(self) -> Maps:
        """What its manual teaches: a map of one layer is an engine with one layer."""
        packed, x = self.packed()
        return [grad_cam("GradCAM", packed, tap, x) for tap in packed.target_layers]

    def packed_torchcam(self) -> Maps:
        """One extractor with all taps."""
        packed, x = self.packed()
        with torchcam.methods.GradCAM(packed, [*packed.target_layers]) as cam:
            return [self._resized(grid[:, None]) for grid in cam(CLASS, packed(x))]

    def packed_captum(self) -> Maps:
        """One attribution per tap: it knows one layer at a time."""
        packed, x = self.packed()
        return [self._captum(packed, tap, x) for tap in packed.target_layers]

    def raw_grad_cam(self) -> Maps:
        """It takes one tensor: a wrapper and an engine for each branch."""
        return [
            grad_cam("GradCAM", OneInput(self.model, self.inputs, i), layer, self.inputs[i])
            for i, layer in enumerate(self._last_layers)
        ]

    def raw_torchcam(self) -> Maps:
        """The caller runs the model, so several inputs need no wrapper."""
        with torchcam.methods.GradCAM(self.model, [*self._last_layers]) as cam:
            return [self._resized(grid[:, None]) for grid in cam(CLASS, self.model(*self.inputs))]

    def raw_captum(self) -> Maps:
        """It takes tuples of inputs, and one layer at a time."""
        return [self._captum(self.model, layer, self.inputs) for layer in self._last_layers]

    def packed(self) -> tuple[PackedModel, Tensor]:
        """The proxy for tools with one input, and its input."""
        packed = PackedModel(self.model, self.inputs, layers=self._last_layers)
        return packed, packed.pack(self.inputs)

    @property
    def _last_layers(self) -> list[nn.Module]:
        return [self.model.get_submodule(f"{branch}.layer4") for branch in self.model.names]

    def _captum(self, model: nn.Module, layer: nn.Module, x: Any) -> Tensor:
        grid: Tensor = LayerGradCam(model, layer).attribute(x, target=CLASS, relu_attributions=True)
        return self._resized(grid)

    def _resized(self, grid: Tensor) -> Tensor:
        full: Tensor = LayerAttribution.interpolate(grid, self.inputs[0].shape[2:], "bilinear")
        return full[:, 0]


def gradients_stay(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether a run leaves every `param.grad` the same tensor with the same values."""
    parameters = list(model.parameters())
    marks = [torch.full_like(parameter, 0.5) for parameter in parameters]
    for parameter, mark in zip(parameters, marks, strict=True):
        parameter.grad = mark
    run()
    kept = all(p.grad is mark and bool((mark == 0.5).all()) for p, mark in zip(parameters, marks, strict=True))
    model.zero_grad(set_to_none=True)
    return kept


def part(setting: Setting) -> Part:
    """Maps of all inputs of a model with three branches."""
    workload = Workload(setting, branches=3, batch=4)
    rows = workload.rows
    changed = [name for name, run in rows.items() if not gradients_stay(workload.model, run)]
    costs = measure(workload.model, {name: Side(run) for name, run in rows.items()}, setting)
    return Part(
        "Three inputs at once",
        "Three ResNet-18 trunks fused by cross-attention, batch 4, 224 px; a row ends with one map of each input. "
        f"`param.grad` is changed by: {'; '.join(changed) or 'none'}.",
        [side_by_side(costs, "maps of all three inputs")],
    )
