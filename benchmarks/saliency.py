"""What attributions cost beside a forward and backward pass, and beside captum, as Markdown.

python -m benchmarks.saliency --threads 1 --write docs/explanation/what-saliency-costs.md
"""

from collections.abc import Callable, Mapping

import captum.attr
import torch
from torch import Tensor, nn

from benchmarks.branches import Fused
from benchmarks.command import mark, run
from benchmarks.meter import Goal, Part, Setting, Side, measure
from benchmarks.peers import CLASS
from benchmarks.tables import side_by_side
from multicam.saliency.averaging import integrated_gradients, smoothgrad
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop, input_x_gradient
from multicam.saliency.occluding import occlusion

BARE = "forward + backward to the inputs"
MARK = mark("benchmarks.saliency")
VIEWS = {
    gradient: captum.attr.Saliency,
    input_x_gradient: captum.attr.InputXGradient,
    guided_backprop: captum.attr.GuidedBackprop,
    deconvnet: captum.attr.Deconvolution,
}


def backward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """The least that a gradient by the inputs can cost: no parameter has one."""

    def work() -> object:
        given = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        found = torch.autograd.grad(model(**given)[:, CLASS].sum(), list(given.values()))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return found

    return work


def views(setting: Setting) -> Part:
    """One forward and one backward pass each."""
    tables, goals = [], []
    for title, model, inputs in _models(setting):
        sides = {BARE: Side(backward(model, inputs))}
        for view, peer in VIEWS.items():
            sides[f"**multicam** `{view.__name__}`"] = Side(_ours(view, model, inputs))
            sides[f"captum `{peer.__name__}`"] = Side(_captum(peer(model), inputs))
        costs = measure(model, sides, setting)
        tables.append(side_by_side(costs, title))
        for view in VIEWS:
            ours = costs[f"**multicam** `{view.__name__}`"]
            goals.append(Goal(f"{view.__name__}, time / {BARE}, {title}", ours.median / costs[BARE].median, 1.1))
    text = "Each of captum's is its own for the same view; its ReLU rules miss ReLUs that are functions. 224 px."
    return Part("Single gradients", text, tables, goals)


def averages(setting: Setting) -> Part:
    """Many passes."""
    tables, goals = [], []
    for title, model, inputs in _models(setting):
        count, rows = setting.few(16, 2), setting.few(16, 4)
        noisy, batch = captum.attr.NoiseTunnel(captum.attr.Saliency(model)), len(next(iter(inputs.values())))
        # Ours always says what is missing of the sum, so theirs is asked to.
        path = {"n_steps": count, "internal_batch_size": rows, "return_convergence_delta": True}
        pairs = {
            f"integrated gradients, {count} steps": (
                _ours(integrated_gradients, model, inputs, steps=count, batch_size=rows),
                _captum(captum.attr.IntegratedGradients(model), inputs, **path),
            ),
            f"SmoothGrad, {count} samples": (
                _ours(smoothgrad, model, inputs, samples=count, batch_size=rows),
                _captum(noisy, inputs, nt_samples=count, nt_samples_batch_size=max(1, rows // batch), stdevs=0.15),
            ),
        }
        for work, (ours, peer) in pairs.items():
            sides = {BARE: Side(backward(model, inputs)), "**multicam**": Side(ours), "captum": Side(peer)}
            costs = measure(model, sides, setting)
            tables.append(side_by_side(costs, f"{title}, {work}"))
            ratio = costs["**multicam**"].median / costs["captum"].median
            goals.append(Goal(f"{work}, time / captum's, {title}", ratio, 1.1))
    text = f"{rows} rows in a pass, ours and theirs. The unit is one pass forward and back."
    return Part("Averaged and integrated gradients", text, tables, goals)


def covering(setting: Setting) -> Part:
    """Occlusion, which runs again only what depends on the covered input."""
    (title, model, inputs), *_ = _models(setting)
    side = next(iter(inputs.values())).shape[-1]
    patch, rows = side // setting.few(7, 2), setting.few(7, 2)
    names = tuple(inputs)
    sides = {
        BARE: Side(backward(model, inputs)),
        "**multicam** `occlusion`": Side(_ours(occlusion, model, inputs, patch=patch, batch_size=rows)),
        "captum `Occlusion`": Side(
            _captum(
                captum.attr.Occlusion(model),
                inputs,
                sliding_window_shapes=((3, patch, patch),) * len(names),
                strides=((3, patch, patch),) * len(names),
                perturbations_per_eval=max(1, rows // len(inputs[names[0]])),
            ),
            slow=True,
        ),
    }
    costs = measure(model, sides, setting)
    text = f"Patches of {patch} px, each input in turn, {rows} covered versions in a pass."
    return Part("Occlusion", text, [side_by_side(costs, title)])


def _models(setting: Setting) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Three ResNet-18 trunks with cross-attention, and one ResNet-50."""
    fused = Fused(setting, 3)
    return [
        ("three ResNet-18, batch 2", fused, {name: setting.image(2) for name in fused.names}),
        ("ResNet-50, batch 2", setting.resnet(50), {"x": setting.image(2)}),
    ]


def _ours(
    function: Callable[..., object], model: nn.Module, inputs: Mapping[str, Tensor], **options: object
) -> Callable[[], object]:
    return lambda: function(model, inputs, CLASS, **options)


def _captum(
    algorithm: captum.attr.Attribution, inputs: Mapping[str, Tensor], **options: object
) -> Callable[[], object]:
    def work() -> object:
        given = tuple(x.clone().requires_grad_() for x in inputs.values())
        return algorithm.attribute(given, target=CLASS, **options)

    return work


PARTS = {"views": views, "averages": averages, "covering": covering}

if __name__ == "__main__":
    run("benchmarks.saliency", __doc__ or "", PARTS)
