"""Interaction maps against their four terms on full passes, closed forms and integrals of second derivatives."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from multicam import Inputs, MulticamError
from multicam.call.baselines import baselines
from multicam.call.targets import Probability
from multicam.saliency.attributions import Attributions
from multicam.shares.interactions import double_occlusion, second_order_gradient
from multicam.shares.shapley import contribution
from tests.helpers.hygiene import assert_unchanged, state
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded

WAYS = {"double_occlusion": double_occlusion, "second_order_gradient": second_order_gradient}


def fused(way: Any, *args: Any, **options: Any) -> Attributions:
    """A way on a `Fusion`, in few patches."""
    return way(*args, **({"patch": 8} if way is double_occlusion else {}), **options)


either = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Bilinear(nn.Module):
    """`x W y + 2 sum x + sum y^2`, of all entries, and less of it as a second class."""

    def __init__(self, left: tuple[int, ...] = (2, 4, 4), right: tuple[int, ...] = (1, 4, 6)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(*left, *right, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.weight.flatten(y.ndim - 1).flatten(0, x.ndim - 2) if x.ndim == y.ndim else self.weight
        a, b = x.flatten(1), y.flatten(1)
        score = (a @ weight * b).sum(1) + 2 * a.sum(1) + (b**2).sum(1)
        return torch.stack([score, -score], 1)


def pair(b: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "x": torch.rand(b, 2, 4, 4, generator=generator) + 0.5,
        "y": torch.rand(b, 1, 4, 6, generator=generator) + 0.5,
    }


def full(model: nn.Module, inputs: Mapping[str, Tensor], target: int) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[:, target]


@pytest.mark.parametrize("base", [0.0, {"rgb": "blur", "depth": 0.25}], ids=str)
def test_double_occlusion_is_its_four_terms_on_full_passes(base: Any) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    found = double_occlusion(
        model, inputs, {"rgb": np.s_[4:12, :8]}, [2, 3], patch={"depth": (4, 8), "texture": 8}, baseline=base
    )
    assert list(found) == ["depth", "texture"]
    held = baselines(Inputs(**inputs), list(inputs), base)

    def score(*covered: tuple[str, tuple[slice, slice]]) -> Tensor:
        changed = {name: x.clone() for name, x in inputs.items()}
        for name, (rows, columns) in covered:
            changed[name][:, :, rows, columns] = held[name][:, :, rows, columns]
        return torch.stack([full(model, changed, 2)[0], full(model, changed, 3)[1]])

    region = ("rgb", np.s_[4:12, :8])
    for name, (h, w) in {"depth": (4, 8), "texture": (8, 8)}.items():
        total = torch.zeros(2)
        for top in range(0, inputs[name].shape[2], h):
            for left in range(0, inputs[name].shape[3], w):
                patch = (name, (slice(top, top + h), slice(left, left + w)))
                expected = (score() - score(patch)) - (score(region) - score(region, patch))
                total += expected
                values = found[name][:, :, top : top + h, left : left + w]
                torch.testing.assert_close(values, expected.view(2, 1, 1, 1).expand_as(values), atol=2e-6, rtol=1e-3)
        torch.testing.assert_close(found.evidence[name], total, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(found.maps()[name].mean((1, 2)), total, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.scores, score(), atol=1e-6, rtol=1e-5)


@either
def test_an_additive_model_has_none(way: Any) -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(1, 4, 3, 2)

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return self.a(rgb).relu().mean((2, 3)) + self.b(depth).tanh().mean((2, 3))

    inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    found = way(seeded(Added), inputs, {"rgb": np.s_[:4, :]}, 1)
    torch.testing.assert_close(found["depth"], torch.zeros(2, 1, 8, 8), atol=1e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_the_closed_form_of_a_bilinear_model(data: st.DataObject) -> None:
    b, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    kinds = data.draw(st.tuples(*[st.sampled_from([(), (2,)])] * 2))  # clips or images
    sides = data.draw(st.tuples(*[st.integers(1, 4)] * 4))
    base = data.draw(st.sampled_from([0.0, 0.5, {"x": -1.0, "y": 2.0}]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    left, right = (c, *kinds[0], *sides[:2]), (2, *kinds[1], *sides[2:])
    x, y = torch.randn(b, *left, generator=generator), torch.randn(b, *right, generator=generator)
    per_sample = data.draw(st.booleans())
    mask = torch.rand((b, *sides[:2]) if per_sample else sides[:2], generator=generator) < 0.5
    mask.view(-1)[0] = True

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a, b = x.flatten(1).double(), y.flatten(1).double()
            return ((a @ weight * b).sum(1) + a.sum(1) ** 2 - 3 * b.sin().sum(1))[:, None]

    weight = torch.randn(x[0].numel(), y[0].numel(), generator=generator, dtype=torch.float64)
    bases = base if isinstance(base, dict) else {"x": base, "y": base}
    where = mask.expand(b, *sides[:2]).view(b, *[1] * (x.ndim - 3), *sides[:2])
    pull = (((x - bases["x"]) * where).flatten(1).double() @ weight).view(y.shape)
    expected = ((y - bases["y"]) * pull).float()
    gradient = second_order_gradient(Model(), (x, y), {"x": mask}, 0, baseline=base)
    torch.testing.assert_close(gradient["y"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient.evidence["y"], expected.flatten(1).sum(1), atol=1e-4, rtol=1e-3)
    sides_of_patch = data.draw(st.integers(1, sides[2])), data.draw(st.integers(1, sides[3]))
    occluded = double_occlusion(Model(), (x, y), {"x": mask}, 0, baseline=base, patch=sides_of_patch)["y"].float()
    steps = [range(0, side, step) for side, step in zip(sides[2:], sides_of_patch, strict=True)]
    for top in steps[0]:
        for left_side in steps[1]:
            at = np.s_[..., top : top + sides_of_patch[0], left_side : left_side + sides_of_patch[1]]
            wanted = expected[at].flatten(1).sum(1)
            values = occluded[at].flatten(1)
            torch.testing.assert_close(values, wanted[:, None].expand_as(values), atol=1e-3, rtol=1e-3)


def test_a_purely_bilinear_model_is_its_pairwise_interaction() -> None:
    inputs = pair()
    whole = contribution(Bilinear(), inputs, 0, baseline=0.25).interactions
    assert whole is not None
    region = {"x": torch.ones(4, 4, dtype=torch.bool)}
    occluded = double_occlusion(Bilinear(), inputs, region, 0, patch=2, baseline=0.25)
    gradient = second_order_gradient(Bilinear(), inputs, region, 0, baseline=0.25)
    for found in (occluded, gradient):
        torch.testing.assert_close(found.evidence["y"], whole[:, 0, 1], atol=1e-3, rtol=1e-4)
        assert found.comparable


class Attends(nn.Module):
    """One token for each place of `x` queries those of `y`, by fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = nn.Conv2d(2, 8, 2, 2), nn.Conv2d(1, 8, 2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = self.x(x).flatten(2).mT[:, None], self.y(y).flatten(2).mT[:, None]
        return self.head((q + F.scaled_dot_product_attention(3 * q, 3 * k, k)).tanh().mean((1, 2)))


@pytest.mark.parametrize("base", [0.0, -0.5], ids=str)
def test_the_integral_of_second_derivatives(base: float) -> None:
    model = seeded(Attends).double()
    inputs = {name: x.double() for name, x in pair().items()}
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:, :3] = True
    found = second_order_gradient(model, inputs, {"x": mask}, 1, baseline=base)
    x, y = inputs["x"], inputs["y"]
    covered = torch.where(mask, base, x)

    def bent(x: Tensor) -> Tensor:
        """The gradient by y of the derivative along the region, forwards by way of two backward passes."""
        x, free = x.detach().requires_grad_(), y.detach().requires_grad_()
        pull = torch.zeros_like(y, requires_grad=True)
        (first,) = torch.autograd.grad(model(x, free)[:, 1].sum(), free, create_graph=True)
        (second,) = torch.autograd.grad((first * pull).sum(), x, create_graph=True)
        return torch.autograd.grad((second * (inputs["x"] - covered)).sum(), pull)[0]

    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = torch.zeros_like(y)
    with sdpa_kernel(SDPBackend.MATH):
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            at = covered + float(node) * (x - covered)
            total += float(weight) * bent(at)
    expected = (y - base) * total
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found["y"], expected, atol=1e-7, rtol=1e-5)


