"""Randomised copies: their order, what they keep, and what the maps of one branch say of another."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from multicam import GradCAM, HiResCAM, Inputs, MulticamError, gradient, input_x_gradient
from multicam.metrics.explanations import explainer
from multicam.metrics.localization import agreement
from multicam.metrics.randomization import Randomization, branch_of, parameter_randomization
from tests.helpers.models import Branch, Fusion, Siamese, fusion_inputs, seeded


class Late(nn.Module):
    """Two branches whose scores are added: neither's gradient depends on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.freq = Branch(3), Branch(1)
        self.rgb_head, self.freq_head = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, rgb: Tensor, freq: Tensor) -> Tensor:
        return self.rgb_head(self.rgb(rgb).mean((2, 3))) + self.freq_head(self.freq(freq).mean((2, 3)))


def late_inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.rand(2, 3, 32, 32, generator=g), "freq": torch.rand(2, 1, 32, 32, generator=g)}


def test_from_the_output_to_the_input() -> None:
    found = parameter_randomization(seeded(Late), late_inputs(), gradient, 1)
    assert found.stages == (
        "freq_head", "freq.net.3", "freq.net.1", "freq.net.0",
        "rgb_head", "rgb.net.3", "rgb.net.1", "rgb.net.0",
    )  # fmt: skip
    assert found.agreement["rgb"].shape == found.agreement["freq"].shape == found.scores.shape == (8, 2)
    # The head of one branch alone: its own map changes, and the other is exactly what it was.
    assert (found.agreement["rgb"][:4] == 1).all()
    assert (found.agreement["freq"][0] < 0.9).all()
    assert (found.agreement["rgb"][4:] < 0.9).all()


def test_a_branch_of_its_own() -> None:
    """Does the map of freq depend on the weights of its branch? And that of rgb?"""
    model, inputs = seeded(Late), late_inputs()
    assert branch_of(model, inputs, "freq") == ("freq", "freq_head")
    for name, other in (("freq", "rgb"), ("rgb", "freq")):
        found = parameter_randomization(model, inputs, gradient, 1, within=branch_of(model, inputs, name))
        assert len(found.stages) == 4
        assert all(stage.startswith(name) for stage in found.stages)
        assert (found.agreement[other] == 1).all()
        assert (found.agreement[name][-1] < 0.6).all()


def test_the_map_of_a_shared_score_follows_the_other_branch() -> None:
    """In a fusion by attention, what one branch finds decides what the model looks at in another."""
    model, inputs = seeded(Fusion), fusion_inputs()
    layers = {"rgb": "rgb", "depth": "depth"}
    found = parameter_randomization(model, inputs, explainer(HiResCAM, layers, signed=True), 1, within="texture")
    assert found.stages == ("texture.net.3", "texture.net.1", "texture.net.0")
    assert (found.agreement["depth"][-1] < 1).all()
    assert branch_of(model, inputs, "texture") == ("texture",)


def test_parts_that_are_not_called_go_with_what_calls_them() -> None:
    stages = parameter_randomization(seeded(Fusion), fusion_inputs(), gradient, 1).stages
    assert stages[:4] == ("head", "attn.out_proj", "attn", "texture.net.3")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(16, 8))
        self.project = nn.Conv2d(3, 8, 2, 2)
        self.mix = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.again = self.mix
        self.out = nn.Linear(8, 8)
        self.out.weight = self.mix[0].weight

    def forward(self, image: Tensor) -> Tensor:
        x = self.project(image).flatten(2).mT + self.place
        return self.out(self.again(self.mix(x))).mean(1)


def test_what_is_shared_is_randomised_once() -> None:
    model, x = seeded(Tokens), torch.rand(2, 3, 8, 8)
    kept: list[Tensor] = []

    def explain(model: nn.Module, call: Inputs, target: object) -> Tensor:
        kept.append(model.out.weight.detach().clone())
        return torch.ones(2, 8, 8)

    found = parameter_randomization(model, x, explain, 1)
    assert not torch.equal(kept[0], kept[1])
    assert all(torch.equal(kept[1], weight) for weight in kept[2:])
    # The tied weight belongs to `out`; of `mix.0` the bias is left. The model's own positions are used first, so come last.
    assert found.stages == ("out", "mix.0", "project", "")
    assert "(model)" in repr(found)
    only = parameter_randomization(model, x, gradient, 1, within="again")
    assert only.stages == ("mix.0",)


