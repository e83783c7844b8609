"""Every other method beside the same one elsewhere, as multiples of a bare forward."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytorch_grad_cam
import torch
from torch import nn

from benchmarks.gradient import GRADIENT
from benchmarks.meter import Part, Setting, Side, measure
from benchmarks.peers import CLASS, bare_forward, grad_cam, targets, torch_cam
from benchmarks.tables import growth
from multicam import EigenCAM, GradCAM, GradCAMPlusPlus
from multicam.cam.base import InputCAM
from multicam.cam.catalogue import INPUT_METHODS, METHODS, WRAPPERS
from multicam.cam.components import KPCACAM
from multicam.cam.fullgrad import FullGrad
from multicam.cam.masking import ISCAM, SSCAM, AblationCAM, ScoreCAM
from multicam.cam.rise import RISE
from multicam.cam.sess import SESS
from multicam.cam.weighted import FEM, OriginalCAM, RandomCAM, ShapleyCAM, SmoothGradCAMPlusPlus
from multicam.cam.wrappers import Augmented, EigenSmoothed, FinerCAM, RefineCAM

PGC, TORCHCAM = "pytorch-grad-cam", "torchcam"
LAYER = "layer4"
NOISE, STEPS, MASKS = 35, 10, 4000  # the methods' defaults


def part(setting: Setting) -> Part:
    """A row for each method."""
    setting = replace(setting, repeat=min(setting.repeat, 3))  # many rows, and no goal of a few percent
    model, x = setting.resnet(18), setting.image(1, 112)
    layer = model.get_submodule(LAYER)
    few_masks = setting.few(200, 20)

    def ours(method: type, share: float = 1.0, **options: int) -> Side:
        return Side(lambda: method(model, LAYER, **options)(x, CLASS), share)

    def inside(method: type[InputCAM]) -> Side:
        return Side(lambda: method(model)(x, CLASS))

    def around(wrapped: Callable[[GradCAM], Callable[..., object]]) -> Side:
        return Side(lambda: wrapped(GradCAM(model, LAYER))(x, CLASS))

    def pgc(method: str, **options: bool) -> Side:
        return Side(lambda: grad_cam(method, model, layer, x, **options))

    def tcam(method: str, *options: str, share: float = 1.0, **named: int) -> Side:
        return Side(lambda: torch_cam(method, model, layer, x, *options, **named), share)

    def finer() -> None:
        with pytorch_grad_cam.FinerCAM(model, [layer]) as cam:
            cam(x, target_idx=CLASS)

    def full_grad() -> None:
        with pytorch_grad_cam.FullGrad(model, []) as cam:
            cam(x, targets(1))

    fused = {name: f"layer{name}" for name in "234"}
    pairs: dict[str, tuple[Side, str, Side | None]] = {
        "EigenCAM": (ours(EigenCAM), PGC, pgc("EigenCAM")),
        "KPCACAM": (ours(KPCACAM), PGC, pgc("KPCA_CAM")),
        "FEM": (ours(FEM), PGC, pgc("FEM")),
        "RandomCAM": (ours(RandomCAM), PGC, pgc("RandomCAM")),
        "OriginalCAM": (ours(OriginalCAM), TORCHCAM, tcam("CAM", "fc")),
        "ShapleyCAM": (ours(ShapleyCAM), PGC, pgc("ShapleyCAM")),
        "FullGrad": (inside(FullGrad), PGC, Side(full_grad)),
        "SmoothGradCAMPlusPlus": (ours(SmoothGradCAMPlusPlus), TORCHCAM, tcam("SmoothGradCAMpp", num_samples=4)),
        "ScoreCAM": (ours(ScoreCAM), TORCHCAM, tcam("ScoreCAM", batch_size=32)),
        f"SSCAM, 1 of {NOISE} noises": (
            ours(SSCAM, 1 / NOISE, samples=1),
            TORCHCAM,
            tcam("SSCAM", share=1 / NOISE, batch_size=32, num_samples=1),
        ),
        f"ISCAM, 1 of {STEPS} steps": (
            ours(ISCAM, 1 / STEPS, steps=1),
            TORCHCAM,
            tcam("ISCAM", share=1 / STEPS, batch_size=32, num_samples=1),
        ),
        "AblationCAM": (ours(AblationCAM), PGC, pgc("AblationCAM")),
        f"RISE, {few_masks} of {MASKS} masks": (
            Side(lambda: RISE(model, masks=few_masks)(x, CLASS), few_masks / MASKS),
            "",
            None,
        ),
        "EigenSmoothed(GradCAM)": (around(EigenSmoothed), PGC, pgc("GradCAM", eigen_smooth=True)),
        "Augmented(GradCAM)": (around(Augmented), PGC, pgc("GradCAM", aug_smooth=True)),
        "FinerCAM(GradCAM)": (around(FinerCAM), PGC, Side(finer)),
        "RefineCAM(GradCAMPlusPlus), 3 layers": (
            Side(lambda: RefineCAM(GradCAMPlusPlus(model, fused))(x, CLASS)),
            PGC,
            Side(lambda: _refine(model, list(fused.values()), x)),
        ),
        "SESS(GradCAM)": (around(SESS), PGC, Side(lambda: pytorch_grad_cam.SESS(model, [layer])(x, targets(1)))),
    }
    named = {*re.findall(r"^\w+", "\n".join(pairs), re.MULTILINE), *(method.__name__ for method in GRADIENT)}
    for methods, side in ((METHODS, ours), (INPUT_METHODS, inside), (WRAPPERS, around)):
        pairs |= {method.__name__: (side(method), "", None) for method in methods if method.__name__ not in named}
    unit = Side(bare_forward(model, x))
    groups = {}
    for name, (mine, peer, other) in pairs.items():
        sides = {"forward": unit, "multicam": mine} | ({peer: other} if other else {})
        groups[name] = measure(model, sides, setting)
    return Part(
        "Every other method",
        "ResNet-18, layer4, one image of 112 px; default options, and `batch_size=32` where there is one (torchcam's maps "
        "stay on the grid). Where a row says that it ran a part, its time is scaled to the whole.",
        [growth(groups, "method")],
    )


def _refine(model: nn.Module, layers: list[str], x: torch.Tensor) -> None:
    cam = pytorch_grad_cam.RefineCAM(model, [model.get_submodule(layer) for layer in layers])
    cam(x, targets(len(x)))
    for inner in cam.base_cam_per_layer:
        inner.activations_and_grads.release()
