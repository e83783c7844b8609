"""What Ablation-CAM and Score-CAM cost, and whether the shortcut gives the scores of full passes."""

import torch
from torch import Tensor, nn

from benchmarks.branches import Workload
from benchmarks.meter import Goal, Part, Setting, Side, measure
from benchmarks.peers import CLASS, ablation_cam, bare_forward, grad_cam, torch_cam
from benchmarks.tables import side_by_side
from multicam import Trace
from multicam.cam.masking import AblationCAM, ScoreCAM

FORWARD = "bare forward, `no_grad`"
SOME = 64  # channels that pytorch-grad-cam's AblationCAM is timed on, and that full passes check


def part(setting: Setting) -> Part:
    """Each method beside its peers, for one image."""
    deep, plain, x = setting.resnet(50), setting.resnet(18), setting.image(1)
    layer = plain.get_submodule("layer4")
    channels = Trace(deep, x, {"": "layer4"}, CLASS).sites[""].acts.shape[1]
    ablation = measure(
        deep,
        {
            FORWARD: Side(bare_forward(deep, x)),
            "**multicam** AblationCAM": Side(lambda: AblationCAM(deep, "layer4")(x, CLASS)),
            "pytorch-grad-cam AblationCAM": Side(
                lambda: ablation_cam(deep, deep.get_submodule("layer4"), x, SOME),
                share=(2 + SOME) / (2 + channels),  # forward passes: two, and one for each channel
            ),
        },
        setting,
    )
    score = measure(
        plain,
        {
            FORWARD: Side(bare_forward(plain, x)),
            "**multicam** ScoreCAM": Side(lambda: ScoreCAM(plain, "layer4")(x, CLASS), slow=True),
            "pytorch-grad-cam ScoreCAM": Side(lambda: grad_cam("ScoreCAM", plain, layer, x), slow=True),
            "torchcam ScoreCAM": Side(lambda: torch_cam("ScoreCAM", plain, layer, x, batch_size=32), slow=True),
        },
        setting,
    )
    workload = Workload(setting, branches=3, batch=1, size=112)
    packed, canvas = workload.packed()
    tap = packed.target_layers[0]
    branch = measure(
        workload.model,
        {
            FORWARD: Side(bare_forward(workload.model, *workload.inputs)),
            "**multicam** ScoreCAM": Side(
                lambda: ScoreCAM(workload.model, {"rgb": "rgb.layer4"})(workload.inputs, CLASS), slow=True
            ),
            "pytorch-grad-cam ScoreCAM on `PackedModel`": Side(
                lambda: grad_cam("ScoreCAM", packed, tap, canvas), slow=True
            ),
            "torchcam ScoreCAM on `PackedModel`": Side(
                lambda: torch_cam("ScoreCAM", packed, tap, canvas, batch_size=32), slow=True
            ),
        },
        setting,
    )
    (_, own, *peers), (_, own_branch, *packed_peers) = score.values(), branch.values()
    _, own_ablation, peer_ablation = ablation.values()
    goals = [
        Goal(
            "AblationCAM, pytorch-grad-cam's time / multicam's",
            peer_ablation.median / own_ablation.median,
            60,
            least=True,
        ),
        Goal("AblationCAM, scores against full forwards, largest error / score", ablation_error(deep, x, SOME), 1e-4),
        Goal("ScoreCAM, time / the fastest peer's", own.median / min(cost.median for cost in peers), 1),
        Goal(
            "ScoreCAM of one of three branches, the fastest peer's time / multicam's",
            min(cost.median for cost in packed_peers) / own_branch.median,
            2,
            least=True,
        ),
    ]
    return Part(
        "Methods that perturb",
        "One image of 224 px (112 px for three branches), `batch_size=32` on all sides; ScoreCAM was timed twice, and its "
        "memory is below. "
        f"pytorch-grad-cam's AblationCAM ablates {SOME} of the {channels} "
        f"channels, and its time is scaled to all of them by the number of forward passes. On `PackedModel` the peers "
        "mask and run all three branches.",
        [
            side_by_side(ablation, "AblationCAM, ResNet-50, layer4"),
            side_by_side(score, "ScoreCAM, ResNet-18, layer4"),
            side_by_side(branch, "ScoreCAM, one of three ResNet-18 branches, layer4"),
        ],
        goals,
    )


def ablation_error(model: nn.Module, x: Tensor, channels: int) -> float:
    """How far the scores without each of the first channels of layer4 are from full passes, as a share of the largest."""
    site = Trace(model, x, {"": "layer4"}, CLASS).sites[""]
    rows = torch.arange(channels, device=x.device)

    def without(acts: Tensor) -> Tensor:
        ablated = acts.expand(channels, -1, -1, -1).clone()
        ablated[rows, rows] = 0
        return ablated

    handle = model.get_submodule("layer4").register_forward_hook(lambda module, args, output: without(output))
    try:
        with torch.no_grad():
            full = model(x.expand(channels, -1, -1, -1))[:, CLASS]
    finally:
        handle.remove()
    found = site.rescore(without(site.acts))
    return float((found - full).abs().max() / full.abs().max())
