"""How time and memory grow with the batch, the size of the image, the channels and the inputs."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from benchmarks.branches import Workload
from benchmarks.meter import Cost, Goal, Part, Setting, Side, measure
from benchmarks.peers import CLASS, bare_forward, grad_cam
from benchmarks.tables import growth
from multicam import GradCAM
from multicam.cam.masking import AblationCAM, ScoreCAM
from multicam.cam.weighted import WeightedCAM

BATCHES = 1, 4, 16
SIZES = 112, 224, 448
CHANNELS = 64, 256, 512, 2048
ROWS = 32  # the batch_size of the methods that perturb

Groups = dict[str, dict[str, Cost]]


def part(setting: Setting) -> Part:
    """A table for each of them."""
    setting = replace(setting, repeat=min(setting.repeat, 3))  # many rows, and no goal of a few percent
    model = setting.resnet(50)
    batches = {f"batch {batch}, 224 px": _grad_cam(model, setting.image(batch), setting) for batch in BATCHES}
    sizes = {f"batch 4, {size} px": _grad_cam(model, setting.image(4, size), setting) for size in SIZES}
    inputs = {f"{n} inputs": _inputs(n, setting) for n in (1, 2, 3, 4)}
    widths = {setting.few(channels, channels // 8): None for channels in CHANNELS}
    score = {f"ScoreCAM, {width} channels": _perturb(ScoreCAM, width, setting) for width in widths}
    ablation = {f"AblationCAM, {width} channels": _perturb(AblationCAM, width, setting) for width in widths}
    goals = []
    for method, groups in (("ScoreCAM", score), ("AblationCAM", ablation)):
        goals += [
            Goal(f"{method}, extra memory / that of a forward of {ROWS} rows, the most", _bound(groups), 1.5),
            Goal(f"{method}, extra memory with {max(widths)} channels / with {min(widths)}", _growth(groups), 1.1),
        ]
    return Part(
        "How it grows",
        "GradCAM of layer4 of a ResNet-50; of all inputs of a model with 1 to 4 ResNet-18 trunks fused by cross-attention, "
        "batch 4, where pytorch-grad-cam has a wrapper and an engine for each; and the methods that perturb on one image "
        f"of 64 px, `batch_size={ROWS}`, on a 1 x 1 convolution with as many channels behind a ResNet-18, beside a forward of "
        f"{ROWS} images.",
        [
            growth(batches | sizes, "GradCAM, one input"),
            growth(inputs, "GradCAM, several inputs, 224 px"),
            growth(score | ablation, f"perturbing, beside a forward of {ROWS}"),
        ],
        goals,
    )


def _grad_cam(model: nn.Module, x: Tensor, setting: Setting) -> dict[str, Cost]:
    layer = model.get_submodule("layer4")
    return _measured(
        model,
        bare_forward(model, x),
        lambda: GradCAM(model, "layer4")(x, CLASS),
        {"pytorch-grad-cam": lambda: grad_cam("GradCAM", model, layer, x)},
        setting,
    )


def _inputs(number: int, setting: Setting) -> dict[str, Cost]:
    workload = Workload(setting, number, batch=4)
    return _measured(
        workload.model,
        bare_forward(workload.model, *workload.inputs),
        lambda: workload.multicam(GradCAM, "layer4"),
        {"pytorch-grad-cam": workload.raw_grad_cam},
        setting,
    )


def _perturb(method: type[WeightedCAM], channels: int, setting: Setting) -> dict[str, Cost]:
    trunk = [*setting.resnet(18).children()][:-2]
    features = nn.Sequential(*trunk, nn.LazyConv2d(channels, 1), nn.ReLU())
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)).eval().to(setting.device)
    x = setting.image(1, 64)
    unit = bare_forward(model, x.expand(ROWS, -1, -1, -1))
    unit()  # makes the lazy parameters
    return _measured(model, unit, lambda: method(model, "0")(x, CLASS), {}, setting)


def _measured(
    model: nn.Module,
    unit: Callable[[], object],
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    setting: Setting,
) -> dict[str, Cost]:
    sides = {"forward": unit, "multicam": ours, **peers}
    return measure(model, {name: Side(run) for name, run in sides.items()}, setting)


def _bound(groups: Groups) -> float:
    """The most memory of multicam as a share of the forward's."""
    return max((costs["multicam"].memory or 0) / (costs["forward"].memory or 1) for costs in groups.values())


def _growth(groups: Groups) -> float:
    """The memory of multicam in the last group as a share of that in the first."""
    first, *_, last = (costs["multicam"].memory or 1 for costs in groups.values())
    return last / first
