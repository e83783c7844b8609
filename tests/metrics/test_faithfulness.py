"""Curves against values by hand, closed forms of linear models, and captum-free loops over full passes."""

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, Maps, MulticamError
from multicam.call.targets import Probability
from multicam.metrics.faithfulness import Curve, Masked, deletion, insertion, road, seen_through
from multicam.metrics.imputing import impute
from tests.helpers.models import Fusion, fusion_inputs, seeded


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))[:, None]


class TwoSums(nn.Module):
    """The mean of `x` and three times that of `y`, which has fewer and so larger places."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.mean((1, 2, 3)) + 3 * y.mean((1, 2, 3)))[:, None]


X = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]])


def test_deletion_and_insertion_by_hand() -> None:
    map = X[:, 0]
    assert deletion(Sum(), X, map, 0, steps=4).scores.tolist() == [[10.0, 6.0, 3.0, 1.0, 0.0]]
    assert deletion(Sum(), X, -map, 0, steps=4).scores.tolist() == [[10.0, 9.0, 7.0, 4.0, 0.0]]
    assert deletion(Sum(), X, map, 0, steps=2).scores.tolist() == [[10.0, 3.0, 0.0]]
    assert deletion(Sum(), X, map, 0, steps=4, baseline=1.0).scores.tolist() == [[10.0, 7.0, 5.0, 4.0, 4.0]]
    found = insertion(Sum(), X, map, 0, steps=4, baseline=0.0)
    assert found.scores.tolist() == [[0.0, 4.0, 7.0, 9.0, 10.0]]
    assert found.area.tolist() == [(0 / 2 + 4 + 7 + 9 + 10 / 2) / 4]


def test_places_of_several_inputs_are_ranked_together_by_density() -> None:
    x, y = X / 10, torch.tensor([[[[0.5]]]])
    maps = {"x": x[:, 0], "y": y[:, 0] * 3}  # densities: 0.4, 0.1, 0.3, 0.2 and 1.5
    curve = deletion(TwoSums(), {"x": x, "y": y}, maps, 0, steps=8)
    whole = float(x.mean() + 3 * y.mean())
    # The one place of y is half of all area: it goes when anything goes, then those of x, each an eighth.
    expected = [whole, *[0.25] * 4, *(torch.tensor([6.0, 3.0, 1.0, 0.0]) / 40).tolist()]
    assert curve.scores[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_order_of_equal_places_is_random_and_repeatable() -> None:
    x, even = torch.rand(1, 1, 8, 8), torch.ones(1, 8, 8)
    first = deletion(Sum(), x, even, 0)
    assert torch.equal(first.scores, deletion(Sum(), x, even, 0).scores)
    assert not torch.equal(first.scores, deletion(Sum(), x, even, 0, seed=1).scores)
    rows = deletion(Sum(), torch.arange(64.0).view(1, 1, 8, 8), even, 0, steps=2).scores[0, 1]
    assert 700 < rows < 1316  # half of 2016; from the top down it would be 1520


def naive(model: nn.Module, inputs: dict[str, Tensor], maps: dict[str, Tensor], target: int, steps: int) -> Tensor:
    """A sample, a step and a place at a time."""
    scores = []
    for i in range(len(inputs["rgb"])):
        places = [
            (-float(m[i, y, x]), name, y, x)
            for name, m in maps.items()
            for y in range(m.shape[1])
            for x in range(m.shape[2])
        ]
        one = {name: x[i : i + 1].clone() for name, x in inputs.items()}
        curve, gone, queue = [], 0.0, sorted(places)
        for step in range(steps + 1):
            while queue and gone + 1e-9 < step / steps:
                _, name, y, x = queue.pop(0)
                one[name][:, :, y, x] = 0
                gone += 1 / maps[name][0].numel() / len(maps)
            with torch.no_grad():
                curve.append(model(**one)[0, target])
        scores.append(torch.stack(curve))
    return torch.stack(scores)


def test_a_fusion_is_a_loop_over_full_passes() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(size=16)
    layers = {"rgb": "rgb", "depth": "depth"}
    maps = HiResCAM(model, layers)(inputs, 2, signed=True)
    assert isinstance(maps, Maps)
    found = deletion(model, inputs, maps, 2, steps=5)
    torch.testing.assert_close(found.scores, naive(model, inputs, maps, 2, 5), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(deletion(model, inputs, maps, 2, steps=5, batch_size=2).scores, found.scores)


def test_road_imputes_what_it_removes() -> None:
    model, x = seeded(Conv).eval(), torch.rand(2, 3, 8, 8)
    map = torch.rand(2, 8, 8)
    found = road(model, x, map, 1, steps=4, seed=3)
    threshold = map.flatten(1).sort(descending=True).values[:, 16]  # a quarter
    keep = map <= threshold[:, None, None]
    with torch.no_grad():
        changed = torch.cat([impute(x[i : i + 1], keep[i : i + 1], seed=3) for i in range(2)])
        expected = model(changed)[:, 1]
    torch.testing.assert_close(found.scores[:, 1], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.scores[:, 0], model(x)[:, 1].detach())
    least = road(model, x, map, 1, steps=4, order="least", seed=3)
    torch.testing.assert_close(least.scores, road(model, x, -map, 1, steps=4, seed=3).scores)


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_average_drop_by_hand() -> None:
    x = X.expand(2, -1, -1, -1)
    maps = torch.tensor([[[2.0, 0.0], [1.0, -3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    found = seen_through(Sum(), x, maps, 0)
    assert found.masked.tolist() == [4 + 1.5, 10.0]
    assert found.drop.tolist() == pytest.approx([0.45, 0.0])
    assert found.increased.tolist() == [False, False]
    risen = Masked(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 1.0]))
    assert risen.drop.tolist() == [0.0, 0.75]  # what rises has lost nothing
    assert repr(risen) == "Masked(average drop 37.5%, increase 50.0%)"
    assert seen_through(
        Sum(), 1 - 0.9 * X, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), lambda out: out[:, 0] + 9
    ).increased.all()


def test_maps_that_compare_are_scaled_together() -> None:
    inputs = {"x": torch.ones(1, 1, 2, 2), "y": torch.ones(1, 1, 1, 1)}
    maps = {"x": torch.full((1, 2, 2), 4.0), "y": torch.full((1, 1, 1), 1.0)}
    assert seen_through(TwoSums(), inputs, maps, 0).masked.item() == 1 + 3 / 4
    assert seen_through(TwoSums(), inputs, Maps(maps, comparable=False), 0).masked.item() == 4
    with pytest.raises(MulticamError, match="a share of the score has no meaning"):
        seen_through(Sum(), -X, X[:, 0], 0)
    assert seen_through(seeded(Conv), torch.rand(1, 3, 8, 8), torch.ones(1, 8, 8), Probability(1)).drop.item() == 0


def test_a_curve_says_what_it_is() -> None:
    curve = Curve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[4.0, 1.0, 0.0], [2.0, 1.0, 0.0]]))
    assert curve.area.tolist() == [1.5, 1.0]
    assert repr(curve) == "Curve(area 1.25, mean scores 3, 1, 0)"


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.rand(2, 4, 4), "say which input the map is of"),
        ({}, "the explanation is empty"),
        ({"rgb": torch.rand(2, 4, 4)}, r"does not lie on input 'rgb' \(2, 3, 16, 16\); it should be \(2, 16, 16\)"),
        ({"rbg": torch.rand(2, 16, 16)}, "no input 'rbg'; did you mean 'rgb'"),
        ({"rgb": torch.full((2, 16, 16), torch.nan)}, "has NaN"),
    ],
    ids=["tensor", "none", "size", "name", "nan"],
)
def test_maps_that_do_not_fit(maps: Tensor | dict[str, Tensor], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        deletion(seeded(Fusion), fusion_inputs(size=16), maps, 0)


# What is wrong or easily taken for wrong elsewhere


def test_road_takes_all_channels_of_a_place() -> None:
    """Quantus 0.6.0 counts places over channels as well, so ROAD of images with three channels fails."""
    image = torch.stack([torch.arange(9.0), torch.ones(9), -torch.arange(9.0)]).view(1, 3, 3, 3).contiguous()
    image[0, :, 1, 1] = 100
    map = torch.zeros(1, 3, 3)
    map[0, 1, 1] = 1
    # Each channel of the one place becomes the mean of its neighbours: 4, 1 and -4.
    curve = road(Sum(), image, map, 0, steps=9, noise=0.0)
    assert curve.scores[0, :2].tolist() == pytest.approx([300 + 32 + 8 - 32, 36 + 9 - 36], rel=1e-6)
    assert curve.scores[0, -1].item() == pytest.approx(300 + 8, rel=1e-6)  # the mean colours


def test_deletion_is_the_pixel_flipping_of_quantus() -> None:
    """Of Quantus 0.6.0, `PixelFlipping(features_in_step=4, perturb_baseline=0.0, abs=False, normalise=False)` with `softmax=False`."""
    x, map = torch.sin(torch.arange(32.0)).view(2, 1, 4, 4), torch.cos(3 * torch.arange(32.0)).view(2, 4, 4)
    found = deletion(Squares(), x, map, 0, steps=4).scores[:, 1:]
    expected = torch.tensor([[6.392394, 4.518191, 2.079155, 0.0], [6.374179, 3.931582, 2.235115, 0.0]])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("measure", [deletion, insertion, road], ids=["deletion", "insertion", "road"])
def test_every_sample_counts_and_its_place_does_not(measure) -> None:
    """Quantus's ROAD reports the first batch for all: with as many samples as three batches, two in three do not count."""
    model, x, map = seeded(Conv).eval(), torch.rand(3, 3, 8, 8), torch.rand(3, 8, 8)
    whole = measure(model, x, map, 1, steps=6).scores
    assert len({tuple(row) for row in whole.tolist()}) == 3
    torch.testing.assert_close(measure(model, x, map, 1, steps=6, batch_size=2).scores, whole)
    torch.testing.assert_close(measure(model, x.flip(0), map.flip(0), 1, steps=6).scores, whole.flip(0))
    each = torch.cat([measure(model, x[i : i + 1], map[i : i + 1], 1, steps=6).scores for i in range(3)])
    torch.testing.assert_close(each, whole)


