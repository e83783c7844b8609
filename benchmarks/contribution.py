"""What exact Shapley shares of the inputs cost, in bare forward passes, as Markdown.

python -m benchmarks.contribution --threads 1 --write docs/explanation/what-contribution-costs.md
"""

from collections.abc import Callable, Mapping
from itertools import product

import captum.attr
import torch
from torch import Tensor, nn

from benchmarks.branches import Fused
from benchmarks.command import mark, run
from benchmarks.meter import Goal, Part, Setting, Side, measure, seconds
from benchmarks.peers import CLASS
from benchmarks.tables import side_by_side
from multicam import contribution

BARE = "bare forward, `no_grad`"
OURS = "**multicam** `contribution`"
MARK = mark("benchmarks.contribution")


def exact(setting: Setting) -> Part:
    """All coalitions of three and four inputs."""
    tables, goals = [], []
    for branches, batch, limit in ((3, 4, 2.4), (3, 1, 2.6), (4, 4, 3)):
        model = Fused(setting, branches)
        inputs = {name: setting.image(batch) for name in model.names}
        sides = {
            BARE: Side(_bare(model, inputs)),
            OURS: Side(_ours(model, inputs)),
            f"all {2**branches} coalitions by hand": Side(_naive(model, inputs)),
            "captum `ShapleyValues`": Side(_captum(model, inputs), slow=True),
        }
        seconds(sides[BARE].run, setting.device)
        first = seconds(sides[OURS].run, setting.device)  # which proves what later ones rest on
        costs = measure(model, sides, setting)
        title = f"{branches} inputs, batch {batch}"
        tables.append(side_by_side(costs, title))
        goals.append(Goal(f"{title}, time / forward", costs[OURS].median / costs[BARE].median, limit))
        goals.append(Goal(f"{title}, first call, time / forward", first / costs[BARE].median, 3))
    text = "A ResNet-18 for each input, fused by cross-attention; 224 px. Captum tries every order, 3! or 4!, and not every coalition."
    return Part("Exact shares", text, tables, goals)


def _bare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return model(**inputs)

    return work


def _ours(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    return lambda: contribution(model, inputs, CLASS)


def _naive(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return [
                model(**{name: x * there for (name, x), there in zip(inputs.items(), some, strict=True)})
                for some in product([0.0, 1.0], repeat=len(inputs))
            ]

    return work


def _captum(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    masks = tuple(torch.full_like(x[:1], i, dtype=torch.long) for i, x in enumerate(inputs.values()))
    return lambda: captum.attr.ShapleyValues(model).attribute(tuple(inputs.values()), target=CLASS, feature_mask=masks)


PARTS = {"exact": exact}

if __name__ == "__main__":
    run("benchmarks.contribution", __doc__ or "", PARTS)