def test_it_sees_the_kinks_of_relus() -> None:
    class Kinked(nn.Module):
        """Both are needed to come above the threshold; the second derivative is zero on either side."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) + y.mean((1, 2, 3)) - 1.5).relu()[:, None]

    inputs = {"x": torch.ones(1, 1, 2, 2), "y": torch.ones(1, 1, 2, 2)}
    region = {"x": torch.ones(2, 2, dtype=torch.bool)}
    gradient = second_order_gradient(Kinked(), inputs, region, 0)
    torch.testing.assert_close(gradient["y"], torch.full((1, 1, 2, 2), 0.25))
    occluded = double_occlusion(Kinked(), inputs, region, 0, patch=2)
    torch.testing.assert_close(occluded["y"], torch.full((1, 1, 2, 2), 0.5))


@either
def test_fused_attention_is_explained_as_unfused(way: Any) -> None:
    model, inputs = seeded(Attends), pair()
    found = way(model, inputs, {"x": np.s_[:2, :2]}, 2)["y"]
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(way(model, inputs, {"x": np.s_[:2, :2]}, 2)["y"], found, atol=1e-6, rtol=1e-3)
    assert found.abs().max() > 1e-4


@either
def test_a_region_over_two_inputs_is_one_region(way: Any) -> None:
    class Trio(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return (x * z + 2 * y * z + 5 * x * y).sum((1, 2, 3))[:, None]

    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(2, 1, 4, 4, generator=generator) for name in "xyz"}
    found = way(
        Trio(), inputs, {"x": np.s_[:2, :], "y": np.s_[:, :2]}, 0, **({"patch": 1} if way is double_occlusion else {})
    )
    assert list(found) == ["z"]
    x, y, z = inputs.values()
    upper, left = torch.zeros(4, 4), torch.zeros(4, 4)
    upper[:2], left[:, :2] = 1, 1
    torch.testing.assert_close(found["z"], z * (x * upper + 2 * y * left), atol=1e-4, rtol=1e-4)


@either
def test_the_inputs_to_map_are_named(way: Any) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    every = fused(way, model, inputs, {"rgb": np.s_[:8, :8]}, 1)
    only = fused(way, model, inputs, {"rgb": np.s_[:8, :8]}, 1, wrt="texture")
    assert list(every) == ["depth", "texture"]
    assert list(only) == ["texture"]
    torch.testing.assert_close(only["texture"], every["texture"])
    nested = Inputs(list(inputs.values()))

    class Listed(nn.Module):
        def forward(self, views: list[Tensor]) -> Tensor:
            return model(*views)

    short = fused(way, Listed(), nested, {"0": np.s_[:8, :8]}, 1, wrt=["2"])
    assert list(short) == ["2"]
    torch.testing.assert_close(short["2"], only["texture"], atol=1e-6, rtol=1e-4)


@either
def test_slices_and_masks_say_the_same(way: Any) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:-3:2, 8:] = True
    found = [
        fused(way, model, inputs, {"rgb": region}, 1, wrt="depth")["depth"]
        for region in (np.s_[2:-3:2, 8:], mask, mask.expand(2, 16, 16))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@either
def test_each_sample_has_its_own_region(way: Any) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 4:, 9:] = True, True
    found = fused(way, model, inputs, {"rgb": masks}, [1, 4], wrt="depth")["depth"]
    for i in range(2):
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        alone = fused(way, model, one, {"rgb": masks[i]}, [1, 4][i], wrt="depth")["depth"]
        torch.testing.assert_close(alone[0], found[i], atol=2e-6, rtol=1e-3)
    masks[1] = False
    nowhere = fused(way, model, inputs, {"rgb": masks}, [1, 4], wrt="depth")["depth"]
    torch.testing.assert_close(nowhere[1], torch.zeros_like(nowhere[1]), atol=1e-6, rtol=0)


@either
def test_signals_and_words(way: Any) -> None:
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 1)

        def forward(self, rgb: Tensor, audio: Tensor, ids: Tensor) -> Tensor:
            said = self.words(ids)[:, :, 0].sum(1)
            return (rgb.sum((1, 2, 3)) * (audio.sum((1, 2)) + said))[:, None]

    model = seeded(Heard)
    inputs = {"rgb": torch.rand(2, 1, 2, 2), "audio": torch.rand(2, 1, 6), "ids": torch.tensor([[4, 5, 6], [1, 2, 3]])}
    options = {"patch": 1} if way is double_occlusion else {}
    heard = inputs["audio"][..., 2:4].sum((1, 2)).view(2, 1, 1, 1)
    for region in (np.s_[2:4], (slice(2, 4),), torch.tensor([0, 0, 1, 1, 0, 0]).bool()):
        found = way(model, inputs, {"audio": region}, 0, **options)
        torch.testing.assert_close(found["rgb"], inputs["rgb"] * heard, atol=1e-5, rtol=1e-4)
    table = model.words.weight.detach()[:, 0]
    word = (table[inputs["ids"][:, 1]] - table[0]).view(2, 1, 1, 1)
    found = way(model, inputs, {"ids": np.s_[1:2]}, 0, baseline={"ids": 0}, **options)
    torch.testing.assert_close(found["rgb"], inputs["rgb"] * word, atol=1e-5, rtol=1e-4)
    onto = way(model, inputs, {"rgb": np.s_[:1, :]}, 0, wrt="audio", **options)
    top = inputs["rgb"][:, :, :1].sum((1, 2, 3)).view(2, 1, 1)
    torch.testing.assert_close(onto["audio"], inputs["audio"] * top, atol=1e-5, rtol=1e-4)
    assert onto.maps()["audio"].shape == (2, 6)


@either
def test_integer_images(way: Any) -> None:
    class Bytes(nn.Module):
        def forward(self, photo: Tensor, depth: Tensor) -> Tensor:
            assert photo.dtype == torch.uint8
            return (photo.float().mean((1, 2, 3)) / 255 * depth.mean((1, 2, 3)))[:, None]

    photo, depth = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.rand(2, 1, 4, 4)
    found = way(
        Bytes(), (photo, depth), {"photo": np.s_[:2, :]}, 0, **({"patch": 4} if way is double_occlusion else {})
    )
    share = photo[:, :, :2].float().sum((1, 2, 3)) / 255 / 48
    torch.testing.assert_close(found.evidence["depth"], share * depth.mean((1, 2, 3)), atol=1e-5, rtol=1e-4)
    if way is double_occlusion:
        back = double_occlusion(Bytes(), (photo, depth), {"depth": np.s_[:, :]}, 0, patch=4)
        expected = photo.float().mean((1, 2, 3)) / 255 * depth.mean((1, 2, 3))
        torch.testing.assert_close(back.evidence["photo"], expected, atol=1e-5, rtol=1e-4)


@either
def test_a_top_class_is_that_of_the_unchanged_inputs(way: Any) -> None:
    inputs = pair(b=3)
    inputs["x"][1] -= 3  # another class wins there
    top = Bilinear()(**inputs).argmax(1)
    assert len(top.unique()) == 2
    region = {"x": torch.ones(4, 4, dtype=torch.bool)}
    assert torch.equal(way(Bilinear(), inputs, region)["y"], way(Bilinear(), inputs, region, top.tolist())["y"])


@either
def test_any_output_and_target(way: Any) -> None:
    model = seeded(Captioned)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "image": torch.rand(2, 3, 8, 8, generator=generator),
        "ids": torch.randint(1, 50, (2, 5), generator=generator),
    }
    found = way(model, inputs, {"ids": np.s_[:2]}, Probability(1), output="logits", baseline={"ids": 0})
    changed = inputs | {"ids": inputs["ids"].clone()}
    changed["ids"][:, :2] = 0
    if way is second_order_gradient:
        x = inputs["image"].clone().requires_grad_()
        grads = [
            torch.autograd.grad(model(x, call["ids"])["logits"].softmax(1)[:, 1].sum(), x)[0]
            for call in (inputs, changed)
        ]
        torch.testing.assert_close(found["image"], inputs["image"] * (grads[0] - grads[1]), atol=1e-6, rtol=1e-4)
    else:
        blank = torch.zeros_like(inputs["image"][:, :, :1, :1])
        there, gone = (
            model(call["image"], call["ids"])["logits"].softmax(1)[:, 1]
            - model(
                torch.cat([torch.cat([blank, call["image"][:, :, :1, 1:]], 3), call["image"][:, :, 1:]], 2), call["ids"]
            )["logits"].softmax(1)[:, 1]
            for call in (inputs, changed)
        )
        torch.testing.assert_close(found["image"][:, 0, 0, 0], (there - gone).detach(), atol=1e-6, rtol=1e-3)


@either
def test_half_precision(way: Any) -> None:
    inputs = fusion_inputs(size=16)
    expected = fused(way, seeded(Fusion), inputs, {"rgb": np.s_[:8, :]}, 2, wrt="depth")
    found = fused(
        way, seeded(Fusion).bfloat16(), {name: x.bfloat16() for name, x in inputs.items()}, {"rgb": np.s_[:8, :]}, 2
    )
    for name in expected:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], atol=0.02, rtol=0)


@either
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_frozen_models_under_no_grad_and_nothing_is_changed(way: Any, guard: Any) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    expected = fused(way, model, inputs, {"rgb": np.s_[:8, :]}, 2, wrt="depth")
    model.train().requires_grad_(False)
    model.head.eval()
    model.depth.requires_grad_(True)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    inputs["depth"].requires_grad_()
    before = state(model, inputs)
    with guard():
        found = fused(way, model, inputs, {"rgb": mask}, 2, wrt="depth")
        with pytest.raises(KeyError):
            fused(
                way,
                model,
                inputs,
                {"rgb": mask},
                lambda output: output["mine"] if isinstance(output, dict) else {}["mine"],
            )
    for name in expected:
        torch.testing.assert_close(found[name].clone(), expected[name], atol=1e-6, rtol=1e-3)
        assert not found[name].requires_grad
    assert_unchanged(before, state(model, inputs))
    assert int(mask.sum()) == 128


@either
@pytest.mark.parametrize(
    ("region", "options", "message"),
    [
        ({"rbg": np.s_[:2, :2]}, {}, "no input 'rbg'; did you mean 'rgb'"),
        ({}, {}, "a region is given by the name of its input"),
        ({"rgb": np.s_[:2, :2, :2]}, {}, "'rgb' (2, 3, 16, 16) is a boolean mask (16, 16) or (2, 16, 16), or 2 slices, not (sl"),
        ({"rgb": np.s_[:2]}, {}, "or 2 slices, not slice("),
        ({"rgb": torch.ones(16, 16)}, {}, "or 2 slices, not torch.float32 (16, 16)"),
        ({"rgb": torch.ones(8, 16, dtype=torch.bool)}, {}, "not torch.bool (8, 16)"),
        ({"rgb": torch.zeros(16, 16, dtype=torch.bool)}, {}, "the region of input 'rgb' is empty"),
        ({"rgb": np.s_[16:, :]}, {}, "the region of input 'rgb' is empty"),
        ({"rgb": np.s_[:2, :2]}, {"wrt": "rgb"}, "the region is in input 'rgb' itself: region_contribution tells"),
        ({"rgb": np.s_[:2, :2]}, {"wrt": "dept"}, "no input 'dept'; did you mean 'depth'"),
        ({"rgb": np.s_[:2, :2]}, {"wrt": []}, "name other inputs with wrt"),
        (dict.fromkeys(["rgb", "depth", "texture"], np.s_[:2, :2]), {}, "no image input to map besides those of the region"),
        ({"rgb": np.s_[:2, :2]}, {"wrt": "depth", "baseline": {"texture": 1.0}}, "no explained input 'texture'"),
        ({"rgb": np.s_[:2, :2]}, {"baseline": torch.zeros(3)}, "the baseline (3,) of input 'rgb' does not fit it"),
        ({"rgb": np.s_[:2, :2]}, {"target": 7}, "target class 7 does not exist"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(way: Any, region: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError) as error:
        way(seeded(Fusion), fusion_inputs(size=16), region, **{"target": 0} | options)
    assert message in str(error.value)


def test_bad_patches_and_other_kinds_of_inputs() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    region = {"rgb": np.s_[:2, :2]}
    for options, message in {
        "own": ({"patch": {"rgb": 2}}, "no explained input 'rgb'"),
        "large": ({"patch": 99}, "the patch 99 does not fit input 'depth'"),
        "gaps": ({"patch": 2, "stride": 4}, "leave gaps in input 'depth'"),
        "none": ({"batch_size": 0}, "batch_size must be a whole number"),
    }.values():
        with pytest.raises(MulticamError, match=message):
            double_occlusion(model, inputs, region, 0, **options)

    class Scaled(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
            return (x.float().mean((1, 2, 3)) * y.float().mean((1, 2, 3)) * scale)[:, None]

    whole = {"x": torch.rand(2, 1, 4, 4), "y": torch.ones(2, 1, 4, 4, dtype=torch.uint8), "scale": 2.0}
    with pytest.raises(MulticamError, match="no input with places for each sample 'scale'"):
        double_occlusion(Scaled(), whole, {"scale": np.s_[:1]}, 0)
    with pytest.raises(MulticamError, match="there is no image input to map besides those of the region, 'x'"):
        second_order_gradient(Scaled(), whole, {"x": np.s_[:1, :]}, 0)
    with pytest.raises(MulticamError, match="input 'y' is uint8, which has no gradient"):
        second_order_gradient(Scaled(), whole, {"x": np.s_[:1, :]}, 0, wrt="y")