def test_a_sample_is_masked_by_its_own_map_alone() -> None:
    x, map = torch.rand(3, 1, 8, 8), torch.rand(3, 8, 8)
    whole = seen_through(Sum(), x, map, 0)
    each = torch.cat([seen_through(Sum(), x[i : i + 1], map[i : i + 1], 0).masked for i in range(3)])
    torch.testing.assert_close(each, whole.masked)
    torch.testing.assert_close(seen_through(Sum(), x.flip(0), map.flip(0), 0).drop, whole.drop.flip(0))


def test_insertion_by_hand_onto_a_mean() -> None:
    found = insertion(Squares(), X, X[:, 0], 0, steps=2, baseline="mean")
    assert found.scores.tolist() == [[4 * 2.5**2, 16 + 9 + 2 * 2.5**2, 30.0]]


def test_images_of_whole_numbers_are_masked_as_others() -> None:
    pixels, mask = torch.tensor([[[[10, 3]]]], dtype=torch.uint8), torch.tensor([[[1.0, 0.9]]])
    assert seen_through(Sum(), pixels, mask, lambda out: out[:, 0].float()).masked.tolist() == [10 + 3]  # 2.7, rounded
    x = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))

    class Eight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x.float() / 255)

    maps = torch.rand(2, 6, 6)
    whole = seen_through(Eight(), x, maps, Probability(1)).masked
    torch.testing.assert_close(whole, seen_through(Eight(), x.float(), maps, Probability(1)).masked, atol=2e-3, rtol=0)


