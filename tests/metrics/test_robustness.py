"""Infidelity and sensitivity against values by hand, linear models, and captum given the same perturbations."""

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from torch import Tensor, nn

from multicam import (
    GradCAM,
    HiResCAM,
    Inputs,
    Maps,
    MulticamError,
    gradient,
    input_x_gradient,
    integrated_gradients,
    occlusion,
)
from multicam.chance import seeded as generator
from multicam.chance import value_range
from multicam.metrics.explanations import explainer
from multicam.metrics.robustness import Infidelity, infidelity, rectangles, sensitivity
from multicam.saliency.attributions import Attributions
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))[:, None]


class Product(nn.Module):
    """The product of two inputs of one place each."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).flatten(1)


X = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]])


def test_infidelity_by_hand() -> None:
    drawn = rectangles(Inputs.of(X), ["0"], samples=6, patch=0.5, seed=0)["0"]  # one of the four places at a time
    taken = (drawn * X[:, 0]).sum((1, 2))
    found = infidelity(Sum(), X, X[:, 0] * 4, 0, samples=6, patch=0.5)
    assert found.changes.tolist() == found.predicted.tolist() == [taken.tolist()]
    assert found.mean.item() == found.scaled.item() == 0
    even = infidelity(Sum(), X, torch.full((1, 2, 2), 8.0), 0, samples=6, patch=0.5)  # 2 in each place
    assert even.mean.item() == pytest.approx((taken - 2).square().mean().item())
    assert even.scaled.item() == pytest.approx(taken.var(correction=0).item(), rel=1e-5)
    assert even.correlation.item() == 0
    above = infidelity(Sum(), X, X[:, 0] * 4, 0, samples=6, patch=0.5, baseline=1.0)
    assert above.changes.tolist() == [(taken - 1).tolist()]


def test_evidence_that_two_inputs_make_together_is_asked_for() -> None:
    inputs = {"x": torch.full((1, 1, 1, 1), 2.0), "y": torch.full((1, 1, 1, 1), 3.0)}
    found = infidelity(Product(), inputs, input_x_gradient(Product(), inputs, 0), 0, samples=300)
    assert set(found.changes[0].tolist()) == {6.0}
    assert sorted(set(found.predicted[0].tolist())) == [6.0, 12.0]  # either, and both: 6 too much
    both = (found.predicted == 12).float().mean().item()
    assert 0.25 < both < 0.42  # one of three choices
    assert found.mean.item() == pytest.approx(36 * both)


def test_the_numbers_of_an_infidelity() -> None:
    g = torch.Generator().manual_seed(0)
    predicted, changes = torch.randn(2, 9, generator=g), torch.randn(2, 9, generator=g)
    found = Infidelity(predicted, changes)
    for i in range(2):
        p, c = predicted[i].double(), changes[i].double()
        factors = torch.linspace(0, 3, 30001, dtype=torch.float64)
        best = (factors[:, None] * p - c).square().mean(1).min()
        assert found.scaled[i].item() == pytest.approx(best.item(), rel=1e-5)
        assert found.correlation[i].item() == pytest.approx(pearsonr(p, c).statistic, abs=1e-6)
    assert repr(Infidelity(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))) == (
        "Infidelity(mean 2, scaled 0.4, correlation 1)"
    )


def fusion() -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(Fusion).eval(), fusion_inputs(size=16)


@pytest.mark.parametrize("method", [gradient, input_x_gradient], ids=["gradient", "input-x-gradient"])
def test_captum_agrees_on_the_same_perturbations(method) -> None:
    model, inputs = fusion()
    names, values = tuple(inputs), tuple(inputs.values())
    found = method(model, inputs, 2)
    masks = rectangles(Inputs.of(inputs), names, samples=10, seed=3)

    def perturb(given: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        each = [masks[name].repeat(2, 1, 1)[:, None].expand_as(x).float() for name, x in zip(names, given, strict=True)]
        changed = tuple(x * (1 - z) for x, z in zip(given, each, strict=True))
        by = each if found.weights else [x * z for x, z in zip(given, each, strict=True)]
        return tuple(by), changed

    ours = infidelity(model, inputs, found, 2, samples=10, seed=3)
    for normalize, mine in ((False, ours.mean), (True, ours.scaled)):
        theirs = captum_infidelity(
            model, perturb, values, tuple(found.values()), target=2, n_perturb_samples=10, normalize=normalize
        )
        torch.testing.assert_close(mine, theirs.detach(), atol=1e-8, rtol=1e-4)


SHAPES = {
    "image": (2, 3, 6, 5),
    "clip": (2, 4, 3, 5, 6),
    "volume": (2, 1, 4, 5, 6),
    "signal": (2, 2, 9),
    "table": (2, 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("baseline", [0.0, 0.7], ids=["zero", "0.7"])
def test_exact_attributions_of_a_linear_model_are_faithful(shape: tuple[int, ...], baseline: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), 3))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for found in (
        gradient(model, x, 1, wrt="input"),
        integrated_gradients(model, x, 1, baseline=baseline, wrt="input", steps=2),
    ):
        result = infidelity(model, x, found, 1, samples=12, baseline=baseline)
        assert result.mean.max() < 1e-10
        assert result.correlation.min() > 0.9999


def test_maps_and_patches_are_densities_of_the_score() -> None:
    """Places that the model looks at one by one: their evidence is exactly what they bring."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    x = torch.randn(2, 3, 8, 8)
    exact = infidelity(model, x, HiResCAM(model, "1")(x, 2, signed=True), 2)
    assert exact.mean.max() < 1e-10
    assert exact.correlation.min() > 0.9999
    covered = occlusion(model, x, 2, patch=1)
    assert infidelity(model, x, covered, 2).mean.max() < 1e-10
    wrong = infidelity(model, x, Maps({"input": 3 * covered.maps()["input"]}), 2)
    assert wrong.mean.min() > 1e-6
    assert wrong.scaled.max() < 1e-10


