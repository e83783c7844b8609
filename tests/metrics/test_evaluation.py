"""Tables against values by hand on linear models, against each function called alone, and against the statistics of known noise."""

import csv
import math
import pickle
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import (
    EigenCAM,
    GradCAM,
    HiResCAM,
    LayerCAM,
    Maps,
    MulticamError,
    gradient,
    input_x_gradient,
    integrated_gradients,
)
from multicam.call.targets import Probability
from multicam.chance import mean_interval
from multicam.metrics import complexity, deletion, insertion, names_input, road, seen_through, sparseness
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.measures import METRICS, Explained, Metric
from multicam.metrics.randomization import parameter_randomization
from multicam.metrics.ranking import Comparison, Evaluation, Row
from multicam.metrics.robustness import infidelity, sensitivity
from tests.helpers.models import Fusion, fusion_inputs, seeded


class TwoMeans(nn.Module):
    """Class 0: the mean of `x` and three times that of `y`, which has fewer and so larger places; class 1: nothing."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        score = x.mean((1, 2, 3)) + 3 * y.mean((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


X, Y = torch.tensor([[[[0.4, 0.1], [0.3, 0.2]]]]), torch.tensor([[[[0.5]]]])
EXACT = {"x": X[:, 0], "y": 3 * Y[:, 0]}  # densities in units of the score, of mass 0.25 and 1.5
CORNER = torch.tensor([[[True, False], [False, False]]])
NOWHERE = torch.zeros(1, 1, 1, dtype=torch.bool)


def told(maps, comparable=True):
    """A method that says the same of whatever it is given."""
    return lambda model, inputs, target: Maps({name: m.clone() for name, m in maps.items()}, comparable)


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


LAYERS = {"rgb": "rgb", "depth": "depth", "texture": "texture"}


def test_each_metric_is_its_function_called_alone():
    """On a fusion of three inputs, whose class is chosen once."""
    model, inputs = seeded(Fusion), fusion_inputs(2, 16)
    explain, options = explainer(HiResCAM, LAYERS), {"steps": 3, "seed": 4}
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


def test_baseline_and_output_reach_the_metrics():
    class Two(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"other": image, "logits": image.sum((1, 2, 3))[:, None]}

    x = torch.rand(3, 1, 4, 4)
    methods = {"exact": lambda model, inputs, target: inputs.leaves["image"][:, 0]}
    found = evaluate(Two(), methods, ["deletion", "insertion"], [Batch(x, 0)], output="logits", baseline=0.25, steps=1)
    both = (x.sum((1, 2, 3)) + 4) / 2
    torch.testing.assert_close(found.of("exact", "deletion"), both)
    torch.testing.assert_close(found.of("exact", "insertion"), both)


def test_two_batches_are_one():
    """Quantus's ROAD counts the first batch only."""
    model, inputs = seeded(Fusion), fusion_inputs(5, 16)
    methods = {"hires": explainer(HiResCAM, LAYERS), "gradient": gradient}
    names = ["deletion", "road", "average drop", "energy", "complexity"]
    regions = {name: torch.rand(5, *x.shape[-2:]) > 0.5 for name, x in inputs.items()}
    part = [
        Batch({n: x[rows] for n, x in inputs.items()}, None, {n: r[rows] for n, r in regions.items()})
        for rows in (slice(0, 2), slice(2, 5))
    ]
    whole = evaluate(model, methods, names, [Batch(inputs, None, regions)], steps=2)
    parted = evaluate(model, methods, names, iter(part), steps=2)
    assert whole.samples == parted.samples == 5
    for method in methods:
        for name in names:
            torch.testing.assert_close(
                parted.of(method, name), whole.of(method, name), rtol=1e-3, atol=1e-4, equal_nan=True
            )
    assert whole.apart == {"gradient"}


def test_every_method_is_asked_once_for_a_batch_and_for_the_same_class():
    model, inputs = seeded(Fusion), fusion_inputs(2, 16)
    asked = []

    def spy(given, call, target):
        assert given is model
        asked.append(target)
        return {name: x[:, 0] for name, x in call.leaves.items()}

    evaluate(model, {"a": spy, "b": spy}, ["complexity", "sparseness"], [inputs, inputs], steps=2)
    top = model(**inputs).argmax(1).tolist()
    assert [list(target.index) for target in asked] == [top] * 4