@pytest.mark.parametrize("side", [5, 7, 12])
def test_as_many_places_go_as_a_step_says(side: int) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 1, bias=False)), torch.ones(1, 1, side, side)
    nn.init.ones_(model[1].weight)
    scores = deletion(model, x, torch.rand(1, side, side), 0, steps=side).scores
    torch.testing.assert_close(scores, side * torch.arange(side, -1.0, -1)[None])


def test_maps_that_do_not_compare_are_put_on_one_scale() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) + 2 * y.mean((1, 2, 3)))[:, None]

    inputs = {name: torch.rand(2, 1, 4, 4) for name in "xy"}
    maps = {"x": torch.rand(2, 4, 4), "y": 1000 * torch.rand(2, 4, 4)}
    scaled = {name: m / m.mean((1, 2), keepdim=True) for name, m in maps.items()}
    found = deletion(Two(), inputs, Maps(maps, comparable=False), 0)
    assert torch.equal(found.scores, deletion(Two(), inputs, scaled, 0).scores)
    assert not torch.equal(found.scores, deletion(Two(), inputs, maps, 0).scores)


def test_the_probability_of_an_only_class_is_no_score() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), torch.rand(2, 1, 4, 4)
    with pytest.raises(MulticamError, match=r"the probability of the only class is always 1; .*sigmoid"):
        seen_through(model, x, x[:, 0], Probability(0))
