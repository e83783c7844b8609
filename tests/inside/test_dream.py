"""Activation maximisation and DeepDream: the objective rises, honestly, and nothing else changes."""

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.targets.scores import TopClass
from multicam.errors import MulticamError
from multicam.inside.dream import Dream, activation_maximization, deep_dream
from multicam.inside.parameterizations import total_variation
from tests.helpers.hygiene import Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Branch, Captioned, Fusion, Overwriting, Siamese, fusion_inputs, seeded

STILL = {"jitter": 0.0, "scale": 0.0, "rotate": 0.0}


def conv(channels: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        )


def example(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def acts_of(model: nn.Module, path: str, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's output by a plain hook."""
    kept: list[Tensor] = []
    with model.get_submodule(path).register_forward_hook(lambda m, i, o: kept.append(o.clone())), torch.no_grad():
        model(*args, **kwargs)
    return kept[0]


def test_the_objective_rises_and_is_that_of_the_images() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(1)
    dream = activation_maximization(model, inputs, "rgb", [0, 3, 7], onto="rgb", steps=30)
    held = {name: x.expand(3, *x.shape[1:]) for name, x in inputs.items()}
    found = acts_of(model, "rgb", **held | {"rgb": dream.images})[range(3), [0, 3, 7]].mean((1, 2))
    assert torch.allclose(dream.objective, found, rtol=1e-5)
    assert (dream.objective > dream.start).all()
    assert dream.images.shape == (3, 3, 32, 32) and dream.history.shape == (30, 3)
    assert (dream.input, dream.labels) == ("rgb", ("channel 0", "channel 3", "channel 7"))


def test_every_objective_is_what_it_says() -> None:
    model, x = conv(), example(1, 3, 12, 12)

    def reached(**asked: Any) -> tuple[Tensor, Tensor]:
        dream = activation_maximization(model, x, "1" if "target" not in asked else None, steps=15, **asked)
        assert (dream.objective > dream.start).all()
        return dream.objective, dream.images

    value, images = reached(channel=2, at=(5, 0))
    assert torch.allclose(value, acts_of(model, "1", images)[:, 2, 5, 0])
    value, images = reached(at=(5, 0))
    assert torch.allclose(value, acts_of(model, "1", images)[:, :, 5, 0].square().mean(1))
    value, images = reached()
    assert torch.allclose(value, acts_of(model, "1", images).square().mean((1, 2, 3)))
    value, images = reached(target=3)
    assert torch.allclose(value, model(images)[:, 3])
    value, images = reached(target=[3, 0])
    assert torch.allclose(value, model(images)[range(2), [3, 0]])
    value, images = reached(target=lambda output: output[:, 1] - output[:, 0])
    assert torch.allclose(value, model(images)[:, 1] - model(images)[:, 0])


def test_a_target_that_chooses_keeps_what_it_chose_for_the_example() -> None:
    model, x = conv(), example(1, 3, 12, 12)
    dream = activation_maximization(model, x, target=TopClass(), steps=5)
    assert dream.labels == (f"class {int(model(x).argmax())}",)


def test_a_linear_layer_and_tokens_are_layers_too() -> None:
    dream = activation_maximization(conv(), example(1, 3, 12, 12), "4", 2, steps=10)
    assert dream.objective > dream.start
    assert torch.allclose(dream.objective, conv()(dream.images)[:, 2])


def test_channels_in_one_batch_are_the_same_as_alone() -> None:
    model, x = conv(), example(1, 3, 12, 12)
    together = activation_maximization(model, x, "1", [4, 0, 4], steps=12)
    for i, channel in enumerate([4, 0, 4]):
        alone = activation_maximization(model, x, "1", channel, steps=12)
        assert torch.allclose(together.images[i], alone.images[0], atol=1e-3)
        assert torch.allclose(together.start[i], alone.start[0], rtol=1e-4)


@pytest.mark.parametrize("parameterization", ["fourier", "pixel"])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_images_keep_to_the_bounds(channels: int, parameterization: Any) -> None:
    spread = torch.arange(1.0, channels + 1)[:, None, None]
    x = example(2, channels, 12, 9) * spread  # as a normalisation leaves it, and not square
    dream = activation_maximization(conv(channels), x, "1", 1, steps=25, lr=1.0, parameterization=parameterization)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    assert ((dream.images >= low) & (dream.images <= high)).all()
    shares = (dream.images - low) / (high - low)
    assert shares.max() > 0.9 or shares.min() < 0.1  # and reach them
    lows = -spread.flatten()
    own = activation_maximization(conv(channels), x, "1", 1, steps=25, lr=1.0, bounds=(lows, 0.5))
    assert ((own.images >= lows[:, None, None]) & (own.images <= 0.5)).all()


def test_a_constant_channel_stays_and_a_constant_example_is_refused() -> None:
    x = example(1, 3, 12, 12)
    x[:, 1] = 0.25
    assert (activation_maximization(conv(), x, "1", 1, steps=3).images[:, 1] == 0.25).all()
    with pytest.raises(MulticamError, match=r"the example input is constant.*give bounds=\(low, high\)"):
        activation_maximization(conv(), torch.zeros(1, 3, 12, 12), "1", 1)
    dream = activation_maximization(conv(), torch.zeros(1, 3, 12, 12), "1", 1, steps=5, bounds=(-2, 2))
    assert dream.objective > dream.start


@pytest.mark.parametrize("channel", [np.int64(2), np.array([2]), torch.tensor([2]), [2], (2,), range(2, 3)], ids=repr)
def test_numbers_of_every_kind_are_channels(channel: Any) -> None:
    assert activation_maximization(conv(), example(1, 3, 8, 8), "1", channel, steps=1).labels == ("channel 2",)


@pytest.mark.parametrize("channel", [6, -1, [0, 6], []], ids=repr)
def test_channels_that_do_not_exist_are_refused(channel: Any) -> None:
    """FlashTorch lets the number of channels pass as a channel."""
    with pytest.raises(MulticamError, match=r"does not exist: there are 0 to 5|a channel is an int"):
        activation_maximization(conv(), example(1, 3, 8, 8), "1", channel)


def test_any_number_of_channels_including_those_of_no_photo() -> None:
    """FlashTorch optimises three channels only."""
    model, x = conv(7), example(1, 7, 16, 16)
    assert (activation_maximization(model, x, "1", [1, 2], steps=20).objective > 0).all()
    assert deep_dream(model, x, "1", octaves=2, steps=2).images.shape == (1, 7, 22, 22)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say what to maximise"),
        ({"layer": "rgb", "target": 1}, "not both"),
        ({"layer": "rgb", "output": "logits"}, "output= belongs to a target"),
        ({"target": 1, "channel": 2}, "belong to a layer"),
        ({"layer": "rgb", "onto": None}, "onto=.*'rgb', 'depth', 'texture'"),
        ({"layer": "rgb", "onto": "rbg"}, "did you mean 'rgb'"),
        ({"layer": "rbg"}, "did you mean 'rgb'"),
        ({"layer": "rgb", "at": (8, 0)}, "place 8 does not exist: there are 0 to 7"),
        ({"layer": "rgb", "at": (1, 2, 3)}, r"no place on the layer's grid \(8, 8\)"),
        ({"layer": "rgb", "steps": 0}, "steps must be a whole number of at least 1"),
        ({"layer": "rgb", "jitter": -1.0}, "jitter is at least 0"),
        ({"layer": "depth", "channel": 1}, "no gradient to input 'rgb': it does not see that input"),
        ({"target": 9}, "class 9 does not exist"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        activation_maximization(seeded(Fusion), fusion_inputs(1), **{"onto": "rgb"} | asked)


def test_only_images_are_optimised() -> None:
    inputs = Inputs(example(1, 3, 16, 16), ids=torch.arange(4)[None])
    with pytest.raises(MulticamError, match=r"input 'ids' is torch\.int64 \(1, 4\)"):
        activation_maximization(seeded(Captioned), inputs, "image", onto="ids")
    with pytest.raises(
        MulticamError, match=r"images \(b c h w\) can be optimised; input 'input' is .* \(1, 3, 4, 8, 8\)"
    ):
        activation_maximization(nn.Conv3d(3, 4, 3), example(1, 3, 4, 8, 8), "")
    dream = activation_maximization(seeded(Captioned), inputs, "image", 1, steps=8)  # the only image
    assert dream.input == "image" and dream.objective > dream.start


def test_a_siamese_encoder_is_told_apart_by_its_calls() -> None:
    inputs = {"before": example(1, 3, 16, 16), "after": example(1, 3, 16, 16, seed=1)}
    dream = activation_maximization(seeded(Siamese), inputs, "encoder#1", 2, onto="after", steps=8)
    assert dream.objective > dream.start
    with pytest.raises(MulticamError, match="does not see that input"):
        activation_maximization(seeded(Siamese), inputs, "encoder#0", 2, onto="after")


def test_an_objective_that_is_not_finite_is_refused() -> None:
    with pytest.raises(MulticamError, match="class 0 is not finite"):
        activation_maximization(conv(), example(1, 3, 8, 8), target=0, bounds=(-1e38, 1e38))


def test_an_image_that_stays_noise_is_told() -> None:
    model = conv()
    with torch.no_grad():
        model[0].bias[1] = -1e4
    with pytest.warns(UserWarning, match="the image of channel 1 is still noise: the gradient was zero"):
        activation_maximization(model, example(1, 3, 8, 8), "1", [0, 1], steps=2)


def test_units_do_not_matter() -> None:
    small, x = conv(), example(1, 3, 8, 8)
    with torch.no_grad():
        small[0].weight *= 1e-12
        small[0].bias *= 1e-12
    images = [activation_maximization(model, x, "1", 3, steps=10).images for model in (small, conv())]
    assert torch.allclose(*images, atol=1e-2)


def test_the_fourier_parameterisation_finds_smoother_images() -> None:
    """The paper's reason for it: high frequencies do not come first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branch(3).eval()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fourier, pixel = (
        activation_maximization(model, x, "act", range(5), steps=30, parameterization=name)
        for name in ("fourier", "pixel")
    )
    assert (fourier.objective > fourier.start).all() and (pixel.objective > pixel.start).all()
    assert (total_variation(fourier.images) < 0.8 * total_variation(pixel.images)).all()


def test_total_variation_is_traded_for_the_objective() -> None:
    model, x = conv(), example(1, 3, 16, 16)
    dreams = [activation_maximization(model, x, "1", 1, steps=30, smoothness=w) for w in (0.0, 5.0)]
    rough, smooth = (total_variation(d.bounds.shares(d.images)).item() for d in dreams)
    assert smooth < 0.7 * rough
    assert dreams[1].objective < dreams[0].objective


@pytest.mark.parametrize("dream", [activation_maximization, deep_dream], ids=lambda f: f.__name__)
def test_results_carry_no_graph_and_are_repeatable_by_seed(dream: Callable[..., Dream]) -> None:
    """FlashTorch's list of images keeps the graph of every step alive."""
    model, x = conv(), example(1, 3, 12, 12)
    before = torch.get_rng_state()
    first, second, other = (dream(model, x, "1", 2, steps=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("images", "objective", "start", "history"):
        assert not getattr(first, name).requires_grad
        assert getattr(first, name).grad_fn is None
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("target", "target raises"),
        *product(("target", "layer", "deep dream"), ("normal", "model raises", "interrupted")),
    ],
)
def test_everything_is_left_as_it_was(how: str, when: str) -> None:
    model = dirty()
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    before = state(model, inputs)

    def run() -> None:
        if how == "target":
            target = raising(Stop) if when == "target raises" else 1
            activation_maximization(model, inputs, target=target, onto="rgb", steps=2)
        elif how == "layer":
            activation_maximization(model, inputs, "rgb", [0, 1], onto="rgb", steps=2)
        else:
            deep_dream(model, inputs, "attn", onto="rgb", octaves=2, steps=1)

    if when == "normal":
        run()
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            run()
    assert_unchanged(before, state(model, inputs))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_frozen_models_of_any_precision_under_the_callers_no_grad(dtype: torch.dtype, guard: Any) -> None:
    model = seeded(Fusion).to(dtype).requires_grad_(False)
    with guard():
        inputs = {name: x.to(dtype) for name, x in fusion_inputs(1).items()}
        dreams = [
            activation_maximization(model, inputs, "rgb", [0, 1], onto="rgb", steps=10),
            activation_maximization(model, inputs, target=2, onto="texture", steps=10),
            deep_dream(model, inputs, "texture", onto="texture", octaves=2, steps=2),
        ]
    for dream in dreams:
        assert dream.images.dtype == dtype
        assert (dream.objective > dream.start).all()
        low, high = (f(inputs[dream.input], (0, 2, 3)) for f in (torch.amin, torch.amax))
        assert ((dream.images >= low[:, None, None]) & (dream.images <= high[:, None, None])).all()


def test_a_model_that_writes_into_its_input_and_activations() -> None:
    views, mask = [example(1, 3, 16, 16), example(1, 3, 16, 16, seed=1)], torch.ones(1, 4)
    kept = [view.clone() for view in views]
    model = seeded(Overwriting)
    for asked in ({"layer": "branch.net.1", "channel": 3}, {"target": 4}):
        dream = activation_maximization(model, (views, mask), onto="views.0", steps=8, **asked)
        assert dream.objective > dream.start
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True)) and mask.all()


def test_the_other_inputs_are_held_bit_for_bit() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watching(Fusion):
        def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
            seen.append({"depth": depth.clone(), "texture": texture.clone()})
            return super().forward(rgb, depth, texture)

    model, inputs = seeded(Watching), fusion_inputs(2)
    activation_maximization(model, inputs, "rgb", [0, 1, 3], onto="rgb", steps=2)
    held = seen[:-2]  # the last two passes look whether the model depends on what it keeps in `seen`
    assert len(held) > 4
    for call in held:
        assert all(torch.equal(rows, inputs[name][:1].expand_as(rows)) for name, rows in call.items())


class Leaky(nn.Module):
    """A neuron with a state in a plain attribute, as in spiking networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.potential = nn.Conv2d(3, 4, 3), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.potential = 0.9 * self.potential + self.conv(x)
        return self.potential.flatten(2).mean(2)


def test_every_step_starts_from_the_state_that_the_model_has() -> None:
    model, x = Leaky(), example(1, 3, 12, 12)
    dream = activation_maximization(model, x, target=[1, 2], steps=3, **STILL)
    assert torch.equal(model.potential, torch.zeros(()))
    with torch.no_grad():
        torch.testing.assert_close(dream.objective, model(dream.images)[[0, 1], [1, 2]])
    model.potential = torch.ones(())
    again = deep_dream(model, x, "conv", 1, octaves=1, steps=2)
    assert again.objective > again.start
    assert torch.equal(model.potential, torch.ones(()))


def test_a_vision_transformer_and_a_model_that_takes_a_dict() -> None:
    from timm.models import VisionTransformer

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.vit(batch["image"]) + batch["bias"]

    torch.manual_seed(0)
    model = Batched()
    batch = Inputs({"image": example(1, 3, 32, 32), "bias": torch.zeros(1, 5)})
    for asked in ({"layer": "vit.blocks.1", "channel": [0, 5]}, {"target": 3}):
        dream = activation_maximization(model, batch, steps=20, **asked)
        assert (dream.objective > dream.start).all()
    dream = deep_dream(model, batch, "vit.blocks.1", octaves=3, steps=3)
    assert dream.images.shape == (1, 3, 63, 63) and dream.history.shape == (9, 1)
    assert dream.objective > dream.start


def test_deep_dream_of_one_size_is_ascent_along_the_gradient_by_its_root_mean_square() -> None:
    model, x = conv(), example(1, 3, 12, 12)
    dream = deep_dream(model, x, "0", 2, octaves=1, steps=1, lr=0.01)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(model[0](leaf)[:, 2].mean(), leaf)[0]
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    shares = gradient * (high - low)
    wanted = ((x - low) / (high - low) + 0.01 * shares / shares.square().mean().sqrt()).clamp(0, 1)
    assert torch.allclose(dream.images, low + (high - low) * wanted, atol=1e-4)
    assert torch.allclose(dream.start, model[0](x)[:, 2].mean(), atol=1e-5)


def test_deep_dream_shows_the_model_whole_tiles_everywhere() -> None:
    sizes = set()

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            sizes.add(tuple(x.shape))
            return self.conv(x).mean((2, 3))

    x = example(2, 3, 10, 14)
    dream = deep_dream(seeded(Fixed), x, "conv", octaves=3, octave_scale=1.5, steps=2)
    assert sizes - {(2, 3, 10, 14)} == {(1, 3, 10, 14)}
    assert dream.images.shape == (1, 3, 22, 32)
    with pytest.raises(MulticamError, match=r"octave_scale is at least 1, not 0\.5"):
        deep_dream(seeded(Fixed), x, "conv", octave_scale=0.5)


def test_no_warning_is_given_without_need() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation_maximization(conv(), example(1, 3, 8, 8), "0", steps=2, **STILL)
