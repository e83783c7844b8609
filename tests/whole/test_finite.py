"""NaN and infinite numbers: every public entry refuses them, and names the input, the layer or the attention at fault."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from multicam import MulticamError
from multicam.cam.catalogue import INPUT_METHODS, METHODS
from multicam.compat import GradCAM
from multicam.metrics import Metric, deletion, infidelity, insertion, road, seen_through, sensitivity
from multicam.shares import Game

LAYERS = {"rgb": "rgb", "depth": "depth"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:no gradient passed a ReLU:UserWarning"),
    pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning"),
]


class TwoBranches(nn.Module):
    """The mean of both branches, of which that of depth is made of something with a hole in it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rgb, self.depth, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.ReLU()
            self.head = nn.Linear(4, 2)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        both = self.act(self.rgb(rgb)) + self.act(self.depth(self.hole(depth)))
        return self.head(both.mean((2, 3)))

    def hole(self, depth: Tensor) -> Tensor:
        return depth


class Spread(TwoBranches):
    """Divided by its spread, as in normalised depth."""

    def hole(self, depth: Tensor) -> Tensor:
        return depth / depth.std((1, 2, 3), keepdim=True)


class Logarithm(TwoBranches):
    """Its logarithm, as of disparities."""

    def hole(self, depth: Tensor) -> Tensor:
        return depth.amax((1, 2, 3), keepdim=True).log() * depth


class EmptyMask(TwoBranches):
    """Attention to the places with a depth, as behind a sensor with a range."""

    def hole(self, depth: Tensor) -> Tensor:
        scores = depth.flatten(1).masked_fill(depth.flatten(1) <= 0, -torch.inf)
        return depth * scores.softmax(1).view_as(depth)


class Root(TwoBranches):
    """Its root, whose slope at zero is infinite while the score is finite."""

    def hole(self, depth: Tensor) -> Tensor:
        return depth.sqrt()


