"""A number that is NaN or infinite is refused, and what is at fault is named: the input, the baseline, the layer, the parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, Layer, MulticamError, Trace, as_it_is
from multicam.call.scorer import Scorer
from multicam.call.targets import Probability
from multicam.watch.finite import Asked, Change, How, check_gradient, first, holding, shown


class Spread(nn.Module):
    """Divides depth by its own spread, which an input that is the same everywhere has not."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 2, 1), nn.Conv2d(1, 2, 1)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        depth = depth / depth.std((1, 2, 3), keepdim=True)
        return (self.rgb(rgb) + self.depth(depth)).mean((2, 3))


class Logarithm(nn.Module):
    """Of the mean of both inputs."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return torch.stack([(rgb.mean((1, 2, 3)) + depth.mean((1, 2, 3))).log()] * 2, 1)


class Attended(nn.Module):
    """Tokens that see those with a value above zero: a softmax over nothing, where there is none."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        seen = depth.flatten(1)[:, None] > 0
        weights = torch.zeros(len(rgb), 1, seen.shape[2]).masked_fill(~seen, -torch.inf).softmax(2)
        return torch.stack([(weights @ depth.flatten(1)[..., None])[:, 0, 0] + rgb.mean((1, 2, 3))] * 2, 1)


class Root(nn.Module):
    """Of depth, entry by entry: the score is finite at zero, and its slope is not."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return torch.stack([depth.sqrt().mean((1, 2, 3)) + rgb.mean((1, 2, 3))] * 2, 1)


@pytest.fixture
def two() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.rand(2, 3, 6, 6, generator=g) + 0.1, "depth": torch.rand(2, 1, 6, 6, generator=g) + 0.1}


def zeros(x: Tensor, n: int = 1) -> Tensor:
    return torch.zeros(n, *x.shape[1:])


@pytest.mark.parametrize("model", [Spread, Logarithm, Attended, Root])
def test_finite_scores_and_gradients_are_handed_out(model: Callable[[], nn.Module], two: dict[str, Tensor]) -> None:
    trace = Trace(model().eval(), two, {}, 0, wrt=["depth"])
    assert trace.scores.isfinite().all() and trace.input_grads["depth"].isfinite().all()
    changed = {"rgb": two["rgb"] + 0.5}
    torch.testing.assert_close(trace.again(two | changed).scores, Trace(trace.model, two | changed, {}, 0).scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"depth": torch.zeros(1, 1, 6, 6)},
            "the score of sample 1 is NaN: no input holds NaN .* divides by zero, as by the spread",
        ),
        (
            {"rgb": torch.full((1, 3, 6, 6), torch.nan)},
            "the score of sample 1 is NaN: input 'rgb' holds NaN in sample 1; fill in",
        ),
        ({"rgb": torch.full((1, 3, 6, 6), torch.inf)}, "input 'rgb' holds infinite values in sample 1"),
        (
            {"rgb": torch.full((1, 3, 6, 6), torch.nan), "depth": torch.full((1, 1, 6, 6), torch.nan)},
            "is NaN: input 'rgb' holds NaN in sample 1 and input 'depth' holds NaN in sample 1; fill in",
        ),
    ],
)
def test_the_unchanged_call_names_inputs_that_hold_nan(two: dict[str, Tensor], change: Any, message: str) -> None:
    given = two | {name: torch.cat([two[name][:1], row]) for name, row in change.items()}
    with pytest.raises(MulticamError, match=message):
        Trace(Spread(), given, {}, 0)


def test_a_broken_parameter_is_named(two: dict[str, Tensor]) -> None:
    model = Spread()
    nn.init.constant_(model.rgb.bias, torch.nan)
    with pytest.raises(MulticamError, match=r"is NaN: parameter 'rgb.bias' of Spread holds NaN or infinite values"):
        Trace(model, two, {}, 0)


def test_classes_that_are_masked_out_hinder_no_other(two: dict[str, Tensor]) -> None:
    class Masked(Root):
        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return super().forward(rgb, depth).masked_fill(torch.tensor([False, True]), -torch.inf)

    for target in (0, None, Probability(0)):
        assert Trace(Masked(), two, {}, target).scores.isfinite().all()
    with pytest.raises(
        MulticamError, match=r"the score of sample 0 is -inf: what a model masks out has no score .* another target"
    ):
        Trace(Masked(), two, {}, 1)


@pytest.mark.parametrize(
    ("model", "advised"),
    [(Spread, "'blur'"), (Logarithm, "'mean'"), (Attended, "'mean'")],
)
def test_a_what_if_names_the_input_and_a_baseline_that_does(
    model: Callable[[], nn.Module], advised: str, two: dict[str, Tensor]
) -> None:
    if model is Logarithm:
        two["rgb"][:] = 0
    trace = Trace(model().eval(), two, {}, 0)
    values = {name: torch.cat([two[name][1:], zeros(two[name])]) for name in ("rgb", "depth")}
    told = f"with input 'depth' at its baseline 0.0 the score of sample 1 is .* such as baseline={{'depth': {advised}}}"
    with pytest.raises(MulticamError, match=told):
        trace.rescore(values, 1, How(baseline=0.0))
    better = {"depth": torch.cat([two["depth"][1:], 0.3 * two["depth"][1:]])}
    assert trace.rescore(better, 1, How(baseline={"depth": 0.1})).isfinite().all()


class Spreads(nn.Module):
    """Divides each input by its own spread."""

    def forward(self, rgb: Tensor, depth: Tensor, mask: Tensor) -> Tensor:
        each = [x.mean((1, 2, 3)) / x.std((1, 2, 3)) for x in (rgb, depth)]
        return torch.stack([sum(each, mask.mean((1, 2, 3)))] * 2, 1)


def test_all_inputs_that_are_at_fault_alone_are_named_each_with_a_baseline_that_does(two: dict[str, Tensor]) -> None:
    trace = Trace(Spreads(), two | {"mask": two["depth"]}, {}, 0)
    gone = {name: zeros(x) for name, x in trace.inputs.leaves.items()}
    told = (
        r"with input 'rgb' at its baseline 0.0 and input 'depth' at its baseline 0.0, each alone, the score of sample 0 is NaN: .* "
        r"such as baseline=\{'rgb': 'blur', 'depth': 'blur'\}"
    )
    with pytest.raises(MulticamError, match=told):
        trace.rescore(gone, 0, How(baseline=0.0))


def test_inputs_that_are_at_fault_together_are_both_named(two: dict[str, Tensor]) -> None:
    trace = Trace(Logarithm(), two, {}, 0)
    both = {name: zeros(x) for name, x in two.items()}
    told = "with input 'rgb' at its baseline 0 and input 'depth' at its baseline 'mean' together the score of sample 0 is -inf"
    with pytest.raises(MulticamError, match=f"{told}: .* give another baseline, a tensor"):
        trace.rescore(both, 0, How(baseline={"rgb": 0, "depth": "mean"}))
    assert trace.rescore({"rgb": both["rgb"]}, 0).isfinite().all()


def test_where_no_baseline_does_those_that_were_tried_are_said() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.stack([(x == y).float().mean(1) / (x == y).all(1)] * 2, 1)

    x = torch.tensor([[0.2, 0.7]])
    trace = Trace(Same(), (x, x.clone()), {}, 0)
    told = "with input 'x' at its baseline 0.0 the score of sample 0 is NaN: .* nor at 1.0; give another baseline, a tensor .* references"
    with pytest.raises(MulticamError, match=told):
        trace.rescore({"x": zeros(x)}, 0, How(baseline=0.0, references=True))


def test_a_baseline_where_rounding_makes_the_score_is_not_advised(two: dict[str, Tensor]) -> None:
    """The spread of equal numbers is not always zero as computed."""
    trace = Trace(Spread().double(), {name: x.double() for name, x in two.items()}, {}, 0)
    level = {name: x.mean((2, 3), keepdim=True).expand(x.shape) for name, x in trace.inputs.leaves.items()}
    far = [
        not score.isfinite() or (score - trace.scores[i]).abs() > 1e3
        for i, score in enumerate(trace.model(**level)[:, 0])
    ]
    assert all(far)
    with pytest.raises(MulticamError, match=r"such as baseline=\{'depth': 'blur'\}"):
        trace.rescore({"depth": zeros(two["depth"]).double()}, 0, How(baseline=torch.zeros(1, 6, 6)))


def test_a_changed_pass_names_what_was_changed_and_whose(two: dict[str, Tensor]) -> None:
    trace = Trace(Spread(), two, {}, 0)
    noisy = {"rgb": two["rgb"][[1, 1, 0]] + 0.1, "depth": two["depth"][[1, 1, 0]]}
    noisy["depth"][1] = 3
    told = "with input 'depth' noisy the score of sample 1 is (NaN|-?inf): take less noise"
    with pytest.raises(MulticamError, match=told):
        trace.again(noisy, [1, 1, 0], how=How("noisy", "take less noise"))


def test_a_gradient_that_is_not_finite_is_refused_beside_a_finite_score(two: dict[str, Tensor]) -> None:
    two["depth"][1, 0, 2, 3] = 0
    trace = Trace(Root(), two, {}, 0, wrt=["rgb", "depth"])
    with pytest.raises(
        MulticamError, match="gradient of the score by input 'depth' is inf in sample 1 though the score is finite"
    ):
        _ = trace.input_grads
    again = trace.again(two, [0, 1], how=How("noisy"))
    with pytest.raises(MulticamError, match="in sample 1, with the inputs noisy, though"):
        _ = again.input_grads


def test_a_layer_is_named_whose_gradient_or_what_if_is_not_finite(two: dict[str, Tensor]) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.ReLU()

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            x = self.cut(depth) + 0 * rgb.mean()
            return torch.stack([x.mean((1, 2, 3)) / x.sum((1, 2, 3)) + x.sqrt().sum((1, 2, 3))] * 2, 1)

    two["depth"][0, 0, 0, 0] = -1
    site = Trace(Norm(), two, {"cut": Layer("cut", reshape=as_it_is)}, 0).sites["cut"]
    with pytest.raises(MulticamError, match="by layer 'cut' is inf in sample 0"):
        _ = site.grads
    with pytest.raises(MulticamError, match="with the output of layer 'cut' changed, the score of sample 1 is NaN"):
        site.rescore(torch.stack([site.acts[1], 0 * site.acts[1]]), 1)


def test_a_model_that_does_not_run_one_row_is_refused_all_the_same(two: dict[str, Tensor]) -> None:
    class Several(Spread):
        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            if len(rgb) == 1:
                raise ValueError("no fewer than two")
            return super().forward(rgb, depth)

    model = Several()
    trace = Trace(model, two, {}, 0)
    with pytest.raises(
        MulticamError, match=r"input 'depth' at its baseline 0.0 the score of sample 0 is NaN: .* give another"
    ):
        trace.again(two | {"depth": zeros(two["depth"], 2)}, how=How(baseline=0.0))


def test_an_input_that_may_hold_nan_is_not_refused() -> None:
    class Missing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.nan_to_num().mean(1)] * 2, 1)

    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    assert Trace(Missing(), x, {}, 0).scores.tolist() == [0.5, 2.5]
    assert Trace(Missing(), x, {}, 0).rescore({"x": x[:1] * 2}).tolist() == [1.0]


def test_words() -> None:
    assert [shown(torch.tensor(value)) for value in (torch.nan, torch.inf, -torch.inf)] == ["NaN", "inf", "-inf"]
    assert first(torch.tensor([[0.0, 1.0], [1.0, torch.inf]])) == 1
    how = How(baseline={"depth": torch.zeros(1, 1), "mask": 1})
    assert [how.of(name) for name in ("batch.depth", "mask", "rgb")] == [
        "at its baseline",
        "at its baseline 1",
        "at its baseline 0.0",
    ]
    call = Inputs(ids=torch.tensor([[1], [2]]), scale=torch.tensor(torch.inf), x=torch.tensor([[0.0], [torch.nan]]))
    assert holding(call, 0) == "input 'x' holds NaN in sample 1"
    assert holding(call.replace({"x": torch.zeros(2, 1)}), 0) == "input 'scale' holds infinite values"
    finite = torch.ones(2, 3)
    assert check_gradient(finite, "x") is finite
    asked = Asked(nn.Identity(), Inputs(x=finite), Scorer(0))
    assert asked.check(finite) is finite and Change(asked, None, How()).check(finite, asked.call) is finite
