"""Whole tables: every method by every metric, on batches of data, with nothing of the caller's changed."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import (
    EigenCAM,
    GradCAM,
    HiResCAM,
    LayerCAM,
    MulticamError,
    gradient,
    input_x_gradient,
    integrated_gradients,
)
from multicam.metrics import deletion
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.measures import Metric
from tests.helpers.models import Fusion, fusion_inputs, seeded
from tests.helpers.two_means import CORNER, EXACT, NOWHERE, TwoMeans, X, Y, told


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
    methods = {"hires": explainer(HiResCAM, {name: name for name in inputs}), "gradient": gradient}
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