class Norm(TwoBranches):
    """The length of its features: at zero, its slope is 0 / 0 where the root is written out."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        features = self.act(self.depth(depth))
        length = features.square().sum(1, keepdim=True).sqrt()
        return self.head((self.act(self.rgb(rgb)) + features / (1 + length)).mean((2, 3)))


@pytest.fixture
def two() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.rand(2, 3, 8, 8, generator=g) + 0.1, "depth": torch.rand(2, 1, 8, 8, generator=g) + 0.1}


def dark(two: dict[str, Tensor]) -> dict[str, Tensor]:
    """Samples that show nothing."""
    return {name: torch.zeros_like(x) for name, x in two.items()}


def maps(two: dict[str, Tensor]) -> mc.Maps:
    """Everything in the photo, and nothing in the depth."""
    return mc.Maps({"rgb": torch.ones(2, 8, 8), "depth": torch.zeros(2, 8, 8)})


def given(*call: Any) -> mc.Maps:
    return maps({})


REGION = {"depth": torch.ones(8, 8, dtype=torch.bool)}
NOT_NEGATIVE = lambda output: output[:, 0].exp()  # noqa: E731
# What takes depth away, in whole or for a part of the samples, in its own way.
WHAT_IFS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "contribution": lambda m, x: mc.contribution(m, x, 0),
    "contribution of groups": lambda m, x: mc.contribution(m, x, 0, players={"all": ["rgb", "depth"]}),
    "contribution beside references": lambda m, x: mc.contribution(m, x, 0, references=dark(x)),
    "game": lambda m, x: Game(m, x, target=0)(torch.tensor([[True, False]]), [1]),
    "region_contribution": lambda m, x: mc.region_contribution(m, x, 0, regions=1),
    "many regions": lambda m, x: mc.region_contribution(m, x, 0, regions={"depth": 4}, permutations=1),
    "double_occlusion": lambda m, x: mc.double_occlusion(m, x, REGION, 0, patch=8),
    "second_order_gradient": lambda m, x: mc.second_order_gradient(m, x, REGION, 0),
    "occlusion": lambda m, x: mc.occlusion(m, x, 0, patch=8),
    "deletion": lambda m, x: deletion(m, x, maps(x), 0),
    "insertion": lambda m, x: insertion(m, x, maps(x), 0, baseline=0.0),
    "seen_through": lambda m, x: seen_through(m, x, maps(x), NOT_NEGATIVE),
    "infidelity": lambda m, x: infidelity(m, x, maps(x), 0, patch=1.0, samples=8),
    "evaluate": lambda m, x: mc.evaluate(m, {"given": given}, ["deletion"], [mc.metrics.Batch(x, 0)]),
    "integrated_gradients": lambda m, x: mc.integrated_gradients(m, x, 0, steps=2),
    "rise": lambda m, x: mc.RISE(m, masks=8, cells=1, keep=0.1)(x, 0),
    "captum": lambda m, x: mc.captum_attribution("FeatureAblation", m, x, 0, feature_mask={n: torch.zeros_like(v[:1], dtype=torch.long) for n, v in x.items()}),
}  # fmt: skip


@pytest.mark.parametrize("model", [Spread, Logarithm, EmptyMask])
@pytest.mark.parametrize("name", WHAT_IFS)
def test_a_what_if_without_a_number_names_its_input(name: str, model: type[nn.Module], two: dict[str, Tensor]) -> None:
    with pytest.raises(MulticamError, match=r"input 'depth' .* the score of sample [01] is (NaN|-inf): "):
        WHAT_IFS[name](model().eval(), two)


def test_a_baseline_that_does_is_advised_and_does(two: dict[str, Tensor]) -> None:
    told = (
        r"with input 'depth' at its baseline 0.0 the score of sample 0 is NaN: .*such as baseline=\{'depth': 'blur'\}"
    )
    with pytest.raises(MulticamError, match=told):
        mc.contribution(Spread(), two, 0)
    assert mc.contribution(Spread(), two, 0, baseline={"depth": "blur"}).shapley.isfinite().all()
    with pytest.raises(MulticamError, match=r"patch of input 'depth' at its baseline 0 .*\{'depth': 'blur'\}"):
        mc.occlusion(Logarithm(), two, 0, patch=8, baseline={"depth": 0})
    assert mc.occlusion(Logarithm(), two, 0, patch=8, baseline={"depth": "blur"})["depth"].isfinite().all()
    with pytest.raises(MulticamError, match=r"input 'depth' at a reference .* give other references"):
        mc.contribution(EmptyMask(), two, 0, references=dark(two))


def test_players_at_fault_together_and_a_table(two: dict[str, Tensor]) -> None:
    class Sum(nn.Module):
        def forward(self, image: Tensor, table: Tensor) -> Tensor:
            return torch.stack([(image.mean((1, 2, 3)) + table.mean(1)).log()] * 2, 1)

    class Product(nn.Module):
        def forward(self, image: Tensor, table: Tensor) -> Tensor:
            return torch.stack([image.mean((1, 2, 3)) + table.log().sum(1)] * 2, 1)

    given = {"image": two["rgb"], "table": torch.rand(2, 3) + 0.1}
    told = "with input 'image' at its baseline 0.0 and input 'table' at its baseline 0.0 together the score of sample 0 is -inf"
    with pytest.raises(MulticamError, match=told):
        mc.contribution(Sum(), given, 0, players=["image", "table"])
    for options in ({}, {"budget": 60}):
        with pytest.raises(
            MulticamError, match=r"input 'table' at its baseline 0.0 .* -inf: .*such as baseline=\{'table': 1.0\}"
        ):
            mc.region_contribution(Product(), given, 0, regions={"image": 3, "table": 3}, permutations=1, **options)
    with pytest.raises(MulticamError, match=r"with regions of input 'table' at its baseline 0.0 the score"):
        mc.region_contribution(Product(), given, 0, regions={"table": 2})
    with pytest.raises(MulticamError, match=r"with input 'table' at its baseline 0.0 the score"):
        mc.contribution(Product(), given, 0, players={"all": ["table", "image"]})


def test_masks_of_channels(two: dict[str, Tensor]) -> None:
    """A channel that is the same everywhere masks everything."""
    for method in (mc.ScoreCAM, mc.SSCAM, mc.ISCAM):
        model = Spread()
        nn.init.zeros_(model.depth.weight[:1].data)
        options = {"std": 0.0, "samples": 1} if method is mc.SSCAM else {}
        with pytest.raises(MulticamError, match="with input 'depth' seen through a mask the score of sample 0 is NaN"):
            method(model, {"depth": "depth"}, **options)(two, 0)


def test_channels_without_which_there_is_no_score(two: dict[str, Tensor]) -> None:
    class Normed(TwoBranches):
        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            x = self.rgb(rgb)
            return self.head(x.sum((2, 3)) / x[:, :1].abs().sum((2, 3)) + self.depth(depth).mean((2, 3)))

    with pytest.raises(MulticamError, match="with the output of layer 'rgb' changed, the score of sample 0 is"):
        mc.AblationCAM(Normed(), {"rgb": "rgb"})(two, 0)


def test_noise_that_leaves_the_domain(two: dict[str, Tensor]) -> None:
    class Low(TwoBranches):
        def hole(self, depth: Tensor) -> Tensor:
            return (depth - 0.05).log()

    for ask in (mc.smoothgrad, mc.vargrad):
        with pytest.raises(
            MulticamError, match=r"with input 'depth' noisy the score of sample 0 is NaN: .* less noise"
        ):
            ask(Low(), two, 0, std=1.0, samples=2)
    with pytest.raises(MulticamError, match="with input 'depth' noisy the score"):
        mc.SmoothGradCAMPlusPlus(Low(), LAYERS, std=1.0)(two, 0)
    with pytest.raises(
        MulticamError, match=r"with noise of radius=1.0 on 'rgb', 'depth': the score of sample 0 is NaN"
    ):
        sensitivity(Low(), two, mc.gradient, 0, radius=1.0)
    with pytest.raises(MulticamError, match=r"places of input 'depth' imputed .* the score of sample 0 is NaN"):
        road(Spread(), two, mc.Maps({"depth": torch.rand(2, 8, 8)}), 0, steps=2, noise=0.0)


FEW: dict[Any, dict[str, int]] = {mc.RISE: {"masks": 16}, mc.SSCAM: {"samples": 2}, mc.ISCAM: {"steps": 2}}
# Everything that explains a score, of a call that holds NaN itself.
EXPLAIN: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    **{f.__name__: lambda m, x, f=f: f(m, x, 0) for f in (
        mc.gradient, mc.input_x_gradient, mc.guided_backprop, mc.deconvnet, mc.smoothgrad, mc.vargrad, mc.integrated_gradients,
        mc.occlusion, mc.contribution, mc.region_contribution, mc.attention,
    )},
    **{method.__name__: lambda m, x, method=method: method(m, LAYERS, **FEW.get(method, {}))(x, 0) for method in METHODS},
    **{method.__name__: lambda m, x, method=method: method(m, **FEW.get(method, {}))(x, 0) for method in INPUT_METHODS},
    "Augmented": lambda m, x: mc.Augmented(mc.GradCAM(m, LAYERS), ["rgb", "depth"])(x, 0),
    "SESS": lambda m, x: mc.SESS(mc.GradCAM(m, LAYERS), ["rgb", "depth"], scales=(1.0,))(x, 0),
    "RefineCAM": lambda m, x: mc.RefineCAM(mc.GradCAM(m, LAYERS))(x, 0),
    "FinerCAM": lambda m, x: mc.FinerCAM(mc.GradCAM(m, LAYERS), similar=(1,))(x, 0),
    "guided_gradcam": lambda m, x: mc.guided_gradcam(m, x, LAYERS, 0),
    "expected_gradients": lambda m, x: mc.expected_gradients(m, x, x, 0),
    "captum": lambda m, x: mc.captum_attribution("Saliency", m, x, 0),
    "trace": lambda m, x: mc.Trace(m, x, {}, 0),
    "deletion": lambda m, x: deletion(m, x, maps(x), 0),
    "evaluate": lambda m, x: mc.evaluate(m, {"gradient": mc.gradient}, ["complexity"], [x]),
    "compat": lambda m, x: GradCAM(m, [mc.Layer("rgb", onto="rgb")])(x, None),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAIN)
def test_a_score_that_is_nan_is_refused_with_the_input_that_holds_it(name: str, two: dict[str, Tensor]) -> None:
    class Attends(TwoBranches):
        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            tokens = self.rgb(rgb).flatten(2).mT
            seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            return self.head(seen.mean(1)) + super().forward(rgb, depth)

    two["depth"][1, 0, 3, 3] = torch.nan
    model = (Attends if name == "attention" else TwoBranches)().eval()
    with pytest.raises(MulticamError, match="the score of sample 1 is NaN: input 'depth' holds NaN in sample 1"):
        EXPLAIN[name](model, two)


def test_without_a_score_it_is_the_layer_or_the_input_that_is_named(two: dict[str, Tensor]) -> None:
    two["depth"][0, 0, 3, 3] = torch.nan
    with pytest.raises(MulticamError, match="activations of layer 'depth' are not finite"):
        mc.factorize(TwoBranches(), two, "depth", 2)
    for dream in (mc.activation_maximization, mc.deep_dream):
        with pytest.raises(MulticamError, match="input 'depth' holds NaN in sample 0, and an example tells"):
            dream(TwoBranches(), two, "depth", 1, onto="depth", steps=2)


GRADIENTS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    **{f.__name__: lambda m, x, f=f: f(m, x, 0) for f in (mc.gradient, mc.input_x_gradient, mc.guided_backprop, mc.deconvnet)},
    **{f.__name__: lambda m, x, f=f: f(m, x, 0, std=0.0, samples=2) for f in (mc.smoothgrad, mc.vargrad)},
    "integrated_gradients": lambda m, x: mc.integrated_gradients(m, x, 0, steps=2),
    "expected_gradients": lambda m, x: mc.expected_gradients(m, x, x, 0, samples=2),
    "second_order_gradient": lambda m, x: mc.second_order_gradient(m, x, {"rgb": torch.ones(8, 8, dtype=torch.bool)}, 0),
    "guided_gradcam": lambda m, x: mc.guided_gradcam(m, x, LAYERS, 0),
    "full": lambda m, x: mc.CompleteFullGrad(m)(x, 0),
    "captum": lambda m, x: mc.captum_attribution("Saliency", m, x, 0),
    "dream": lambda m, x: mc.deep_dream(m, x, "depth", onto="depth", octaves=1, steps=1, lr=1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_is_not_finite_is_refused_beside_a_finite_score(name: str, two: dict[str, Tensor]) -> None:
    two["depth"][0, 0, 3, 3] = 0
    model = Root().eval()
    assert model(**two).isfinite().all()
    with pytest.raises(
        MulticamError,
        match=r"(gradient of the score by (input 'depth'|the optimised input)|attribution of input 'depth') is",
    ):
        GRADIENTS[name](model, two)
    two["depth"][0, 0, 3, 3] = 0.1
    GRADIENTS[name](model, two)


@pytest.mark.parametrize(
    "method", [mc.GradCAM, mc.HiResCAM, mc.GradCAMPlusPlus, mc.EigenGradCAM, mc.LayerCAM, mc.XGradCAM]
)
def test_a_layer_whose_gradient_is_not_finite(method: Any, two: dict[str, Tensor]) -> None:
    model = Norm().eval()
    nn.init.constant_(model.depth.bias, -9)
    with pytest.raises(MulticamError, match="the gradient of the score by layer 'act#0' is NaN in sample 0"):
        method(model, {"depth": "act#0"})(two, 0)


class Masked(TwoBranches):
    """With a class that is masked out, as where answers are not allowed."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        scores = super().forward(rgb, depth)
        return torch.cat([scores, scores[:, :1].masked_fill(torch.ones(len(rgb), 1) > 0, -torch.inf)], 1)


