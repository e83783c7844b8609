"""What it costs to see attention beside a bare pass, in time and memory, as Markdown.

python -m benchmarks.attention --threads 1 --write docs/explanation/what-attention-costs.md
"""

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.command import mark, run
from benchmarks.meter import Goal, Part, Setting, Side, measure
from benchmarks.tables import side_by_side
from multicam import MulticamError, record_attention

BARE = "bare forward, `no_grad`"
LAZY = "**multicam** `record_attention`"
PROBS = '**multicam** `keep="probs"`'
MARK = mark("benchmarks.attention")


def recorded(model: nn.Module, x: Tensor, **options: str) -> Callable[[], object]:
    """A pass under `no_grad` whose attention is recorded."""

    def work() -> object:
        with torch.no_grad(), record_attention(model, **options) as record:  # type: ignore[arg-type]
            model(x)
        return record

    return work


def bare(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A pass under `no_grad`."""

    def work() -> object:
        with torch.no_grad():
            return model(x)

    return work


def forward(setting: Setting) -> Part:
    """Passes without gradients."""
    models: dict[str, tuple[nn.Module, Tensor]] = {
        "ViT-B/16, batch 2": (vit(setting), setting.image(2)),
        "Swin-T, batch 2": (swin(setting), setting.image(2)),
        "ResNet-50, batch 2, which has no attention": (setting.resnet(50), setting.image(2)),
    }
    tables, goals = [], []
    for name, (model, x) in models.items():
        sides = {BARE: Side(bare(model, x))}
        if "ResNet" in name:
            sides[LAZY] = Side(_refused(model, x))
        else:
            sides |= {LAZY: Side(recorded(model, x)), PROBS: Side(recorded(model, x, keep="probs"))}
        costs = measure(model, sides, setting)
        tables.append(side_by_side(costs, name))
        if "ViT" in name:
            goals.append(Goal("recording, time / forward, ViT-B", costs[LAZY].median / costs[BARE].median, 1.15))
    return Part("Recording", "Fused kernels; 224 px.", tables, goals)


def gradients(setting: Setting) -> Part:
    """A pass and its backward pass."""
    model, x = vit(setting), setting.image(2)

    def trained() -> object:
        return torch.autograd.grad(model(x)[:, 0].sum(), list(model.parameters()), allow_unused=True)

    def cut() -> object:
        """Back to the input only, as a saliency map does it."""
        given = x.clone().requires_grad_()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        found = torch.autograd.grad(model(given)[:, 0].sum(), given)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return found

    def seen() -> object:
        with record_attention(model) as record:
            score = model(x)[:, 0].sum()
        record.gradients(score)
        return [call.grad.mean() for call in record]

    sides = {
        "forward + backward to the input": Side(cut),
        "forward + backward to the parameters": Side(trained),
        "**multicam** attention and its gradients": Side(seen),
    }
    costs = measure(model, sides, setting)
    ours = costs["**multicam** attention and its gradients"].median
    goal = Goal(
        "with gradients, time / (forward + backward)", ours / costs["forward + backward to the parameters"].median, 1.1
    )
    text = (
        "ViT-B/16, batch 2, 224 px. The last row computes the gradient of every probability. The unit is the first row."
    )
    return Part("Gradients", text, [side_by_side(costs, "one score")], [goal])


def memory(setting: Setting) -> Part:
    """What stays in memory at a high resolution."""
    model, x = vit(setting, 448), setting.image(1, 448)
    sides = {BARE: Side(bare(model, x)), LAZY: Side(recorded(model, x)), PROBS: Side(recorded(model, x, keep="probs"))}
    costs = measure(model, sides, setting)
    kept = {name: _held(work) for name, work in ((LAZY, recorded(model, x)), (PROBS, recorded(model, x, keep="probs")))}
    text = (
        f"ViT-B/16, batch 1, 448 px. Held after the pass: {kept[LAZY] / 2**20:.1f} MiB of queries, keys and values, or "
        f"{kept[PROBS] / 2**20:.1f} MiB of probabilities and values."
    )
    goal = Goal("recording, memory held / that with the probabilities, 448 px", kept[LAZY] / kept[PROBS], 0.25)
    return Part("Memory", text, [side_by_side(costs, "448 px")], [goal])


def _held(work: Callable[[], object]) -> int:
    """The bytes of the matrices that a record holds."""
    record = work()
    assert isinstance(record, list)
    return sum(call.nbytes for call in record)


def _refused(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A pass without attention, which is recorded all the same and then refused."""

    def work() -> object:
        try:
            return recorded(model, x)()
        except MulticamError as refused:
            return refused

    return work


def vit(setting: Setting, size: int = 224) -> nn.Module:
    """A ViT-B/16 with random weights."""
    torch.manual_seed(0)
    size = max(size // 4, 64) if setting.quick else size
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3} if setting.quick else {}
    model: nn.Module = timm.create_model("vit_base_patch16_224", img_size=size, **small)
    return model.eval().to(setting.device)


def swin(setting: Setting) -> nn.Module:
    """A Swin-T of torchvision with random weights."""
    torch.manual_seed(0)
    if setting.quick:
        model: nn.Module = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4])
    else:
        model = torchvision.models.swin_t()
    return model.eval().to(setting.device)


PARTS = {"forward": forward, "gradients": gradients, "memory": memory}

if __name__ == "__main__":
    run("benchmarks.attention", __doc__ or "", PARTS)