def test_infidelity_is_the_same_in_any_batch() -> None:
    model, inputs = fusion()
    state = torch.random.get_rng_state()
    found = input_x_gradient(model, inputs, 2)
    whole = infidelity(model, inputs, found, 2, samples=20)
    torch.testing.assert_close(infidelity(model, inputs, found, 2, samples=20, batch_size=3).changes, whole.changes)
    turned = {name: x.flip(0) for name, x in inputs.items()}
    other = infidelity(model, turned, input_x_gradient(model, turned, 2), 2, samples=20)
    torch.testing.assert_close(other.mean, whole.mean.flip(0))
    assert not torch.equal(infidelity(model, inputs, found, 2, samples=20, seed=1).changes, whole.changes)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_inputs_without_an_explanation_stay_as_they_are() -> None:
    model = seeded(Captioned).eval()
    inputs = {"image": torch.rand(2, 3, 16, 16), "ids": torch.tensor([[1, 2], [3, 4]])}
    found = infidelity(model, inputs, torch.ones(2, 16, 16), 1, samples=5, output="logits", patch=1.0)
    with torch.no_grad():
        change = (model(**inputs)["logits"] - model(torch.zeros(2, 3, 16, 16), inputs["ids"])["logits"])[:, 1]
    torch.testing.assert_close(found.changes, change[:, None].expand(2, 5))
    assert found.predicted.tolist() == [[1.0] * 5] * 2


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rectangles_have_one_size_and_touch_something(h: int, w: int, patch: float, seed: int) -> None:
    call = Inputs(torch.zeros(1, 1, h, w), torch.zeros(1, 4, w))
    masks = rectangles(call, ["0", "1"], samples=8, patch=patch, seed=seed)
    areas = masks["0"].flatten(1).sum(1), masks["1"].sum(1)
    assert (areas[0] + areas[1] > 0).all()
    assert set(areas[0].tolist()) <= {0, max(1, round(patch * h)) * max(1, round(patch * w))}
    assert set(areas[1].tolist()) <= {0, max(1, round(patch * w))}


def test_captum_agrees_on_the_same_noise() -> None:
    model, inputs = fusion()
    names, values = tuple(inputs), tuple(inputs.values())

    def explain(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(gradient(model, dict(zip(names, given, strict=True)), 2).values())

    def perturb(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        noisy = []
        for i, x in enumerate(given):
            draws = [torch.rand(x.shape[1:], generator=generator(5, draw, i)) * 2 - 1 for draw in range(4)]
            noisy.append(x + 0.05 * value_range(x) * torch.stack(draws).repeat(2, 1, 1, 1))
        return tuple(noisy)

    theirs = sensitivity_max(explain, values, perturb, n_perturb_samples=4)
    ours = sensitivity(model, inputs, lambda *call: dict(gradient(*call)), 2, radius=0.05, samples=4, seed=5)
    assert ours.min() > 0.001
    torch.testing.assert_close(ours, theirs)


def test_sensitivity_by_hand() -> None:
    """Of the map `x^2` of one place, `|(x + d)^2 - x^2| / x^2`; the range of values decides the radius."""
    x = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])

    def explain(model: nn.Module, call: Inputs, target: object) -> Tensor:
        return call.leaves["x"][:, 0].square()

    draws = torch.stack([torch.rand(1, 1, 2, generator=generator(0, draw, 0)) * 2 - 1 for draw in range(3)])
    noisy = x[:1] + 0.1 * 2 * draws
    expected = ((noisy.square() - x[:1].square()).flatten(1).norm(dim=1) / 82**0.5).max()
    found = sensitivity(Sum(), x, explain, 0, radius=0.1, samples=3)
    assert found.tolist() == [pytest.approx(expected.item(), rel=1e-5), 0.0]
    assert sensitivity(Sum(), x, explain, 0, radius=0.0).tolist() == [0, 0]