@pytest.mark.parametrize(
    "name", sorted({*EXPLAIN, "double_occlusion", "infidelity", "insertion"} - {"trace", "attention", "OriginalCAM"})
)
def test_a_class_that_is_masked_out_changes_nothing_for_the_others(name: str, two: dict[str, Tensor]) -> None:
    ask = (EXPLAIN | WHAT_IFS)[name]
    torch.manual_seed(0)
    found, expected = ask(Masked().eval(), two), ask(TwoBranches().eval(), two)
    numbers = [list(tensors(result)) for result in (found, expected)]
    assert numbers[0]
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(MulticamError, match="the score of sample 0 is -inf: what a model masks out"):
        mc.Trace(Masked(), two, {}, 2)


def tensors(result: Any) -> list[Tensor]:
    """The numbers of a result."""
    if isinstance(result, dict):
        return list(result.values())
    for field in ("shapley", "contribution", "scores", "predicted"):
        if hasattr(result, field):
            value = getattr(result, field)
            return [value.shapley if field == "contribution" else value]
    if hasattr(result, "values"):
        return [x for of in result.values.values() for x in of.values()]
    return [torch.as_tensor(result)]


def test_numbers_of_ones_own(two: dict[str, Tensor]) -> None:
    """What a user gives: baselines, references, maps, measures."""
    model = TwoBranches()
    for baseline in (torch.nan, torch.inf, {"depth": torch.full((1, 8, 8), torch.nan)}):
        with pytest.raises(MulticamError, match=r"the baseline of input '(rgb|depth)' holds NaN or infinite values"):
            mc.contribution(model, two, 0, baseline=baseline)
    with pytest.raises(MulticamError, match="a reference of input 'rgb' holds NaN"):
        mc.expected_gradients(model, two, {name: x * torch.nan for name, x in two.items()}, 0)
    bad = mc.Maps({"rgb": torch.full((2, 8, 8), torch.nan)})
    for ask in (
        lambda: deletion(model, two, bad, 0),
        lambda: mc.evaluate(model, {"bad": lambda *_: bad}, ["complexity"], [two]),
        lambda: sensitivity(model, two, lambda *_: bad, 0),
    ):
        with pytest.raises(MulticamError, match="the map of input 'rgb' has NaN or infinite values in sample 0"):
            ask()
    silent = Metric("silent", lambda e: torch.full((2,), torch.nan))  # a measure may have no meaning
    found = mc.evaluate(model, {"gradient": mc.gradient}, [silent], [two])
    assert found.of("gradient", "silent").isnan().all()


def test_inputs_in_which_nan_means_missing() -> None:
    class Missing(TwoBranches):
        def hole(self, depth: Tensor) -> Tensor:
            return depth.nan_to_num(0.5)

    x = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    x["depth"][0, 0, :3] = torch.nan
    assert mc.contribution(Missing(), x, 0).shapley.isfinite().all()
    assert mc.contribution(Missing(), x, 0, baseline={"depth": torch.nan}).shapley.isfinite().all()
    assert mc.gradient(Missing(), x, 0)["depth"].isfinite().all()
    with pytest.raises(
        MulticamError, match="the baseline 'mean' of input 'depth' is not finite, because the input holds NaN"
    ):
        mc.contribution(Missing(), x, 0, baseline="mean")
    with pytest.raises(
        MulticamError,
        match="noise is measured by the range of an input's values, and input 'depth' has none in sample 0",
    ):
        mc.smoothgrad(Missing(), x, 0)
    with pytest.raises(MulticamError, match="the attribution of input 'depth' is NaN or infinite in sample 0"):
        mc.integrated_gradients(Missing(), x, 0, steps=2)
