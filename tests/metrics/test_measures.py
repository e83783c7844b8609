"""Each metric by hand on a linear model, and against its function called alone."""

import math
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, MulticamError
from multicam.call.targets import Probability
from multicam.metrics import complexity, deletion, insertion, road, seen_through, sparseness
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.measures import METRICS, Explained, Metric
from multicam.metrics.randomization import parameter_randomization
from multicam.metrics.robustness import infidelity, sensitivity
from tests.helpers.models import Fusion, fusion_inputs, seeded
from tests.helpers.two_means import CORNER, EXACT, TwoMeans, X, Y, told


def by_hand(metrics, maps=EXACT, comparable=True, **options):
    batch = Batch({"x": X, "y": Y}, 0, {"x": CORNER})
    found = evaluate(TwoMeans(), {"told": told(maps, comparable)}, metrics, [batch], **options)
    return {metric: found.of("told", metric).item() for metric in metrics}


def test_curves_by_hand():
    found = by_hand(["deletion", "insertion"], baseline=0.0, steps=8)
    # The one place of y is half of all area and goes first, then those of x, each an eighth.
    curve = torch.tensor([1.75, 0.25, 0.25, 0.25, 0.25, 0.15, 0.075, 0.025, 0.0])
    assert found["deletion"] == pytest.approx((curve[1:-1].sum() + curve[[0, -1]].mean()).item() / 8, abs=1e-6)
    risen = 1.75 - curve
    assert found["insertion"] == pytest.approx((risen[1:-1].sum() + risen[[0, -1]].mean()).item() / 8, abs=1e-6)


def test_regions_by_hand():
    names = ["pointing", "pointing within", "energy", "energy within", "names input"]
    found = by_hand(names)
    assert found["pointing"] == 0  # the peak of all is that of y
    assert found["pointing within"] == 1
    assert found["energy"] == pytest.approx(0.1 / 1.75)
    assert found["energy within"] == pytest.approx(0.4)
    assert found["names input"] == 0
    assert by_hand(names, {"x": EXACT["x"], "y": -EXACT["y"]}) == pytest.approx(
        {"pointing": 1, "pointing within": 1, "energy": 0.4, "energy within": 0.4, "names input": 1}
    )


def test_sharpness_is_that_of_the_evidence_in_all_places():
    shares = torch.tensor([0.1, 0.025, 0.075, 0.05, 1.5]).view(1, 1, 5)
    found = by_hand(["sparseness", "complexity"])
    assert found["sparseness"] == pytest.approx(sparseness(shares).item())
    assert found["complexity"] == pytest.approx(complexity(shares).item())


def test_the_average_drop_is_of_a_probability():
    found = by_hand(["average drop", "increase"])
    masked = (X * EXACT["x"] / 1.5).mean() + 3 * Y.mean()
    drop = 1 - (masked.sigmoid() / torch.tensor(1.75).sigmoid()).item()
    assert found == {"average drop": pytest.approx(drop, abs=1e-6), "increase": 0}
    with pytest.raises(MulticamError, match=r"metric 'average drop' of method 'told', batch 0: .* take Probability"):
        evaluate(
            TwoMeans(),
            {"told": told(EXACT)},
            ["average drop"],
            [Batch({"x": X, "y": Y}, lambda output: -output[:, 0])],
        )


def test_maps_that_do_not_compare_count_alike_and_name_no_input():
    scaled = {"x": 7 * EXACT["x"], "y": EXACT["y"]}
    names = ["deletion", "sparseness", "energy", "pointing", "names input", "energy within"]
    found = by_hand(names, scaled, comparable=False, steps=8)
    # Divided by their means: 1.6, 0.4, 1.2, 0.8 and 1 for y, which is half of all area.
    curve = torch.tensor([1.75, 1.65, 1.575, 0.075, 0.075, 0.075, 0.075, 0.025, 0.0])
    assert found["deletion"] == pytest.approx((curve[1:-1].sum() + curve[[0, -1]].mean()).item() / 8, abs=1e-6)
    even = torch.tensor([0.4, 0.1, 0.3, 0.2, 1.0]).view(1, 1, 5)
    assert found["sparseness"] == pytest.approx(sparseness(even).item())
    assert all(math.isnan(found[name]) for name in ("energy", "pointing", "names input"))
    assert found["energy within"] == pytest.approx(0.4)


def test_each_metric_is_its_function_called_alone():
    """On a fusion of three inputs, whose class is chosen once."""
    model, inputs = seeded(Fusion), fusion_inputs(2, 16)
    explain, options = explainer(HiResCAM, {name: name for name in inputs}), {"steps": 3, "seed": 4}
    regions = {name: torch.rand(2, *x.shape[-2:]) > 0.5 for name, x in inputs.items()}
    names = [name for name in METRICS if name not in ("names input", "seconds")]
    found = evaluate(model, {"hires": explain}, names, [Batch(inputs, None, regions)], **options)
    top = model(**inputs).argmax(1)
    maps = explain(model, inputs, top)
    through = seen_through(model, inputs, maps, Probability(top))
    perturbed = infidelity(model, inputs, maps, top, seed=4)
    random = parameter_randomization(model, inputs, explain, top, seed=4)
    expected = {
        "deletion": deletion(model, inputs, maps, top, **options).area,
        "insertion": insertion(model, inputs, maps, top, **options).area,
        "road": road(model, inputs, maps, top, **options).area,
        "road least": road(model, inputs, maps, top, order="least", **options).area,
        "average drop": through.drop,
        "increase": through.increased.float(),
        "infidelity": perturbed.scaled,
        "correlation": perturbed.correlation,
        "sensitivity": sensitivity(model, inputs, explain, top, seed=4),
        "randomization": torch.stack([values.abs().mean(0) for values in random.agreement.values()]).mean(0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found.of("hires", name), values, rtol=1e-4, atol=1e-5)
    assert set(names) - set(expected) == {
        "pointing", "pointing within", "energy", "energy within", "sparseness", "complexity"
    }  # fmt: skip
    inside = torch.stack(
        [(maps[n] * regions[n]).flatten(1).sum(1) / maps[n].flatten(1).sum(1).clamp(min=1e-12) for n in maps]
    )
    torch.testing.assert_close(found.of("hires", "energy within"), inside.mean(0))


def test_a_metric_of_ones_own_sees_everything(monkeypatch):
    monkeypatch.setattr("multicam.metrics.evaluation.perf_counter", count(0, 3).__next__)  # seconds from look to look
    seen = []

    def measure(e: Explained) -> Tensor:
        seen.append(e)
        return e.maps["x"].amax((1, 2)) > 0.3

    mine = Metric("mine", measure, "up")
    found = evaluate(TwoMeans(), {"told": told(EXACT)}, [mine, "seconds"], [Batch((X, Y), 0)], seed=3)
    assert found.of("told", "mine").tolist() == [1.0]
    assert found.mean("told", "seconds") == 3 / len(X)
    [e] = seen
    assert (e.seed, e.regions, list(e.inputs.leaves), e.target.index) == (3, None, ["x", "y"], 0)
    assert set(e.found) == set(e.maps) == {"x", "y"}


def test_a_method_that_explains_one_of_several_inputs_names_none() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) + y.mean((1, 2, 3)))[:, None]

    batch = Batch({name: torch.rand(2, 1, 4, 4) for name in "xy"}, 0, {"x": torch.ones(2, 4, 4, dtype=torch.bool)})
    found = evaluate(Two(), {"x": lambda *_: {"x": torch.ones(2, 4, 4)}}, ["names input"], [batch])
    assert found.of("x", "names input").isnan().all()