def test_an_encoder_of_two_inputs_is_nobodys_branch() -> None:
    inputs = {"before": torch.rand(2, 3, 16, 16), "after": torch.rand(2, 3, 16, 16)}
    model = seeded(Siamese)
    stages = parameter_randomization(model, inputs, gradient, 1).stages
    assert stages == ("head.2", "encoder.net.3", "encoder.net.1", "encoder.net.0")
    with pytest.raises(MulticamError, match="no module sees input 'before' and no other"):
        branch_of(model, inputs, "before")
    with pytest.raises(MulticamError, match="no input 'befor'; did you mean 'before'"):
        branch_of(model, inputs, "befor")


def test_each_alone_or_on_top_of_the_others() -> None:
    model, inputs = seeded(Late), late_inputs()
    cascading = parameter_randomization(model, inputs, gradient, 1)
    alone = parameter_randomization(model, inputs, gradient, 1, order="independent")
    assert alone.stages == cascading.stages
    assert torch.equal(alone.scores[0], cascading.scores[0])
    torch.testing.assert_close(alone.agreement["freq"][0], cascading.agreement["freq"][0])
    rgb = [stage.startswith("rgb") for stage in alone.stages]
    assert (alone.agreement["freq"][rgb] == 1).all()
    assert (alone.agreement["freq"][~torch.tensor(rgb)] < 1).all()
    # The heads are added, so what both change is what each changes.
    change = dict(zip(alone.stages, alone.scores - alone.before, strict=True))
    heads = parameter_randomization(model, inputs, gradient, 1, within=["freq_head", "rgb_head"])
    torch.testing.assert_close(heads.scores[-1] - heads.before, change["freq_head"] + change["rgb_head"])


def test_a_stage_is_the_reset_model_by_hand() -> None:
    model, inputs = seeded(Late), late_inputs()
    found = parameter_randomization(model, inputs, gradient, 1, within="rgb.net.1", seed=4)
    expected = seeded(Late)
    with torch.no_grad():
        expected.rgb.net[1].reset_parameters()  # weights of one, biases of zero, new statistics: nothing random
    torch.testing.assert_close(found.scores, expected(**inputs)[None, :, 1].detach())
    maps = [gradient(m, inputs, 1).maps()["rgb"] for m in (model, expected)]
    torch.testing.assert_close(found.agreement["rgb"], agreement(*maps)[None])
    torch.testing.assert_close(found.before, model(**inputs)[:, 1].detach())