def test_what_does_not_change_is_not_sensitive() -> None:
    inputs = fusion_inputs(size=16)
    edges = {name: x.mean(1).diff(dim=-1) for name, x in inputs.items()}
    assert sensitivity(seeded(Fusion), inputs, lambda *_: edges, 2).tolist() == [0, 0]


def test_an_empty_explanation_that_fills_is_infinitely_sensitive() -> None:
    x = torch.tensor([[[[0.0, 1.0]]]])

    def explain(model: nn.Module, call: Inputs, target: object) -> Tensor:
        return (call.leaves["x"][:, 0] - x[:, 0]).abs()

    assert sensitivity(Sum(), x, explain, 0).tolist() == [float("inf")]


def test_noise_moves_neither_target_nor_what_has_no_range() -> None:
    model = seeded(Captioned).eval()
    inputs = {
        "image": torch.rand(2, 3, 16, 16),
        "ids": torch.tensor([[1, 2], [3, 4]]),
        "mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    }
    calls = []

    def explain(given: nn.Module, call: Inputs, target: object) -> dict[str, Tensor]:
        calls.append((call, target))
        return {"image": torch.ones(2, 16, 16)}

    state = torch.random.get_rng_state()
    sensitivity(model, inputs, explain, output="logits", samples=2, radius=5.0)
    top = model(**inputs)["logits"].argmax(1).tolist()
    assert [target.index for _, target in calls] == [tuple(top)] * 3
    for call, _ in calls[1:]:
        assert torch.equal(call.leaves["ids"], inputs["ids"])
        assert torch.equal(call.leaves["mask"], inputs["mask"])
        assert not torch.equal(call.leaves["image"], inputs["image"])
    assert not torch.equal(calls[1][0].leaves["image"], calls[2][0].leaves["image"])
    assert torch.equal(torch.random.get_rng_state(), state)
    calls.clear()
    sensitivity(model, inputs, explain, 1, output="logits", samples=1, wrt="mask")
    assert torch.equal(calls[1][0].leaves["image"], inputs["image"])
    assert not torch.equal(calls[1][0].leaves["mask"], inputs["mask"])


def test_cams_are_sensitive_in_any_order() -> None:
    model, inputs = fusion()
    explain = explainer(GradCAM, {"rgb": "rgb"}, signed=True)
    found = sensitivity(model, inputs, explain, 2, samples=3)
    assert (found > 0).all()
    turned = sensitivity(model, {name: x.flip(0) for name, x in inputs.items()}, explain, 2, samples=3)
    torch.testing.assert_close(turned, found.flip(0))
    more = sensitivity(model, inputs, explain, 2, samples=6)
    assert (more >= found).all()


FUSION_ERRORS = [
    (torch.rand(2, 4, 4), "say which input the map is of"),
    ({}, "the explanation is empty"),
    (
        {"rgb": torch.rand(2, 4, 4)},
        r"does not lie on input 'rgb' \(2, 3, 16, 16\); it should be \(2, 16, 16\), or Attr",
    ),
    ({"rbg": torch.rand(2, 16, 16)}, "no input 'rbg'; did you mean 'rgb'"),
    ({"rgb": torch.full((2, 16, 16), torch.nan)}, "has NaN"),
    (Attributions({"rgb": torch.rand(2, 16, 16)}, torch.zeros(2)), r"it should be \(2, 3, 16, 16\)$"),
]


@pytest.mark.parametrize(
    ("found", "message"), FUSION_ERRORS, ids=["tensor", "none", "size", "name", "nan", "attributions"]
)
def test_explanations_that_do_not_fit(found: Tensor | dict[str, Tensor], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        infidelity(seeded(Fusion), fusion_inputs(size=16), found, 0)


def test_bad_numbers() -> None:
    for patch in (0.0, 1.5):
        with pytest.raises(MulticamError, match="patch is a share of the input's sides"):
            infidelity(Sum(), X, X[:, 0], 0, patch=patch)
    with pytest.raises(MulticamError, match="samples must be a whole number of at least 1"):
        infidelity(Sum(), X, X[:, 0], 0, samples=0)
    with pytest.raises(MulticamError, match="samples must be a whole number of at least 1"):
        sensitivity(Sum(), X, lambda *_: X[:, 0], 0, samples=0)
    with pytest.raises(MulticamError, match="there is no floating-point image input"):
        sensitivity(Sum(), X.byte(), lambda *_: X[:, 0], lambda out: out[:, 0].float())
