from math import ceil
from typing import Any

import pytest
import torch
from captum.attr import Occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.targets import Probability
from multicam.saliency.occluding import occlusion
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded


def close(x: Tensor, y: Tensor, share: float = 1e-5) -> bool:
    y = y.detach()
    return x.shape == y.shape and torch.allclose(x, y.to(x), rtol=share, atol=share * float(y.abs().max()))


def linear(*shape: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def captums(model: nn.Module, x: Tensor, patch: tuple[int, ...], stride: tuple[int, ...], baseline: Any = 0) -> Tensor:
    channels = x.shape[1 : x.ndim - len(patch)]
    return Occlusion(model).attribute(
        x, (*channels, *patch), strides=(*channels, *stride), baselines=baseline, target=1, perturbations_per_eval=3
    )


@st.composite
def patches(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    patch = [draw(st.integers(1, side)) for side in size]
    return size, patch, [draw(st.integers(1, side)) for side in patch]


@given(patches())
@settings(max_examples=12, deadline=None)
def test_windows_are_captums(sizes: tuple[tuple[int, ...], list[int], list[int]]) -> None:
    size, patch, stride = sizes
    x = rand(2, 2, *size)
    model = linear(2, *size)
    found = occlusion(model, {"input": x}, 1, patch=patch, stride=stride, baseline=0.5, wrt="input")["input"]
    assert close(found, captums(model, x, tuple(patch), tuple(stride), 0.5), 1e-4)


@pytest.mark.parametrize(
    ("patch", "stride"), [(8, None), (8, 4), (7, 5), ((8, 4), None)], ids=["dividing", "overlapping", "cut", "oblong"]
)
def test_captums_occlusion_of_several_inputs(patch: Any, stride: Any) -> None:
    inputs = fusion_inputs(2, 16)
    start = {name: rand(1, *x.shape[1:]) for name, x in inputs.items()}
    found = occlusion(seeded(Fusion), inputs, [2, 1], patch=patch, stride=stride, baseline=start)
    sides = patch if isinstance(patch, tuple) else (patch, patch)
    steps = (stride, stride) if stride else sides
    windows = tuple((x.shape[1], *sides) for x in inputs.values())
    expected = Occlusion(seeded(Fusion)).attribute(
        tuple(inputs.values()), windows, strides=tuple((x.shape[1], *steps) for x in inputs.values()),
        baselines=tuple(start.values()), target=[2, 1],
    )  # fmt: skip
    for x, y in zip(found.values(), expected, strict=True):
        assert close(x, y, 1e-4)


def test_a_linear_model_in_closed_form() -> None:
    x, model = rand(2, 3, 8, 12), linear(3, 8, 12)
    found = occlusion(model, x, 1, patch=4, baseline=0.25)
    weight = model[1].weight[1].view(3, 8, 12)
    parts = ((x - 0.25) * weight).view(2, 3, 2, 4, 3, 4).sum((1, 3, 5))
    expected = parts.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(2, 3, 8, 12)
    assert close(found["input"], expected)


@pytest.mark.parametrize(
    "shape", [(3, 8, 12), (2, 16), (2, 4, 8, 8), (6,), ()], ids=["image", "signal", "clip", "table", "number"]
)
def test_evidence_is_the_change_to_the_baseline_in_a_linear_model(shape: tuple[int, ...]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = linear(*shape), linear(3, 8, 8)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return self.one(x.view(len(x), -1)) + self.two(image)

    model, x, image = Two(), rand(2, *shape), rand(2, 3, 8, 8)
    found = occlusion(model, {"x": x, "image": image}, 1, wrt=["x", "image"], baseline=0.5)
    assert found.comparable
    assert found["x"].shape == x.shape
    for name, hidden in (("x", (x * 0 + 0.5, image)), ("image", (x, image * 0 + 0.5))):
        change = (model(x, image) - model(*hidden))[:, 1].detach()
        assert torch.allclose(found.evidence[name], change, atol=1e-5)
    maps = found.maps()
    assert torch.allclose(maps["image"].mean((1, 2)), found.evidence["image"], atol=1e-5)


def test_the_default_is_an_eighth_of_each_side() -> None:
    found = occlusion(linear(1, 32, 20), rand(1, 1, 32, 20), 1)["input"]
    assert close(found, captums(linear(1, 32, 20), rand(1, 1, 32, 20), (4, 3), (4, 3)))


def test_one_number_is_for_every_axis_and_names_are_for_inputs() -> None:
    inputs = fusion_inputs(1, 16)
    model = seeded(Fusion)
    by_name = occlusion(model, inputs, 1, patch={"rgb": 8, "depth": (4, 8)}, stride={"rgb": 4})
    assert torch.equal(by_name["rgb"], occlusion(model, inputs, 1, patch=8, stride=4, wrt="rgb")["rgb"])
    assert torch.equal(by_name["depth"], occlusion(model, inputs, 1, patch=(4, 8), wrt="depth")["depth"])
    assert torch.equal(by_name["texture"], occlusion(model, inputs, 1, wrt="texture")["texture"])
    clip = rand(1, 2, 4, 8, 8)
    frames = occlusion(linear(2, 4, 8, 8), clip, 1, patch=(2, 4, 4), stride=2)["input"]
    assert close(frames, captums(linear(2, 4, 8, 8), clip, (2, 4, 4), (2, 2, 2)))


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_size_of_passes_and_other_samples_do_not_matter(size: int) -> None:
    inputs, model = fusion_inputs(2, 16), seeded(Fusion)
    found = occlusion(model, inputs, [1, 2], patch=8)
    again = occlusion(model, inputs, [1, 2], patch=8, batch_size=size)
    alone = occlusion(model, Inputs.of(inputs).take([1]), 2, patch=8, batch_size=size)
    for name in inputs:
        assert torch.allclose(again[name], found[name], atol=1e-6)
        assert torch.allclose(alone[name][0], found[name][1], atol=1e-6)


class Ignoring(nn.Module):
    """Takes two images, uses one; with fused attention, and arithmetic outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, rgb: Tensor, unused: Tensor) -> Tensor:
        x = self.encoder(self.conv(rgb).flatten(2).mT)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x) + x.softmax(1)
        return self.head(x.mean(1)) + 0 * len(unused)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fused"])
def test_what_is_not_used_has_exactly_nothing(b: int, fast: bool) -> None:
    model = Ignoring().eval().requires_grad_(not fast)
    with torch.inference_mode() if fast else torch.enable_grad():
        found = occlusion(model, {"rgb": rand(b, 3, 16, 16), "unused": rand(b, 1, 16, 16)}, 1)
    assert not found["unused"].any()
    assert found["rgb"].any()
    assert found.evidence["unused"].tolist() == [0] * b


def test_images_of_integers_and_masks() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 8, 8)

        def forward(self, photo: Tensor, mask: Tensor) -> Tensor:
            assert photo.dtype == torch.uint8
            assert mask.dtype == torch.bool
            return self.net((photo / 255) * mask)

    photo, mask = (rand(2, 3, 8, 8) * 255).byte(), rand(2, 1, 8, 8) > 0.3
    found = occlusion(Bytes(), (photo, mask), 1, patch=4, baseline={"photo": 127.0})
    assert list(found) == ["photo", "mask"]
    plain = occlusion(linear(3, 8, 8), photo / 255 * mask, 1, patch=4, baseline=(127 / 255 * mask).expand(2, 3, 8, 8))
    assert close(found["photo"], plain["input"])
    gone = occlusion(linear(3, 8, 8), photo / 255 * mask, 1, patch=4)
    assert close(found["mask"], gone["input"][:, :1])
    with pytest.raises(MulticamError, match=r"input 'photo' is torch\.uint8, which cannot hold the baseline 0\.5"):
        occlusion(Bytes(), (photo, mask), 1, baseline={"photo": 0.5})


def test_words_are_covered_one_by_one() -> None:
    inputs = {"image": rand(2, 3, 8, 8), "ids": torch.tensor([[4, 9, 2], [7, 7, 30]])}
    model = seeded(Captioned)
    found = occlusion(model, inputs, 1, wrt="ids", patch=1, output="logits")["ids"]
    for word in range(3):
        hidden = inputs["ids"].clone()
        hidden[:, word] = 0
        change = model(**inputs)["logits"] - model(inputs["image"], hidden)["logits"]
        assert torch.allclose(found[:, word], change[:, 1].detach(), atol=1e-6)


def test_the_top_class_stays_that_of_the_unchanged_inputs() -> None:
    x, model = rand(2, 3, 8, 8), linear(3, 8, 8)
    top = model(x).argmax(1).tolist()
    assert torch.equal(occlusion(model, x)["input"], occlusion(model, x, top)["input"])
    assert occlusion(model, x, Probability([1, 2]))["input"].abs().max() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 9}, r"the patch 9 does not fit input 'input' \(1, 3, 8, 12\)"),
        ({"patch": 0}, "the patch 0 does not fit input 'input'"),
        ({"patch": (1, 3, 8, 12)}, r"the patch \(1, 3, 8, 12\) does not fit"),
        ({"patch": ()}, r"the patch \(\) does not fit"),
        ({"patch": 4, "stride": -1}, "the stride -1 does not fit"),
        ({"patch": 4, "stride": 5}, r"patches \[4, 4\] at a stride of \[5, 5\] leave gaps in input 'input'"),
        (
            {"patch": 4, "stride": (1, 2, 2)},
            r"the stride \[1, 2, 2\] of input 'input' needs as many numbers as its patch",
        ),
        ({"patch": {"inputt": 4}}, "no input 'inputt'; did you mean 'input'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": -3}, "batch_size must be a whole number of at least 1, not -3"),
    ],
    ids=str,
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        occlusion(linear(3, 8, 12), rand(1, 3, 8, 12), 1, **options)


@pytest.mark.parametrize("what", ["patch", "stride"])
def test_sides_of_an_input_that_is_not_explained(what: str) -> None:
    with pytest.raises(MulticamError, match=r"no explained input 'depth'\. There are: 'rgb'"):
        occlusion(seeded(Fusion), fusion_inputs(), 1, wrt="rgb", **{what: {"depth": 4}})


def test_windows_cover_everything_where_the_patch_does_not_divide() -> None:
    found = occlusion(linear(1, 7, 7), rand(1, 1, 7, 7), 1, patch=3, stride=2)["input"]
    assert found.isfinite().all()
    assert found[0, 0].unique().numel() > ceil(7 / 3) ** 2
