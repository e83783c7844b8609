"""The benchmark measures every method, judges every goal by its numbers, and its meters read what there is to read."""

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from multicam import GradCAM, Site
from multicam.cam import catalogue

ROOT = Path(__file__).parents[2]
METHODS = [method.__name__ for method in (*catalogue.METHODS, *catalogue.INPUT_METHODS, *catalogue.WRAPPERS)]
BARE = "bare forward, `no_grad`"
COMMANDS = ("engine", "attention", "saliency", "contribution", "survey")
EACH = """
import runpy, sys
_, folder, *names = sys.argv
for name in names:
    sys.argv[1:] = ["--quick", "--repeat", "1", "--threads", "1", "--write", f"{folder}/{name}.md"]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        importlib.import_module("benchmarks.engine")
        yield importlib.import_module("benchmarks")


@pytest.fixture(scope="module")
def pages(benchmarks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page that each command writes, from one process for all, where shapes are not checked at every call."""
    folder = tmp_path_factory.mktemp("pages")
    for name in COMMANDS:
        mark = importlib.import_module(f"benchmarks.{name}").MARK
        (folder / f"{name}.md").write_text(f"What it costs.\n\n{mark}\n\nolder numbers\n")
    subprocess.run([sys.executable, "-c", EACH, str(folder), *COMMANDS], cwd=ROOT, check=True, capture_output=True)
    return {name: (folder / f"{name}.md").read_text() for name in COMMANDS}


@pytest.fixture(scope="module")
def page(pages: dict[str, str]) -> str:
    return pages["engine"]


@pytest.fixture(scope="module")
def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """The cells by table (the head of its first column) and row."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in page.split("\n\n"):
        if block.startswith("|"):
            (title, *_), _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
            found[title] = {name: cells for name, *cells in rows}
            assert len(found[title]) == len(rows)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_writing_replaces_the_older_numbers(name, pages):
    mark = importlib.import_module(f"benchmarks.{name}").MARK
    assert pages[name].startswith(f"What it costs.\n\n{mark}\n\n")
    assert "older numbers" not in pages[name]


def test_the_page_of_the_documentation_has_a_place_for_the_numbers(benchmarks):
    text = (ROOT / "docs" / "explanation" / "what-it-costs.md").read_text()
    assert text.count(benchmarks.engine.MARK) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method, tables):
    rows = [row.replace("(", " ").replace(",", " ").split() for rows in tables.values() for row in rows]
    assert any(method in words for words in rows)


def test_every_side_is_there(tables, benchmarks):
    sides = {title: [row.split()[0] for row in rows] for title, rows in tables.items()}
    gradient = len(benchmarks.gradient.GRADIENT)
    assert gradient == 8
    assert (sides["layer4"].count("**multicam**"), sides["layer4"].count("pytorch-grad-cam")) == (
        gradient + 2,
        gradient + 1,
    )
    assert sides["layer2"] == ["bare", "cut", "**multicam**", "pytorch-grad-cam"]
    assert sides["AblationCAM, ResNet-50, layer4"] == ["bare", "**multicam**", "pytorch-grad-cam"]
    scores = [rows for title, rows in sides.items() if title.startswith("ScoreCAM, ")]
    assert scores == [["bare", "**multicam**", "pytorch-grad-cam", "torchcam"]] * 2
    three = sides["maps of all three inputs"]
    assert (three[0], three.count("**multicam**"), len(three)) == ("bare", 4, 12)
    growth = {
        title: len(rows) for title, rows in tables.items() if "GradCAM, " in title or title.startswith("perturbing")
    }
    assert growth == {
        "GradCAM, one input": 5,
        "GradCAM, several inputs, 224 px": 4,
        "perturbing, beside a forward of 32": 8,
    }
    assert len(tables["goal"]) == 14


def test_every_number_is_positive_and_the_bare_forward_is_the_unit(tables):
    numbers = [
        float(cell)
        for title, rows in tables.items()
        if title != "goal"
        for cells in rows.values()
        for cell in cells
        if cell.replace(".", "").isdigit()
    ]
    assert len(numbers) > 300
    assert min(numbers) > 0
    units = [rows[BARE] for rows in tables.values() if BARE in rows]
    assert {(time_ratio, memory_ratio) for _, _, time_ratio, _, memory_ratio in units} == {("1.00", "1.00")}


def test_goals_are_judged_by_their_numbers(tables):
    for measured, limit, verdict in tables["goal"].values():
        way, number = limit.rsplit(" ", 1)
        value, bound = float(measured), float(number)
        if value != bound:  # of the three digits that are shown
            kept = value > bound if way == "at least" else value < bound
            assert verdict == ("reached" if kept else "**missed**")


def test_scores_without_a_channel_equal_those_of_full_passes(tables):
    measured, _, verdict = tables["goal"]["AblationCAM, scores against full forwards, largest error / score"]
    assert float(measured) <= 1e-4
    assert verdict == "reached"


def test_the_comparison_with_full_passes_sees_a_wrong_score(benchmarks, monkeypatch):
    setting = benchmarks.meter.Setting(torch.device("cpu"), 1, True)
    model, x = setting.resnet(50), setting.image(1)
    monkeypatch.setattr(Site, "rescore", lambda site, acts, sample=0: site.scores.expand(len(acts)))
    assert benchmarks.perturb.ablation_error(model, x, 8) > 1e-3


def test_only_a_full_backward_changes_the_gradients_of_parameters(page):
    assert "`param.grad` is changed by: pytorch-grad-cam, a wrapper per branch.\n" in page


def test_the_memory_meter_reads_a_known_allocation(page):
    assert "three tensors of 32 MiB, two at a time, read 64.0 MiB" in page


def test_a_graph_cut_by_hand_gives_the_same_map_and_leaves_the_model_alone(benchmarks):
    setting = benchmarks.meter.Setting(torch.device("cpu"), 1, True)
    model, x = setting.resnet(50), setting.image(2)
    by_hand = benchmarks.peers.cut_graph(model, model.get_submodule("layer2"), x)
    ours = GradCAM(model, "layer2")(x, benchmarks.peers.CLASS)
    cells = model.get_submodule("layer2")(torch.zeros(1, 32, *[side // 4 for side in x.shape[2:]]))[0, 0].numel()
    torch.testing.assert_close(by_hand * cells, ours)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """A meter looks for garbage before every run, which among all that tests import takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