class Own(nn.Module):
    """A parameter that nothing resets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 17.0).view(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0] * self.weight).sum((1, 2))[:, None]


def test_what_nothing_resets_is_shuffled() -> None:
    x = torch.ones(1, 1, 4, 4)
    kept: list[Tensor] = []

    def explain(model: nn.Module, call: Inputs, target: object) -> Tensor:
        kept.append(model.weight.detach().clone())
        return kept[-1][None]

    found = parameter_randomization(Own(), x, explain, 0)
    assert found.stages == ("",)
    assert torch.equal(kept[1].flatten().sort().values, kept[0].flatten())
    assert not torch.equal(kept[1], kept[0])
    assert found.scores.item() == pytest.approx(found.before.item())  # the scale is kept
    parameter_randomization(Own(), x, explain, 0, seed=1)
    assert not torch.equal(kept[3], kept[1])


def test_normalised_weights_are_randomised_too() -> None:
    """`reset_parameters` of a module whose weight is computed from others resets what nobody reads."""
    x = torch.rand(1, 3, 8, 8)
    for normed in (parametrizations.weight_norm, nn.utils.spectral_norm):
        torch.manual_seed(0)
        conv = normed(nn.Conv2d(3, 4, 3))
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        found = parameter_randomization(model, x, gradient, 1, within="0")
        assert (found.agreement["input"][-1] < 0.99).all()


def test_an_edge_detector_passes_no_test() -> None:
    def edges(model: nn.Module, call: Inputs, target: object) -> dict[str, Tensor]:
        return {name: leaf.mean(1).diff(dim=-1).abs() for name, leaf in call.leaves.items()}

    found = parameter_randomization(seeded(Late), late_inputs(), edges, 1)
    assert all((values == 1).all() for values in found.agreement.values())
    assert not torch.equal(found.scores[-1], found.before)


def test_the_gradient_of_what_was_learned_is_lost() -> None:
    """The score of a linear model trained to find a cross has the cross as its gradient."""
    g = torch.Generator().manual_seed(0)
    cross = torch.zeros(1, 9, 9)
    cross[:, 4], cross[:, :, 4] = 1, 1
    y = torch.arange(200) % 2
    x = torch.randn(200, 1, 9, 9, generator=g) + y.view(-1, 1, 1, 1) * cross
    model = nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(81, 32)), nn.ReLU(), seeded(lambda: nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    signed = lambda *call: {"input": gradient(*call)["input"][:, 0]}  # noqa: E731
    found = parameter_randomization(model, x[:20], signed, 1)
    assert found.stages == ("3", "1")
    assert found.mean["input"][-1].abs() < 0.2
    assert agreement(signed(model, x[:20], 1)["input"], cross.expand(20, -1, -1)).mean() > 0.5


def test_nothing_of_the_models_is_changed() -> None:
    model, inputs = seeded(Late).train(), late_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    first = parameter_randomization(model, inputs, gradient, 1)
    assert torch.equal(torch.random.get_rng_state(), rng)
    torch.manual_seed(99)
    again = parameter_randomization(model, inputs, gradient, 1)
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, parameter_randomization(model, inputs, gradient, 1, seed=1).scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_class_is_that_of_the_model_as_it_is() -> None:
    model, inputs = seeded(Late), late_inputs()
    top = model(**inputs).argmax(1)
    found = parameter_randomization(model, inputs, gradient)
    torch.testing.assert_close(found.scores, parameter_randomization(model, inputs, gradient, top.tolist()).scores)


class Explodes(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))
        nn.init.zeros_(self.bias)


def test_a_model_that_explodes_has_no_agreement() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), seeded(lambda: Explodes(4, 3))
    )
    nn.init.ones_(model[4].weight)
    x = torch.rand(2, 3, 8, 8)
    for explain in (gradient, explainer(GradCAM, "0")):
        with pytest.warns(
            UserWarning, match="with '4' randomised there is no map to compare: the score of sample 0 is NaN"
        ):
            found = parameter_randomization(model, x, explain, 1, within="4")
        assert found.agreement["input"].isnan().all()
        assert found.scores.isnan().all()
        assert "nan" in repr(found)


def test_a_constant_map_agrees_with_nothing() -> None:
    found = parameter_randomization(seeded(Late), late_inputs(), lambda *_: {"rgb": torch.ones(2, 32, 32)}, 1)
    assert (found.agreement["rgb"] == 0).all()


def test_maps_that_come_out_empty_do_not_warn() -> None:
    explain = explainer(GradCAM, {"rgb": "rgb"})
    found = parameter_randomization(seeded(Late), late_inputs(), explain, 0, within="rgb_head", seed=1)
    assert (found.agreement["rgb"] == 0).all()  # all its evidence became negative


def test_a_randomization_says_what_it_is() -> None:
    values = torch.tensor([[1.0, 0.5], [0.0, -0.5]])
    found = Randomization(("head", ""), {"rgb": values, "freq": values / 2}, 100 * values, torch.tensor([1.0, 2.0]))
    assert found.mean["rgb"].tolist() == [0.75, -0.25]
    assert repr(found).splitlines() == [
        "randomised  score  rgb    freq",
        "-           1.5    1.00   1.00",
        "head        75     0.75   0.38",
        "(model)     -25    -0.25  -0.12",
    ]


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise TypeError("cannot pickle this")


def test_what_cannot_be_done() -> None:
    model, inputs = seeded(Late), late_inputs()
    with pytest.raises(MulticamError, match="no layer in Late 'rbg'; did you mean 'rgb'"):
        parameter_randomization(model, inputs, gradient, 1, within=["freq", "rbg"])
    with pytest.raises(MulticamError, match=r"nothing in 'rgb\.act' of Late has parameters to randomise"):
        parameter_randomization(model, inputs, gradient, 1, within="rgb.act")
    with pytest.raises(MulticamError, match=r"Sequential cannot be copied.*cannot pickle this"):
        parameter_randomization(nn.Sequential(nn.Flatten(), Uncopied(4, 2)), torch.rand(1, 1, 2, 2), gradient, 1)
    with pytest.raises(MulticamError, match="say which input the map is of"):
        parameter_randomization(model, inputs, lambda *_: torch.ones(2, 32, 32), 1)


def test_a_linear_models_evidence_by_hand() -> None:
    """Of `w x` after the weights are shuffled: the ranks of `w' x` and `w x`."""
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    kept: list[Tensor] = []

    def explain(model: nn.Module, call: Inputs, target: object) -> Tensor:
        kept.append(model.weight.detach())
        return input_x_gradient(model, call, target).maps()["x"]

    found = parameter_randomization(Own(), x, explain, 0, order="independent")
    torch.testing.assert_close(found.agreement["x"][0], agreement((kept[0] * x[0]), (kept[1] * x[0])))


class Waves(nn.Module):
    """Weights that are a wave, and another one after a reset, so that other libraries can be given the same."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.data = torch.sin(3.0 * torch.arange(parameter.numel())).view(parameter.shape)


