"""What is maximised: each number by its formula, from a hook or a full pass, and everything else of the call as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import Layer, MulticamError, tokens
from multicam.call.targets.scores import TopClass
from multicam.inside.objectives import Objective
from multicam.watch.undisturbed import undisturbed
from tests.helpers.models import Captioned, Fusion, Overwriting, Siamese, fusion_inputs, seeded

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def objective_of(model: nn.Module, inputs: Any, onto: str | None, **asked: Any) -> Objective:
    with undisturbed(model, graph=True) as memory:
        return Objective.of(model, memory, inputs, onto, **asked)


def numbers(objective: Objective, images: Tensor) -> Tensor:
    with torch.no_grad():
        return objective(images)


def acts(model: nn.Module, path: str, call: int = 0, **inputs: Tensor) -> Tensor:
    """What a module returned in a plain pass, before anything wrote into it."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    with model.get_submodule(path).register_forward_hook(keep), torch.no_grad():
        model(**inputs)
    return kept[call]


def beside(images: Tensor) -> dict[str, Tensor]:
    """The images with the other inputs of the first sample."""
    return {name: x[:1].expand(len(images), *x.shape[1:]) for name, x in fusion_inputs().items()} | {"rgb": images}


ASKED: dict[str, tuple[dict[str, Any], Any]] = {
    "channels": ({"layer": "rgb", "channel": [2, 0, 5]}, lambda a: a[range(3), [2, 0, 5]].mean((1, 2))),
    "at a place": ({"layer": "rgb", "channel": [1, 1, 4], "at": (2, 7)}, lambda a: a[range(3), [1, 1, 4], 2, 7]),
}


@pytest.mark.parametrize("name", ASKED)
def test_channels_of_a_layer(name: str) -> None:
    model = seeded(Fusion)
    asked, formula = ASKED[name]
    objective = objective_of(model, fusion_inputs(), "rgb", **asked)
    found = numbers(objective, IMAGES)
    torch.testing.assert_close(found, formula(acts(model, "rgb", **beside(IMAGES))))
    assert objective.labels[1] == {"channels": "channel 0", "at a place": "channel 1 at 2, 7"}[name]


@pytest.mark.parametrize("at", [None, (7, 0)])
def test_all_channels_of_a_layer(at: tuple[int, int] | None) -> None:
    model = seeded(Fusion)
    objective = objective_of(model, fusion_inputs(), "rgb", layer="rgb", at=at)
    (x,) = acts(model, "rgb", **beside(IMAGES[:1]))
    expected = x.square().mean() if at is None else x[:, 7, 0].square().mean()
    torch.testing.assert_close(numbers(objective, IMAGES[:1]), expected[None])
    assert objective.labels == ("all channels" if at is None else "all channels at 7, 0",)


def test_tokens_in_a_grid_and_the_features_of_a_linear_layer() -> None:
    model = seeded(Fusion)
    grid = objective_of(model, fusion_inputs(), "rgb", layer="attn", channel=3, at=(1, 2))
    found = numbers(grid, IMAGES[:1])
    torch.testing.assert_close(found, acts(model, "attn", **beside(IMAGES[:1]))[:, 1 * 8 + 2, 3])
    said = objective_of(model, fusion_inputs(), "rgb", layer=Layer("attn", reshape=tokens(4, 16)), channel=3, at=(1, 2))
    torch.testing.assert_close(numbers(said, IMAGES[:1]), acts(model, "attn", **beside(IMAGES[:1]))[:, 18, 3])
    linear = objective_of(model, fusion_inputs(), "rgb", layer="head", channel=4)
    with torch.no_grad():
        torch.testing.assert_close(numbers(linear, IMAGES[:1]), model(**beside(IMAGES[:1]))[:, 4])


def test_a_call_of_a_shared_encoder() -> None:
    model, x = seeded(Siamese), IMAGES[:1]
    dates = {"before": IMAGES[1:2], "after": IMAGES[2:]}
    objective = objective_of(model, dates, "after", layer="encoder#1", channel=6)
    found = numbers(objective, x)
    torch.testing.assert_close(found, acts(model, "encoder", **dates | {"after": x}, call=1)[:, 6].mean((1, 2)))