def test_what_a_method_does_to_its_inputs_reaches_no_other():
    def spoils(model, call, target):
        maps = {name: x[:, 0].clone() for name, x in call.leaves.items()}
        for x in call.leaves.values():
            x.zero_()
        return maps

    data = {"x": X.clone(), "y": Y.clone()}
    found = evaluate(TwoMeans(), {"a": spoils, "b": spoils}, ["deletion"], [Batch(data, 0)], steps=2)
    assert found.mean("a", "deletion") == found.mean("b", "deletion") > 0
    assert torch.equal(data["x"], X)


def test_exact_evidence_is_better_than_none():
    """On a linear model input times gradient is exact, and random maps are chance."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    model[1].weight.data.normal_(generator=generator)
    data = [torch.rand(4, 1, 8, 8, generator=generator) for _ in range(3)]

    def random(model, call, target):
        return torch.rand(4, 8, 8, generator=generator)

    metrics = ["deletion", "insertion", "infidelity", "correlation", "complexity"]
    found = evaluate(model, {"exact": input_x_gradient, "random": random}, metrics, data, baseline=0.0, steps=8)
    for metric in metrics[:-1]:
        compared = found.compare("exact", "random", metric)
        assert compared.wins > 0.9
        assert compared.sure
        assert (compared.mean > 0) == (metric in ("insertion", "correlation"))
        back = found.compare("random", "exact", metric)
        assert (back.mean, back.wins) == (pytest.approx(-compared.mean), pytest.approx(1 - compared.wins))
    assert found.mean("exact", "correlation") == pytest.approx(1, abs=1e-5)
    exact = integrated_gradients(model, data[0], steps=4)
    expected = deletion(model, data[0], exact.maps(), steps=8).area
    torch.testing.assert_close(found.of("exact", "deletion")[:4], expected, rtol=1e-3, atol=1e-3)


def table(values, better="up"):
    return Evaluation({name: {"m": x} for name, x in values.items()}, {"m": better}, frozenset())


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    trials = torch.randn(300, 40, generator=generator)
    covered = 0
    for i, values in enumerate(trials):
        low, high = mean_interval(values, confidence=0.9, resamples=150, seed=i)
        covered += int(low <= 0 <= high)
    assert 0.83 < covered / 300 < 0.95
    low, high = mean_interval(trials[0], resamples=4000)
    error = trials[0].std(correction=0) / 40**0.5
    torch.testing.assert_close((high - low) / 2, 1.96 * error, rtol=0.06, atol=0.0)


def test_a_paired_difference_is_surer_than_two_intervals():
    hard = torch.arange(30.0)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
    found = table({"a": hard + 0.5 + 0.3 * noise, "b": hard})
    a, b = found.table()
    assert a.low < b.high  # they overlap
    compared = found.compare("a", "b", "m")
    assert compared.sure
    assert compared.mean == pytest.approx((0.5 + 0.3 * noise).mean().item(), abs=1e-5)
    assert compared.wins == pytest.approx((0.5 + 0.3 * noise > 0).double().mean().item())
    assert repr(compared).endswith("of 30 samples; a is better")
    noisy = table({"a": hard + noise, "b": hard}).compare("a", "b", "m")
    assert not noisy.sure
    assert repr(noisy).endswith("either may be better")


def test_less_may_be_better_and_one_sample_proves_nothing():
    found = table({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, "down")
    compared = found.compare("a", "b", "m")
    assert compared == Comparison("a", "b", "m", "down", -1.0, -1.0, -1.0, 1.0, 1)
    assert not compared.sure
    assert found.table() == [Row("a", "m", 1.0, 1.0, 1.0), Row("b", "m", 2.0, 2.0, 2.0)]


def test_the_table_shows_direction_interval_best_and_what_has_no_meaning(tmp_path):
    values = {
        "long name": {"up": torch.tensor([1.0, 3.0]), "down": torch.tensor([5.0, 5.0]), "own": torch.zeros(2)},
        "b": {"up": torch.full((2,), torch.nan), "down": torch.tensor([5.0, 7.0]), "own": torch.ones(2)},
    }
    found = Evaluation(values, {"up": "up", "down": "down", "own": None}, frozenset(["b"]))
    assert repr(found).splitlines()[:4] == [
        "                 up ↑        down ↓           own",
        "long name  2 (1 to 3)    5 (5 to 5) *  0 (0 to 0)",
        "b †                 -    6 (5 to 7)    1 (1 to 1)",
        "2 samples, * the best",
    ]
    assert found.markdown().splitlines()[:4] == [
        "|  | up ↑ | down ↓ | own |",
        "| --- | ---: | ---: | ---: |",
        "| long name | 2 (1 to 3) | **5 (5 to 5)** | 0 (0 to 0) |",
        "| b † | - | 6 (5 to 7) | 1 (1 to 1) |",
    ]
    found.csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "method": "long name", "metric": "down", "better": "down", "mean": "5.0", "low": "5.0", "high": "5.0", "samples": "2"
    }  # fmt: skip
    assert [(row["method"], row["mean"]) for row in rows if row["metric"] == "up"] == [
        ("long name", "2.0"),
        ("b", "nan"),
    ]
    assert repr(table({"a": torch.tensor([0.5])})).splitlines() == ["   m ↑", "a  0.5", "1 sample"]
    with pytest.raises(MulticamError, match="has no number for every sample of 'long name' and 'b'"):
        found.compare("long name", "b", "up")
    with pytest.raises(MulticamError, match="nothing says which direction of 'own' is better"):
        found.compare("long name", "b", "own")
    with pytest.raises(MulticamError, match="no method 'c'"):
        found.mean("c", "up")
    with pytest.raises(MulticamError, match="no metric 'upp'; did you mean 'up'"):
        found.mean("b", "upp")


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


def test_one_image_needs_no_names():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(2, 1, 4, 4)
    regions = torch.zeros(2, 4, 4, dtype=torch.bool)
    regions[:, 1] = True
    found = evaluate(model, {"exact": input_x_gradient}, ["energy", "names input"], [Batch(x, 1, regions)])
    maps = input_x_gradient(model, x, 1).maps()["input"].clamp(min=0)
    torch.testing.assert_close(found.of("exact", "energy"), maps[:, 1].sum(1) / maps.sum((1, 2)))
    assert found.of("exact", "names input").tolist() == [1, 1]


def test_cams_of_classes_of_every_kind():
    model, inputs = seeded(Fusion), fusion_inputs(2, 16)
    methods = {kind.__name__: explainer(kind, {"rgb": "rgb", "depth": "depth"}) for kind in (LayerCAM, EigenCAM)}
    regions = {"rgb": torch.zeros(2, 16, 16, dtype=torch.bool), "depth": torch.zeros(2, 8, 16, dtype=torch.bool)}
    regions["rgb"][0, :4], regions["depth"][1, 2] = True, True
    found = evaluate(model, methods, ["deletion", "names input", "energy within"], [Batch(inputs, 1, regions)], steps=2)
    assert found.apart >= {"EigenCAM"}
    assert found.of("EigenCAM", "names input").isnan().all()
    maps = EigenCAM(model, {"rgb": "rgb", "depth": "depth"})(inputs, 1)
    expected = [
        maps["rgb"][0, :4].sum() / maps["rgb"][0].sum(),
        maps["depth"][1, 2].sum() / maps["depth"][1].sum(),
    ]
    assert found.of("EigenCAM", "energy within").tolist() == pytest.approx([x.item() for x in expected])


def test_one_truth_for_each_sample():
    maps = {"rgb": torch.tensor([[[1.0, 1.0]], [[9.0, -9.0]], [[0.0, 0.0]]]), "depth": torch.tensor([[[3.0]], [[3.0]], [[0.0]]])}  # fmt: skip
    assert names_input(maps, ["depth", "rgb", "rgb"]).tolist() == [True, True, False]
    assert names_input(maps, ["rgb", "depth", "depth"]).tolist() == [False, False, False]
    with pytest.raises(MulticamError, match="2 names of inputs for 3 samples"):
        names_input(maps, ["rgb", "depth"])
    with pytest.raises(MulticamError, match="there is no map of input 'text'"):
        names_input(maps, ["rgb", "text", "rgb"])


def test_nothing_of_the_callers_is_changed():
    model, inputs = seeded(Fusion).train(), fusion_inputs(2, 16)
    before = {name: x.clone() for name, x in (*inputs.items(), *model.state_dict().items())}
    state = torch.get_rng_state()
    found = evaluate(model, {"gradient": gradient}, ["deletion", "infidelity", "randomization"], [inputs], steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in (*inputs.items(), *model.state_dict().items()))
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = pickle.loads(pickle.dumps(found))
    assert repr(again) == repr(found)


def failing(model, inputs, target):
    raise RuntimeError("out of luck")


BATCH = Batch({"x": X, "y": Y}, 0)


@pytest.mark.parametrize(
    ("methods", "metrics", "data", "message"),
    [
        ({"a": told(EXACT)}, ["deletoin"], [BATCH], "no metric 'deletoin'; did you mean 'deletion'"),
        ({"a": told(EXACT)}, [], [BATCH], "give metrics, each of another name"),
        ({"a": told(EXACT)}, ["seconds", "seconds"], [BATCH], "give metrics, each of another name"),
        ({}, ["seconds"], [BATCH], "give methods by name"),
        ({"a": GradCAM}, ["seconds"], [BATCH], r"explainer\(GradCAM, layers\) makes one of a class"),
        ({"a": GradCAM(nn.Conv2d(1, 2, 1), "")}, ["seconds"], [BATCH], r"is a function of model, inputs and target, not GradCAM\(Conv2d"),
        ({"a": told(EXACT)}, ["seconds"], [], "there is no data to evaluate on"),
        ({"a": told(EXACT)}, ["seconds"], X, "not a Tensor"),
        ({"a": told(EXACT)}, ["pointing"], [BATCH], "metric 'pointing' of method 'a', batch 0: nothing says where the evidence is"),
        ({"a": failing}, ["seconds"], [BATCH], "method 'a', batch 0: RuntimeError: out of luck"),
        ({"a": lambda *_: X}, ["seconds"], [BATCH], "method 'a', batch 0: say which input the map is of"),
        ({"a": told(EXACT)}, [Metric("m", lambda e: 3.0)], [BATCH], "metric 'm' of method 'a', batch 0: it must return one number for each"),
        ({"a": told(EXACT)}, ["seconds"], [BATCH, {"x": X}], "batch 1: "),
        ({"a": told(EXACT)}, ["seconds"], [Batch({"x": X, "y": Y}, 0, CORNER)], "say which input each region lies in"),
        ({"a": told(EXACT)}, ["seconds"], [Batch({"x": X, "y": Y}, 0, {"z": CORNER})], "no input 'z'"),
        ({"a": told(EXACT)}, ["energy"], [Batch({"x": X, "y": Y}, 0, {"y": CORNER})], "regions .* of input 'y' are not as large"),
        ({"a": told({"x": X[:, 0]})}, ["energy"], [Batch({"x": X, "y": Y}, 0, {"y": NOWHERE})], "there is no map of input 'y'"),
        ({"a": told(EXACT)}, ["energy"], [Batch({"x": X, "y": Y}, 0, {"y": NOWHERE})], "the region of sample 0 is empty"),
        ({"a": told(EXACT)}, ["energy within"], [Batch({"x": X, "y": Y}, 0, {"y": NOWHERE})], "sample 0 has no region"),
        ({"a": told(EXACT)}, ["names input"], [Batch({"x": X, "y": Y}, 0, {"x": CORNER, "y": ~NOWHERE})], "sample 0 has regions in 2 inputs"),
    ],
    ids=range(20),
)  # fmt: skip
def test_what_does_not_fit_is_refused(methods, metrics, data, message):
    with pytest.raises(MulticamError, match=message):
        evaluate(TwoMeans(), methods, metrics, data)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda model, inputs, target: {"x": torch.rand(2, 4, 4)}, "only methods that explain the same inputs compare"),
        (
            lambda model, inputs, target: {"x": torch.rand(2, 4, 4), "y": torch.rand(2, 2, 2)},
            r"the map \(2, 2, 2\) of input 'y'",
        ),
    ],
    ids=["one input", "coarse"],
)
def test_methods_that_map_other_places_do_not_compare(other: Any, message: str) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) + y.mean((1, 2, 3)))[:, None]

    batch = {name: torch.rand(2, 1, 4, 4) for name in "xy"}
    with pytest.raises(MulticamError, match=message):
        evaluate(Two(), {"gradient": gradient, "other": other}, ["complexity"], [batch])


def test_a_method_that_explains_one_of_several_inputs_names_none() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) + y.mean((1, 2, 3)))[:, None]

    batch = Batch({name: torch.rand(2, 1, 4, 4) for name in "xy"}, 0, {"x": torch.ones(2, 4, 4, dtype=torch.bool)})
    found = evaluate(Two(), {"x": lambda *_: {"x": torch.ones(2, 4, 4)}}, ["names input"], [batch])
    assert found.of("x", "names input").isnan().all()