class WavyConv(Waves, nn.Conv2d):
    pass


class WavyLinear(Waves, nn.Linear):
    pass


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("cascading", {"5": (0.410531, -0.708608), "2": (-0.208196, 0.557738), "0": (-0.014011, -0.000778)}),
        ("independent", {"5": (0.410531, -0.708608), "2": (0.290568, 0.136081), "0": (-0.168544, -0.198810)}),
    ],
    ids=["cascading", "independent"],
)
def test_quantus_finds_the_same(order: str, expected: dict[str, tuple[float, float]]) -> None:
    """The numbers of Quantus 0.6.0: `MPRT(layer_order="top_down" or "independent", abs=False, normalise=False)`."""
    model = nn.Sequential(
        WavyConv(1, 4, 3), nn.ReLU(), WavyConv(4, 4, 3), nn.ReLU(), nn.Flatten(), WavyLinear(64, 3)
    ).eval()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.cos((k + 2.0) * torch.arange(parameter.numel())).view(parameter.shape))
    x = torch.sin(torch.arange(128.0)).view(2, 1, 8, 8)
    found = parameter_randomization(model, x, lambda *call: gradient(*call)["input"][:, 0], 1, order=order)
    assert found.stages == tuple(expected)
    torch.testing.assert_close(found.agreement["input"], torch.tensor(list(expected.values())), atol=1e-4, rtol=0)


def test_a_branch_may_be_compiled() -> None:
    model, inputs = seeded(Late), late_inputs()
    model.rgb.compile()
    found = parameter_randomization(model, inputs, gradient, 1, within=branch_of(model, inputs, "rgb"))
    assert found.stages == ("rgb_head", "rgb.net.3", "rgb.net.1", "rgb.net.0")
    plain = parameter_randomization(seeded(Late), inputs, gradient, 1, within="rgb_head")
    torch.testing.assert_close(found.scores[0], plain.scores[0])


def test_where_no_module_is_called_none_comes_last() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen = nn.functional.conv2d(x, self.stem.weight, self.stem.bias).relu().mean((2, 3))
            return nn.functional.linear(seen, self.head.weight, self.head.bias)

    model, x = seeded(Functional), torch.rand(2, 3, 8, 8)
    with pytest.raises(
        MulticamError, match=r"no module of Functional .* is called, .*explain the module that it was made of"
    ):
        parameter_randomization(model, x, gradient, 1)
    found = parameter_randomization(model, x, gradient, 1, within="head")
    assert found.stages == ("head",)
    assert not torch.allclose(found.scores[0], found.before)