def test_targets_are_scores_of_the_output() -> None:
    model = seeded(Fusion)
    with torch.no_grad():
        expected = model(**beside(IMAGES))
        top = int(model(**fusion_inputs()).argmax(1)[0])
    several = objective_of(model, fusion_inputs(), "rgb", target=[3, 0, 1])
    torch.testing.assert_close(numbers(several, IMAGES), expected[range(3), [3, 0, 1]])
    assert several.labels == ("class 3", "class 0", "class 1")
    own = objective_of(model, fusion_inputs(), "rgb", target=lambda out: out[:, 2] * out[:, 0])
    torch.testing.assert_close(numbers(own, IMAGES[:1]), expected[:1, 2] * expected[:1, 0])
    chosen = objective_of(model, fusion_inputs(), "rgb", target=TopClass())
    torch.testing.assert_close(numbers(chosen, IMAGES[:1]), expected[:1, top])  # that of the example


def test_an_output_of_several() -> None:
    model = seeded(Captioned)
    call = {"image": IMAGES[:2], "ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    objective = objective_of(model, call, None, target=2, output="logits")
    with torch.no_grad():
        expected = model(IMAGES[2:], call["ids"][:1])["logits"][:, 2]  # the words of the first sample
    torch.testing.assert_close(numbers(objective, IMAGES[2:]), expected)
    assert objective.input == "image" and torch.equal(objective.example, IMAGES[:2])


def test_the_gradient_is_that_of_each_images_own_number() -> None:
    model = seeded(Fusion)
    objective = objective_of(model, fusion_inputs(), "rgb", layer="rgb", channel=[2, 0, 5])
    images = IMAGES.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(images).sum(), images)
    for i, channel in enumerate([2, 0, 5]):
        alone = objective_of(model, fusion_inputs(), "rgb", layer="rgb", channel=channel)
        (expected,) = torch.autograd.grad(alone(images[i : i + 1]).sum(), images)
        torch.testing.assert_close(found[i], expected[i], atol=1e-6, rtol=1e-4)


def test_a_model_that_writes_into_its_inputs_leaves_the_images_and_what_is_held() -> None:
    model = seeded(Overwriting)
    views, mask = [IMAGES[:1].clone(), IMAGES[1:2].clone()], torch.ones(1, 4)
    objective = objective_of(model, (views, mask), "views.0", target=1)
    images = IMAGES[2:].clone()
    first, again = numbers(objective, images), numbers(objective, images)
    assert torch.equal(images, IMAGES[2:]) and torch.equal(first, again)
    assert torch.equal(views[0], IMAGES[:1]) and mask.all()


def test_half_precision_is_given_what_it_takes_and_optimised_in_single() -> None:
    model = seeded(Fusion).to(torch.bfloat16)
    objective = objective_of(
        model, {k: x.bfloat16() for k, x in fusion_inputs().items()}, "rgb", layer="rgb", channel=1
    )
    assert objective.dtype == torch.bfloat16 and objective.example.dtype == torch.float32
    assert numbers(objective, IMAGES[:1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say what to maximise: a layer.*or a target; not both"),
        ({"layer": "rgb", "target": 1}, "not both"),
        ({"layer": "rgb", "output": 0}, "output= belongs to a target"),
        ({"target": 1, "channel": 2}, "channel= and at= belong to a layer"),
        ({"layer": "rgb", "channel": 16}, "channel 16 does not exist: there are 0 to 15"),
        ({"layer": "rgb", "channel": -1}, "channel -1 does not exist"),
        ({"layer": "rgb", "channel": 1, "at": (8, 0)}, "place 8 does not exist: there are 0 to 7"),
        ({"layer": "rgb", "channel": 1, "at": (1,)}, r"at=\(1,\) is no place on the layer's grid \(8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        objective_of(seeded(Fusion), fusion_inputs(), "rgb", **asked)


def test_no_gradient_and_numbers_that_are_not_finite_are_refused() -> None:
    model = seeded(Fusion).requires_grad_(False)
    blind = objective_of(model, fusion_inputs(), "rgb", layer="depth", channel=1)
    with pytest.raises(MulticamError, match="channel 1 has no gradient to input 'rgb'"):
        blind(IMAGES[:1].clone().requires_grad_())
    seen = objective_of(model, fusion_inputs(), "rgb", layer="rgb", channel=1)
    with pytest.raises(MulticamError, match="channel 1 is not finite"):
        numbers(seen, torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(MulticamError, match="say with onto= which image input is optimised; there are: 'rgb', 'depth'"):
        objective_of(model, fusion_inputs(), None, target=1)
