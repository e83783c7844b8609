"""What the gradient methods cost on a ResNet-50, late and in the middle."""

import pytorch_grad_cam

from benchmarks.meter import Goal, Part, Setting, Side, measure
from benchmarks.peers import CLASS, bare_forward, cut_graph, grad_cam, torch_cam
from benchmarks.tables import side_by_side
from multicam import CAM, EigenCAM, GradCAM, explain_methods
from multicam.cam.catalogue import ONE_PASS

# By the names that they also have in pytorch-grad-cam; those that are left out read no gradient.
GRADIENT = [
    method
    for method in ONE_PASS
    if hasattr(pytorch_grad_cam, method.__name__) and method.__name__ not in ("EigenCAM", "FEM", "RandomCAM")
]
FORWARD, CUT, MANY = "bare forward, `no_grad`", "cut graph by hand, GradCAM", f"{len(GRADIENT)} methods"
BATCH = 8


def part(setting: Setting) -> Part:
    """Every gradient method beside pytorch-grad-cam's of the same name, then a middle layer beside a graph cut by hand."""
    model, x = setting.resnet(50), setting.image(BATCH)
    layers = model.get_submodule("layer4"), model.get_submodule("layer2")

    def ours(method: type[CAM], layer: str) -> Side:
        return Side(lambda: method(model, layer)(x, CLASS))

    def theirs(method: str, layer: int) -> Side:
        return Side(lambda: grad_cam(method, model, layers[layer], x), slow=method != "GradCAM")

    methods: list[type[CAM]] = [*GRADIENT, EigenCAM]
    last = {FORWARD: Side(bare_forward(model, x))}
    for method in methods:
        last[f"**multicam** {method.__name__}"] = ours(method, "layer4")
        last[f"pytorch-grad-cam {method.__name__}"] = theirs(method.__name__, 0)
    last[f"**multicam** `explain_methods`, {MANY}"] = Side(lambda: explain_methods(model, x, "layer4", GRADIENT, CLASS))
    last["torchcam GradCAM"] = Side(lambda: torch_cam("GradCAM", model, layers[0], x))
    middle = {
        FORWARD: Side(bare_forward(model, x)),
        CUT: Side(lambda: cut_graph(model, layers[1], x)),
        "**multicam** GradCAM": ours(GradCAM, "layer2"),
        "pytorch-grad-cam GradCAM": theirs("GradCAM", 1),
    }
    late, early = measure(model, last, setting), measure(model, middle, setting)

    unit = late[FORWARD]
    mine = {method: late[f"**multicam** {method.__name__}"] for method in methods}
    peer = {method: late[f"pytorch-grad-cam {method.__name__}"] for method in methods}
    assert unit.memory is not None
    many = late[f"**multicam** `explain_methods`, {MANY}"].median
    goals = [
        Goal("gradient methods, time / forward, the slowest", max(mine[m].median for m in GRADIENT) / unit.median, 1.1),
        Goal(
            "gradient methods, pytorch-grad-cam's time / multicam's, the least",
            min(peer[m].median / mine[m].median for m in GRADIENT),
            3,
            least=True,
        ),
        Goal(
            "gradient methods, extra memory / forward's, the most",
            max(mine[m].memory or 0 for m in GRADIENT) / unit.memory,
            1.2,
        ),
        Goal("middle layer, time / cut graph by hand", early["**multicam** GradCAM"].median / early[CUT].median, 1.05),
        Goal(f"{MANY} from one trace, time / one method", many / mine[GradCAM].median, 1.3),
        Goal("EigenCAM, time / forward", mine[EigenCAM].median / unit.median, 1.1),
    ]
    return Part(
        "Gradient methods",
        f"ResNet-50, batch {BATCH}, 224 px; a row ends with the maps at the input's size (torchcam's: on the grid). "
        "A graph cut by hand: frozen parameters, a hook that puts `out.detach().requires_grad_()` in the place of the "
        "layer's output, and a gradient with respect to that alone. Of pytorch-grad-cam's methods all but "
        "GradCAM were timed twice, without their memory.",
        [side_by_side(late, "layer4"), side_by_side(early, "layer2")],
        goals,
    )