def test_sides_take_turns_and_slow_ones_fewer(benchmarks):
    meter = benchmarks.meter
    calls = []
    sides = {
        "a": meter.Side(lambda: calls.append("a")),
        "b": meter.Side(lambda: calls.append("b")),
        "c": meter.Side(lambda: calls.append("c"), slow=True),
    }
    costs = meter.measure(nn.Linear(1, 1), sides, meter.Setting(torch.device("cpu"), 3, True))
    assert "".join(calls) == "ab" + "abc" + "bca" + "ab"
    assert {name: len(cost.times) for name, cost in costs.items()} == {"a": 3, "b": 3, "c": 2}
    assert costs["c"].memory is None


@pytest.mark.usefixtures("little_garbage")
def test_the_time_of_a_share_is_scaled_to_the_whole(benchmarks, monkeypatch):
    meter = benchmarks.meter
    monkeypatch.setattr(meter.time, "perf_counter", count(0, 3).__next__)  # seconds from look to look
    side = meter.Side(lambda: None, share=1 / 20)
    cost = meter.measure(nn.Linear(1, 1), {"some": side}, meter.Setting(torch.device("cpu"), 1, True))["some"]
    assert cost.median == pytest.approx(60)


@pytest.mark.parametrize(
    ("name", "goals"),
    [
        ("attention", ["recording, time / forward, ViT-B", "time / (forward + backward)", "memory held / that with the probabilities"]),
        ("saliency", ["| gradient, time /", "| guided_backprop, time /", "| integrated gradients, 2 steps", "| SmoothGrad, 2 samples"]),
        ("contribution", ["| 3 inputs, batch 4, time / forward", "| 4 inputs, batch 4, time / forward"]),
    ],
)  # fmt: skip
def test_further_benchmarks_judge_their_goals(name: str, goals: list[str], pages: dict[str, str]) -> None:
    assert all(goal in pages[name] for goal in goals)


def test_a_planted_cell_is_found_where_it_was_planted(benchmarks: ModuleType) -> None:
    planted = importlib.import_module("benchmarks.planted_cells")
    inputs, label, where, cell = planted.draw(12, torch.Generator().manual_seed(0))
    patterns = planted.patterns()
    assert torch.equal(patterns.flatten(1) @ patterns.flatten(1).T, 16 * torch.eye(planted.CLASSES))
    found = torch.stack(
        [nn.functional.conv2d(inputs[name], patterns[:, None], stride=planted.PATCH) for name in planted.INPUTS], 1
    )  # (b input class 6 6)
    peak = found.flatten(1).argmax(1)
    cells = planted.SIDE**2
    strongest = [(int(p) // (planted.CLASSES * cells), int(p) // cells % planted.CLASSES, int(p) % cells) for p in peak]
    assert strongest == list(zip(where.tolist(), label.tolist(), cell.tolist(), strict=True))
    maps = {name: torch.zeros(12, cells) for name in planted.INPUTS}
    for i in range(12):
        maps[planted.INPUTS[where[i]]][i, cell[i]] = 1
    grids = {name: m.view(12, planted.SIDE, planted.SIDE) for name, m in maps.items()}
    assert planted.hits(grids, where, cell) == (1, 1, 1)
    assert planted.hits({name: 1 - m for name, m in grids.items()}, where, cell) == (0, 0, 0)
