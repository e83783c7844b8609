"""What the pass that tells the places of layers costs, and how many layers of real architectures have places, as Markdown.

python -m benchmarks.survey --threads 1 --write docs/explanation/what-a-survey-costs.md
"""

import warnings
from collections.abc import Callable, Mapping

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.branches import Fused
from benchmarks.command import mark, run
from benchmarks.meter import Goal, Part, Setting, Side, measure
from benchmarks.tables import side_by_side, table
from multicam import Inputs
from multicam.call.tree import leaves
from multicam.errors import MulticamError
from multicam.watch.layer_table import list_layers
from multicam.watch.survey import Survey

MARK = mark("benchmarks.survey")
BARE = "bare forward, `no_grad`"
ONCE = "a survey, made once"
LISTED = "`list_layers` the first time"
IMAGE, CLIP = (1, 3, 64, 64), (1, 3, 8, 64, 64)
vision, video = torchvision.models, torchvision.models.video
# Small where a size can be said, with random weights: places do not depend on either.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision `resnet18`": (vision.resnet18, IMAGE),
    "torchvision `convnext_tiny`": (vision.convnext_tiny, IMAGE),
    "torchvision `efficientnet_b0`": (vision.efficientnet_b0, IMAGE),
    "torchvision `vit_b_16`": (lambda: vision.VisionTransformer(64, 16, 2, 2, 16, 32), IMAGE),
    "torchvision `swin_v2_t`": (vision.swin_v2_t, IMAGE),
    "torchvision `maxvit_t`": (lambda: vision.maxvit_t(input_size=(224, 224)), (1, 3, 224, 224)),
    "torchvision `deeplabv3`": (lambda: vision.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None), IMAGE),
    "torchvision `r3d_18`": (video.r3d_18, CLIP),
    "torchvision `swin3d_t`": (video.swin3d_t, CLIP),
    "torchvision `mvit_v2_s`": (video.mvit_v2_s, (1, 3, 16, 224, 224)),
    "timm `hiera_tiny_224`": (lambda: timm.create_model("hiera_tiny_224", img_size=(64, 64)), IMAGE),
    "timm `vit_small_patch14_reg4_dinov2`": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56),
        (1, 3, 56, 56),
    ),
    "timm `pvt_v2_b0`": (lambda: timm.create_model("pvt_v2_b0"), IMAGE),
    "timm `xcit_nano_12_p16_224`": (lambda: timm.create_model("xcit_nano_12_p16_224"), IMAGE),
    "timm `crossvit_tiny_240`": (lambda: timm.create_model("crossvit_tiny_240"), (1, 3, 240, 240)),
    "timm `mixer_s32_224`": (lambda: timm.create_model("mixer_s32_224"), (1, 3, 224, 224)),
    "timm `levit_128s`": (lambda: timm.create_model("levit_128s"), (1, 3, 224, 224)),
    "timm `twins_svt_small`": (lambda: timm.create_model("twins_svt_small"), (1, 3, 224, 224)),
}


def costs(setting: Setting) -> Part:
    """A survey beside a bare forward."""
    torch.manual_seed(0)
    small = setting.quick
    transformer = timm.create_model("vit_tiny_patch16_224", img_size=64 if small else 224).eval()
    fused, image = Fused(setting, 4), setting.image(1)
    models: dict[str, tuple[nn.Module, Mapping[str, Tensor]]] = {
        "ResNet-50": (setting.resnet(50), {"x": image}),
        "ViT-tiny": (transformer.to(setting.device), {"x": image}),
        "four ResNet-18, fused": (fused, dict.fromkeys(fused.names, image)),
    }
    tables, goals = [], []
    for name, (model, inputs) in models.items():
        call = Inputs(*inputs.values()).bind(model)
        sides = {
            BARE: Side(_bare(model, inputs)),
            ONCE: Side(lambda model=model, call=call: Survey(model, call)),  # type: ignore[misc]
            LISTED: Side(lambda model=model, call=call: _listed(model, call)),  # type: ignore[misc]
        }
        found = measure(model, sides, setting)
        tables.append(side_by_side(found, name))
        if name.startswith("four"):
            goals.append(
                Goal("`list_layers` of four inputs, time / forward", found[LISTED].median / found[BARE].median, 3)
            )
    text = "One sample, 224 px. What is remembered costs nothing more; the first map takes this pass beside its own."
    return Part("What a survey costs", text, tables, goals)


def places(setting: Setting) -> Part:
    """How many of the tensors that modules return have places."""
    rows = []
    chosen = list(ARCHITECTURES.items())[: setting.few(len(ARCHITECTURES), 1)]
    for name, (make, shape) in chosen:
        torch.manual_seed(0)
        with warnings.catch_warnings(action="ignore"):
            survey = Survey(model := make().eval(), Inputs(torch.rand(shape)).bind(model))
        counts = {"followed": 0, "by axes": 0, "none": 0}
        for each in survey.calls:
            for key, x in leaves(each.returned).items():
                if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 3 or not each.colours:
                    continue
                try:
                    found = survey.place(each, each.path, key, None)
                    counts["by axes" if found.by_axes else "followed"] += 1
                except MulticamError:
                    counts["none"] += 1
        total = sum(counts.values())
        rows.append([name, str(total), *map(str, counts.values()), f"{counts['followed'] / total:.0%}"])
    head = ["architecture", "tensors of three axes and more", "places followed", "by axes", "none", "followed"]
    text = (
        "Every tensor that a module returns, of three axes and more, that depends on the input. Those without places are mostly vectors with axes of size one, "
        "attention probabilities, class tokens alone, and what is made of channels."
    )
    return Part("Which layers have places", text, [table(head, rows)])


def _bare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return model(*inputs.values())

    return work


def _listed(model: nn.Module, call: Inputs) -> object:
    # As its first call of this kind: a hook of somebody else's is a kind of its own.
    hook = next(model.children()).register_forward_hook(lambda *_: None)
    found = list_layers(model, call)
    hook.remove()
    return found


PARTS = {"costs": costs, "places": places}

if __name__ == "__main__":
    run("benchmarks.survey", __doc__ or "", PARTS)
